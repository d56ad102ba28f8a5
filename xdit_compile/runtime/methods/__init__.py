"""Methods that need more than a rewritten graph, and the autoencoder."""
