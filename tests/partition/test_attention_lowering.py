"""Attention over split tokens: every kind of mask, head count and mesh, against the single device."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from splitting import Captured, partition_all, run_split
from torch import nn

from xdit_compile.capture.capture import capture
from xdit_compile.passes.axes.infer import infer
from xdit_compile.passes.rules.registry import rulebook
from xdit_compile.plan import Plan

ATTENTION = torch.ops.xdit_compile.attention.default
MESHES = [(2, 1), (1, 2), (3, 1), (1, 3), (2, 2), (1, 8), (8, 1)]


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of one attention: two text tokens streams are joined where ``text`` is not zero."""

    heads: int = 5
    key_heads: int = 5
    tokens: int = 11
    text: int = 0
    head_dim: int = 6
    batch: int = 2


class Attention(nn.Module):
    """Projections around one attention over ``[text | image]``."""

    def __init__(self, shape: Shape, **options: object):
        super().__init__()
        torch.manual_seed(0)
        self.shape, self.options = shape, options
        width = shape.heads * shape.head_dim
        self.q = nn.Linear(width, width)
        self.k = nn.Linear(width, shape.key_heads * shape.head_dim)
        self.v = nn.Linear(width, shape.key_heads * shape.head_dim)
        self.out = nn.Linear(width, width)

    def forward(self, x: torch.Tensor, text: torch.Tensor | None = None, mask: torch.Tensor | None = None):
        joint = x if text is None else torch.cat([text, x], dim=1)
        batch, tokens, _ = joint.shape
        q, k, v = (
            proj(joint).view(batch, tokens, -1, self.shape.head_dim).transpose(1, 2)
            for proj in (self.q, self.k, self.v)
        )
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **self.options)
        y = joint + self.out(y.transpose(1, 2).flatten(2))
        return y if text is None else (y[:, : text.shape[1]], y[:, text.shape[1] :])


def split_and_compare(
    shape: Shape, meshes=MESHES, mask: torch.Tensor | None = None, hidden: int | None = None, **options: object
) -> None:
    """``hidden`` are the all-to-alls that are begun ahead where a link is slow; None for no link."""
    module = Attention(shape, **options).eval()
    generator = torch.Generator().manual_seed(1)
    width = shape.heads * shape.head_dim
    x = torch.randn(shape.batch, shape.tokens, width, generator=generator)
    text = torch.randn(shape.batch, shape.text, width, generator=generator) if shape.text else None
    args = (x, text, mask)
    with torch.no_grad():
        expected = module(*args)
    expected = [expected] if isinstance(expected, torch.Tensor) else list(expected)
    model = Captured(module, args, {}, expected, infer(capture(module, args, {}), rulebook()))
    for ulysses, ring in meshes:
        worst, ranks = run_split(model, Plan(ulysses=ulysses, ring=ring, link="1B/s" if hidden is not None else None))
        assert worst <= 2e-5, f"ulysses={ulysses} ring={ring}: {worst}"
        operators = [item.op for item in ranks[0].ledger.collectives]
        assert operators.count("all_to_all_start") == (hidden or 0)
        assert operators.count("all_to_all") == (0 if ulysses == 1 else 1 if hidden else 2)
        assert operators.count("ring_attention") == (1 if ring > 1 else 0)


@pytest.mark.parametrize("text", [0, 3])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_any_token_and_head_count(text: int, scale: float | None) -> None:
    split_and_compare(Shape(text=text), scale=scale)


@pytest.mark.parametrize("key_heads", [1, 2, 3, 6])
def test_grouped_query_heads_are_split_by_key_head_and_replicated_when_there_are_too_few(key_heads: int) -> None:
    split_and_compare(Shape(heads=6, key_heads=key_heads), enable_gqa=True)


@pytest.mark.parametrize("key_heads", [2, 4, 8])
def test_hidden_exchanges_keep_query_heads_with_their_key_head(key_heads: int) -> None:
    """At two ranks both halves have one key head each, or share the only one."""
    shape = Shape(heads=8, key_heads=key_heads, text=3)
    split_and_compare(shape, meshes=[(2, 1)], hidden=3, enable_gqa=True)
    split_and_compare(shape, meshes=[(2, 1)], hidden=3, enable_gqa=True, is_causal=True)
    split_and_compare(shape, meshes=[(3, 1), (1, 2), (2, 2)], hidden=0, enable_gqa=True)


def test_causal_attention_sees_global_positions() -> None:
    split_and_compare(Shape(), is_causal=True)
    split_and_compare(Shape(text=3), is_causal=True)


BROADCASTS = [(1, 1), (1, 14), (14, 1), (14, 14), (5, 1, 14), (1, 14, 14), (2, 1, 1, 14), (2, 5, 14, 14), (1, 5, 1, 14)]


