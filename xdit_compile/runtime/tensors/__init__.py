"""Tensors whose values are on their way, elsewhere, or not computed yet."""
