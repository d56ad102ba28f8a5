"""Operators that need other ranks: attention, convolutions, norms, small linears."""
