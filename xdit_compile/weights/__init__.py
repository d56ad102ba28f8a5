"""A module's tensors: whole, in slices, or still in files."""
