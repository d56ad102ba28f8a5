"""The named models with their real layer sizes: what two ranks repeat, and what stands in the way inside blocks."""

from __future__ import annotations

import pytest
import torch
from torch.utils import _pytree as pytree
from zoo import real as zoo_real

import xdit_compile
from xdit_compile import Plan

QUICK_BLOCKS = 6


WITH_WEIGHTS = {"lumina2": 2}
"""Models that make new tensors of lengths read from a mask, which only real ones have; with so many blocks."""


def explained(name: str, blocks: int | None) -> xdit_compile.reports.report.Report:
    case = zoo_real.REAL[name]
    if name in WITH_WEIGHTS:
        module = case.build(WITH_WEIGHTS[name], device="cpu")
        args, kwargs = case.inputs(device="cpu", small=True)
    else:
        module = case.build(blocks)
        args, kwargs = case.inputs(device="meta" if case.eager_on_meta else "cpu")
        args, kwargs = pytree.tree_map(weightless, (args, kwargs))
    return xdit_compile.explain(module, Plan(ulysses=2), args=args, kwargs=kwargs)


def weightless(leaf: object) -> object:
    """Masks keep the values that a module's own code reads; everything else has only a shape."""
    return leaf.to("meta") if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() else leaf


def check(found: xdit_compile.reports.report.Report) -> None:
    assert found.replicated_flops <= 0.05
    assert not [gather for gather in found.gathers if gather.place.repeated]
    assert found.imbalance < 1.1


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow if name in WITH_WEIGHTS else ()) for name in sorted(zoo_real.REAL)],
)
def test_little_is_repeated_and_no_block_gathers(name: str) -> None:
    check(explained(name, QUICK_BLOCKS))


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(zoo_real.REAL) - set(WITH_WEIGHTS)))
def test_the_same_with_every_block(name: str) -> None:
    check(explained(name, None))
