"""Inputs that do not change from step to step, made anew in each."""

from __future__ import annotations

import math
import weakref

import pytest
import torch

from xdit_compile.ir.digest import digest_tensors
from xdit_compile.runtime.generation import Generation
from xdit_compile.runtime.tensors import recognized
from xdit_compile.runtime.tensors.recognized import MOST, Recognized


@pytest.fixture
def read(monkeypatch):
    """What the host reads."""
    found = []
    monkeypatch.setattr(recognized, "digest_tensors", lambda some: found.extend(some) or digest_tensors(some))
    return found


def prompts(branch):
    return torch.full((2, 5, 7), float(branch))


@pytest.mark.parametrize("inference", [False, True])
def test_tensors_made_anew_are_read_once_and_not_kept(read, inference):
    generation, made = Generation(), []
    with torch.inference_mode(inference), generation.running():
        for _ in range(20):
            for branch in (0, 1):
                given = prompts(branch)
                made.append(weakref.ref(given))
                assert generation.branch(generation, "program", [given], dict).index == branch
                del given
        assert generation.branches(generation) == 2 and len(read) == 2
        read.clear()
        assert sum(each() is not None for each in made) <= 2


def test_what_was_met_is_known_until_it_is_written_to(read):
    values, given = Recognized(), prompts(0)
    first = values.name(given)
    assert values.name(given) == first == values.name(prompts(0)) and len(read) == 1
    given += 1
    assert values.name(given) != first and values.name(prompts(1)) == values.name(given)
    assert values.name(prompts(0)) == first


def test_every_bit_counts():
    values = Recognized()
    zero, minus, nan = torch.zeros(2, 3), torch.zeros(2, 3), torch.full((2, 3), math.nan)
    minus[1, 2] = -0.0
    assert len({values.name(x) for x in (zero, minus, nan, zero.double(), zero.view(3, 2))}) == 5
    assert values.name(nan.clone()) == values.name(nan) and values.name(zero.T.contiguous().T) == values.name(zero)
    assert values.name(torch.ones(2, 3, dtype=torch.bool)) != values.name(torch.zeros(2, 3, dtype=torch.bool))


def test_values_that_change_in_every_step_are_not_all_kept():
    values = Recognized()
    for step in range(3 * MOST):
        assert values.name(prompts(step)) == digest_tensors([prompts(step)])
    assert sum(len(met) for met in values._met.values()) == MOST
    assert values.name(prompts(0)) == digest_tensors([prompts(0)])
