"""All rules in one book."""

from __future__ import annotations

from . import (
    attention_rule,
    contractions,
    convolutions,
    indexing,
    joins,
    kept_rule,
    norms,
    pads,
    pointwise,
    resizing,
    transposed,
    views,
)  # fmt: skip
from .rules import RuleBook


def rulebook() -> RuleBook:
    """A book with every rule that ships; callers may add their own to it."""
    book = RuleBook()
    first = (pointwise, views, joins, pads, contractions, norms)
    for family in (*first, convolutions, transposed, resizing, indexing, attention_rule, kept_rule):
        book.include(family.BOOK)
    return book
