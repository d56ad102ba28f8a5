"""What structures compute for one another: work that moves from one to the next."""