@pytest.mark.parametrize("kind", ["bool", "additive"])
@pytest.mark.parametrize("shape", BROADCASTS)
def test_masks_of_every_broadcast_shape(shape: tuple[int, ...], kind: str) -> None:
    generator = torch.Generator().manual_seed(2)
    scores = torch.randn(shape, generator=generator)
    mask = scores > -0.8 if kind == "bool" else scores
    if kind == "bool":
        mask[..., 0] = True
    split_and_compare(Shape(text=3), meshes=[(2, 1), (1, 3), (2, 2)], mask=mask)


@pytest.mark.parametrize("shape", [(14, 14), (4, 1, 14), (2, 1, 1, 14), (2, 4, 14, 14)])
def test_each_half_of_the_heads_has_its_mask(shape: tuple[int, ...]) -> None:
    mask = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    split_and_compare(Shape(heads=4, key_heads=4, text=3), meshes=[(2, 1)], mask=mask, hidden=3)


@pytest.mark.parametrize("kind", ["bool", "additive"])
def test_a_rank_whose_keys_are_all_masked_counts_nothing(kind: str) -> None:
    """Ranks hold ``[text_i | image_i]``: with every odd column dead some ring parts see nothing at all."""
    alive = torch.zeros(1, 1, 1, 14, dtype=torch.bool)
    alive[..., :1] = True
    mask = alive if kind == "bool" else torch.zeros(alive.shape).masked_fill(~alive, float("-inf"))
    split_and_compare(Shape(text=3), meshes=[(1, 2), (1, 8), (2, 2)], mask=mask)


def test_three_dimensional_attention_splits_its_batch_of_heads() -> None:
    class Flat(nn.Module):
        def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return F.scaled_dot_product_attention(q, k, v) + q

    tensors = tuple(torch.randn(7, 13, 4, generator=torch.Generator().manual_seed(i)) for i in range(3))
    module = Flat().eval()
    model = Captured(module, tensors, {}, [module(*tensors)], infer(capture(module, tensors, {}), rulebook()))
    for ulysses, ring in MESHES:
        assert run_split(model, Plan(ulysses=ulysses, ring=ring))[0] <= 2e-5


def test_more_ranks_than_tokens_leave_empty_shards() -> None:
    split_and_compare(Shape(tokens=5))
    split_and_compare(Shape(tokens=3, text=2))


@pytest.mark.parametrize(("ulysses", "ring"), [(2, 1), (4, 1), (1, 2), (1, 4)])
def test_elements_that_leave_a_rank_are_those_of_the_papers(ulysses: int, ring: int) -> None:
    shape = Shape(heads=8, key_heads=8, tokens=32, batch=1)
    module = Attention(shape).eval()
    x = torch.randn(1, 32, 48)
    model = infer(capture(module, (x,), {}), rulebook())
    ranks = ulysses * ring
    for rank in partition_all(model, Plan(ulysses=ulysses, ring=ring)):
        sent = sum(item.elements for item in rank.ledger.collectives if item.purpose == "attention")
        tokens, hidden = 32, 48
        expected = (
            4 * tokens * hidden * (ranks - 1) / ranks**2 if ulysses > 1 else 2 * tokens * hidden * (ranks - 1) / ranks
        )
        assert sent == expected


@pytest.mark.parametrize("key_heads", [6, 12])
@pytest.mark.parametrize("text", [0, 3])
def test_heads_that_divide_and_tokens_that_do_not(key_heads: int, text: int) -> None:
    shape = Shape(heads=12, key_heads=key_heads, text=text)
    mask = torch.randn(2, 12, 11 + text, 11 + text, generator=torch.Generator().manual_seed(3))
    meshes = [(2, 1), (3, 1), (6, 1), (2, 2)]
    split_and_compare(shape, meshes=meshes, enable_gqa=key_heads != 12)
    split_and_compare(shape, meshes=meshes, mask=mask, enable_gqa=key_heads != 12)
    split_and_compare(dataclasses.replace(shape, tokens=4), meshes=[(6, 1)], enable_gqa=key_heads != 12)


@pytest.mark.parametrize("provider", ["auto", "chunked"])
def test_a_provider_that_is_named_computes_on_one_rank_too(provider: str) -> None:
    x = torch.randn(2, 11, 30)
    module = Attention(Shape()).eval()
    with torch.no_grad():
        expected = [module(x)]
    model = Captured(module, (x,), {}, expected, infer(capture(module, (x,), {}), rulebook()))
    worst, (rank,) = run_split(model, Plan(attention=provider))
    assert worst < 2e-5
    graphs = [structure.graph for structure in rank.program.structures().values()]
    called = [node for graph in graphs for node in graph.find_nodes(op="call_function", target=ATTENTION)]
    assert [node.args[-1] for node in called] == ([] if provider == "auto" else [provider])
