"""Rules of operators that treat every position alike."""

from __future__ import annotations

from xdit_compile.passes.axes.rule import Rule, RuleBook

BOOK = RuleBook()


@BOOK.rule(
    "pointwise", "clone", "alias", "detach", "_to_copy", "copy", "lift_fresh_copy", "dropout", "native_dropout",
    "contiguous", "to", "fill", "gelu", "type_as", "masked_fill", "rsub", "nan_to_num", "where", "conj", "_conj",
    "resolve_conj", "feature_dropout", "hardtanh", "softplus", "isclose", "bitwise_and",
)  # fmt: skip
def broadcast(rule: Rule) -> None:
    """A map over every dim; dims are aligned from the right, and size 1 stands for anything."""
    shape = rule.out_shape()
    rank = len(shape)
    for dim in range(rank):
        users = []
        for operand, axes in enumerate(rule.actual):
            operand_dim = dim - (rank - len(axes))
            if operand_dim >= 0 and axes[operand_dim].size == shape[dim]:
                users.append((operand, operand_dim))
        rule.loop("map", users, [(result, dim) for result in range(len(rule.result_axes))])


@BOOK.rule("view_as_real")
def view_as_real(rule: Rule) -> None:
    """A map over every dim; the pairs at the end are a fresh axis."""
    for dim in range(len(rule.actual[0])):
        rule.loop("map", [(0, dim)], [(0, dim)])


@BOOK.rule("view_as_complex")
def view_as_complex(rule: Rule) -> None:
    """A map over every dim but the pairs at the end, which are needed whole."""
    last = len(rule.actual[0]) - 1
    for dim in range(last):
        rule.loop("map", [(0, dim)], [(0, dim)])
    rule.loop("whole", [(0, last)], [])


@BOOK.rule("complex", "polar")
def pair(rule: Rule) -> None:
    broadcast(rule)
