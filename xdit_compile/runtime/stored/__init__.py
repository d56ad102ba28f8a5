"""Calls that were compiled in another process, and what all ranks must agree on to run them."""
