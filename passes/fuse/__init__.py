"""Passes that make fewer and larger operators of what a rank runs."""
