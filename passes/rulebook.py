"""All rules in one book."""

from __future__ import annotations

from . import attention_rule, contractions, convolutions, indexing, joins, norms, pads, pointwise, resizing, views
from .rules import RuleBook


def rulebook() -> RuleBook:
    """A book with every rule that ships; callers may add their own to it."""
    book = RuleBook()
    for family in (
        pointwise, views, joins, pads, contractions, norms, convolutions, resizing, indexing, attention_rule,
    ):  # fmt: skip
        book.include(family.BOOK)
    return book
