"""What a pipeline is given besides prompts, sizes and seeds: pictures, a scheduler, and arguments by their names."""
