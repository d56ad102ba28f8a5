"""What the ranks of a server do: requests side by side, whose calls of the denoisers join."""
