"""Passes over captured programs: what axes mean, what is split, what one rank runs."""
