"""Pipelines of diffusers, tiny and unmodified, by their default call under every plan: exact, refused, or a fault."""
