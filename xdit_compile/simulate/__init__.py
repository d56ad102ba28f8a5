"""All ranks in one process, and what they would send."""
