"""torch's own samples of its operators, split every way: equal to the operator, or refused with a reason."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from op_samples.samples import Case

FAST = {
    "native_layer_norm": 1,
    "meshgrid.list_of_tensors": 1,
    "as_strided": 1,
    "ldexp": 0,
    "nn.functional.linear_cross_entropy.chunked": 0,
    "nn.functional.conv1d": 4,
    "matmul": 3,
    "topk": 1,
}
"""Operators with the sample of each that is tried in every form: the faults that samples found, and contractions."""
PARTS = 24


def test_samples_of_operators_split_every_way_equal_the_operator() -> None:
    from op_samples.samples import cases, operators

    picked = [case for info in operators(FAST) for case in cases(info, 5) if case.at == FAST.get(case.operator)]
    assert wrong(picked) == []


def wrong(picked: Iterable[Case]) -> list[str]:
    from op_samples.splits import tried

    outcomes = [tried(case) for case in picked]
    assert sum(outcome.exact for outcome in outcomes) > 0
    return [f"{each.operator} {each.form} {each.at}: {each.wrong[0]}" for each in outcomes if each.wrong]


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("part", range(PARTS))
def test_every_operator(part: int) -> None:
    from op_samples.samples import cases, operators

    assert wrong(case for info in operators()[part::PARTS] for case in cases(info)) == []
