"""PipeFusion: patches, and stages that they flow through."""
