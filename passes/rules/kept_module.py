"""The rule of modules that are kept as one operator: positions that they compute one by one may lie apart."""

from __future__ import annotations

from xdit_compile.passes.axes.rule import Rule, RuleBook

BOOK = RuleBook()


@BOOK.rule("xdit_compile.kept_module")
def kept_module(rule: Rule) -> None:
    """A map over the dims whose positions it computes one by one; every other dim is needed whole."""
    apart, sizes, dtype = rule.args[3:]
    pairs = dict(zip(apart[::2], apart[1::2], strict=True))
    for operand, axes in enumerate(rule.actual):
        for dim in range(len(axes)):
            if operand == 0 and dim in pairs:
                rule.loop("map", [(0, dim)], [(0, pairs[dim])])
            else:
                rule.opaque(operand, dim, "a module that is run as it is")
