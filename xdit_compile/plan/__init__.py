"""What the user asks for, and the methods that there are."""

from .plan import Plan

__all__ = ["Plan"]
