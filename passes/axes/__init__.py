"""Axis inference: what every dim of every tensor means."""
