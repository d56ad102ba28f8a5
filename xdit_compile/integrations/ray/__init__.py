"""Gangs of ranks as actors of Ray."""
