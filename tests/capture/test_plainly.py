"""Batched functions and flex attention are recorded as plain operators, and split like any."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from splitting import Captured, run_split
from torch import nn
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, create_block_mask, flex_attention
from torch.utils import _pytree as pytree
from zoo import transformers as zoo

from xdit_compile.capture.capture import capture
from xdit_compile.passes.axes.infer import infer
from xdit_compile.passes.rules.registry import rulebook
from xdit_compile.plan import Plan

PLANS = [Plan(ulysses=2), Plan(ring=3), Plan(tensor=2), Plan(data=2)]


class Attends(nn.Module):
    """Five heads of queries, keys and values of 13 tokens, given to a function."""

    def __init__(self, function: Callable[..., torch.Tensor]):
        super().__init__()
        self.project, self.out, self.function = nn.Linear(80, 240), nn.Linear(80, 80), function

    def forward(self, x: torch.Tensor, documents: torch.Tensor) -> torch.Tensor:
        parts = self.project(x).unflatten(-1, (3, 5, 16)).permute(2, 0, 3, 1, 4)
        return self.out(self.function(*parts, documents).transpose(1, 2).flatten(2))


def of_documents(q: Any, k: Any, v: Any, documents: torch.Tensor) -> torch.Tensor:
    """A mask that is looked up, and queries that see nothing."""
    see = lambda b, h, i, j: (documents[b, i] >= documents[b, j]) & (i != 4)  # noqa: E731
    mask = create_block_mask(see, len(q), None, q.shape[2], k.shape[2], device="cpu")
    return flex_attention(q, k, v, block_mask=mask)


def biased(q: Any, k: Any, v: Any, documents: torch.Tensor) -> torch.Tensor:
    return flex_attention(q, k, v, lambda score, b, h, i, j: score + documents[b, j] * 0.1 * h, scale=0.3)


def grouped(q: Any, k: Any, v: Any, documents: torch.Tensor) -> torch.Tensor:
    return flex_attention(q, k[:, :1], v[:, :1], enable_gqa=True)


def summed(q: Any, k: Any, v: Any, documents: torch.Tensor) -> torch.Tensor:
    out, more = flex_attention(q, k, v, return_aux=AuxRequest(lse=True))
    return out + more.lse[..., None]


def by_blocks(q: Any, k: Any, v: Any, documents: torch.Tensor) -> torch.Tensor:
    """Blocks without a function are not looked at where flex attention is not compiled."""
    some = torch.zeros(1, 1, 1, 1, dtype=torch.int32)
    return flex_attention(q, k, v, block_mask=BlockMask.from_kv_blocks(some, some, some, some, BLOCK_SIZE=13))


def batched(q: Any, k: Any, v: Any, documents: torch.Tensor) -> torch.Tensor:
    """One sample at a time, of values from outside too."""
    one = lambda a, b, c, at: torch.softmax(a @ b.mT + documents[:1] * at, -1) @ c  # noqa: E731
    return torch.vmap(one)(q, k, v, torch.arange(len(q)))


def compare(module: nn.Module, args: tuple, kwargs: dict, plans: list[Plan]) -> None:
    with torch.no_grad():
        expected = pytree.tree_leaves(module(*args, **kwargs))
    model = Captured(module, args, kwargs, expected, infer(capture(module, args, kwargs), rulebook()))
    for plan in plans:
        worst, _ = run_split(model, plan)
        assert worst <= 2e-5, plan
        assert any(model.analysis(plan).units.values()), plan


WITH_HEADS = (of_documents, by_blocks)
"""Those whose heads can be split: scores that are changed are no attention to the partitioner."""


@pytest.mark.parametrize("function", [of_documents, biased, grouped, summed, by_blocks, batched])
def test_attention_of_functions_is_split(function: Callable[..., torch.Tensor]) -> None:
    torch.manual_seed(0)
    args = (torch.randn(2, 13, 80), torch.arange(26).view(2, 13) // 4)
    plans = [plan for plan in PLANS if function in WITH_HEADS or plan.tensor == 1]
    compare(Attends(function).eval(), args, {}, plans)


def _sparse(draw: zoo.Draw) -> tuple[nn.Module, dict[str, Any]]:
    model = diffusers.Kandinsky6SRTransformer3DModel(
        in_visual_dim=3, out_visual_dim=6, time_dim=20, model_dim=80, ff_dim=120, num_visual_blocks=3,
        axes_dims=(4, 6, 6), nabla_window=(1, 1, 1), nabla_threshold=0.5,
    )  # fmt: skip
    return model, {"hidden_states": draw.normal(2, 3, 16, 24, 7), "timestep": draw.full(2, 500)}


def _chunked(draw: zoo.Draw) -> tuple[nn.Module, dict[str, Any]]:
    model = diffusers.AnyFlowFARTransformer3DModel(
        attention_head_dim=14, num_attention_heads=5, in_channels=6, out_channels=6, text_dim=28, freq_dim=24,
        ffn_dim=90, num_layers=3, rope_max_seq_len=32, chunk_partition=(1, 2, 2), full_chunk_limit=2,
    )  # fmt: skip
    return model, {
        "hidden_states": draw.normal(2, 5, 6, 8, 12), "timestep": draw.full(10, 500).view(2, 5),
        "r_timestep": draw.full(10, 300).view(2, 5), "encoder_hidden_states": draw.normal(2, 13, 28),
        "chunk_partition": [1, 2, 2],
    }  # fmt: skip


def _cached(draw: zoo.Draw) -> tuple[nn.Module, dict[str, Any]]:
    """One chunk, with the keys and values of two others."""
    model, given = _chunked(draw)
    del given["chunk_partition"]
    given = {name: value[:, :2] if name != "encoder_hidden_states" else value for name, value in given.items()}
    sizes = {"compressed_cache": 30, "full_cache": 100}
    cache = [{name: draw.normal(2, 2, 5, size, 14) for name, size in sizes.items()} for _ in range(3)]
    flag = {"num_cached_chunks": 2, "is_cache_step": False}
    return model, {**given, "chunk_partition": [1, 2, 2], "kv_cache": cache, "kv_cache_flag": flag}


@pytest.mark.slow
@pytest.mark.parametrize("make", [_sparse, _chunked, _cached])
def test_denoisers_with_flex_attention_are_split(make: Callable[..., tuple[nn.Module, dict[str, Any]]]) -> None:
    model, kwargs = make(zoo.Draw())
    zoo.randomise(model.eval())
    compare(model, (), {**kwargs, "return_dict": False}, PLANS)
