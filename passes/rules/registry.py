"""All rules in one book."""

from __future__ import annotations

from xdit_compile.passes.axes.rule import RuleBook

from . import (
    attention,
    cat_split_slice,
    convolution,
    convolution_transpose,
    index,
    interpolate,
    kept_module,
    matmul_reduce,
    norms,
    pad,
    pointwise,
    views,
)


def rulebook() -> RuleBook:
    """A book with every rule that ships; callers may add their own to it."""
    book = RuleBook()
    first = (pointwise, views, cat_split_slice, pad, matmul_reduce, norms)
    for family in (*first, convolution, convolution_transpose, interpolate, index, attention, kept_module):
        book.include(family.BOOK)
    return book
