"""What stands in a module's place, and what the ranks of one plan share while it does."""
