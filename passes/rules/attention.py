"""The rule of scaled dot-product attention."""

from __future__ import annotations

from xdit_compile.passes.axes.operators import AttentionOp
from xdit_compile.passes.axes.rule import Rule, RuleBook, type_opaquely

BOOK = RuleBook()


@BOOK.rule("scaled_dot_product_attention")
def attention(rule: Rule) -> None:
    """A map over batch, heads and query tokens, ``keys`` over tokens of keys and values; channels are needed whole.

    Grouped query heads are a product of key heads and a group, and one loop with these.
    """
    rank = len(rule.actual[0])
    if any(len(axes) != rank for axes in rule.actual[1:3]):
        type_opaquely(rule, "queries, keys and values of different ranks")
        return
    tokens, channels = rank - 2, rank - 1
    mask = 3 if len(rule.operands) > 3 else None
    grouped = bool(rule.node.kwargs.get("enable_gqa", False)) and rule.shape(0)[-3] != rule.shape(1)[-3]
    for dim in range(rank - 2):
        users = [(0, dim), (1, dim), (2, dim)]
        if dim == rank - 3 and grouped:
            _grouped_heads(rule, dim, _masked(rule, mask, dim))
            continue
        rule.loop(
            "map",
            [pair for pair in users if rule.shape(pair[0])[dim] == rule.out_shape()[dim]] + _masked(rule, mask, dim),
            [(0, dim)],
        )
    rule.loop("map", [(0, tokens), *_masked(rule, mask, tokens)], [(0, tokens)])
    rule.loop("keys", [(1, tokens), (2, tokens), *_masked(rule, mask, channels, rule.shape(1)[tokens])], [])
    rule.loop("whole", [(0, channels), (1, channels)], [])
    rule.loop("whole", [(2, channels)], [(0, channels)])
    rule.operator = AttentionOp(
        tokens=tokens,
        mask=mask,
        is_causal=bool(rule.arg(5, "is_causal", False)),
        dropout_p=rule.arg(4, "dropout_p", 0.0),
        scale=rule.named("scale"),
        enable_gqa=bool(rule.named("enable_gqa", False)),
    )


def _masked(rule: Rule, mask: int | None, dim: int, size: int | None = None) -> list[tuple[int, int]]:
    """The mask's dim that stands under ``dim`` of the scores, if it has more than one position."""
    if mask is None:
        return []
    mask_dim = dim - (len(rule.actual[0]) - len(rule.actual[mask]))
    size = rule.out_shape()[dim] if size is None else size
    return [(mask, mask_dim)] if mask_dim >= 0 and rule.shape(mask)[mask_dim] == size and size > 1 else []


def _grouped_heads(rule: Rule, dim: int, masked: list[tuple[int, int]]) -> None:
    """Query heads are key heads times a group, outermost first."""
    from xdit_compile.ir.axes import Conflict

    group = rule.shape(0)[dim] // rule.shape(1)[dim]
    key_heads = rule.merge([(1, dim), (2, dim)])
    try:
        outer, _ = rule.system.split(rule.actual[0][dim], group)
        rule.system.unify(outer, key_heads)
        rule.merge(masked, rule.actual[0][dim])
    except Conflict as conflict:
        for operand in range(3):
            rule.opaque(operand, dim, str(conflict))
        return
    rule.result_axes[0][dim] = rule.actual[0][dim]
    rule.add_join([(0, dim), (1, dim), (2, dim), *masked], [(0, dim)])
