"""Ranks: who they are, where they compute, and what they tell one another."""
