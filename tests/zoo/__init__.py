"""Tiny models of diffusers, with the calls that their pipelines make."""
