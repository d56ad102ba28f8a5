"""Splits a captured sample every way that its axes allow, on simulated ranks, and compares with the operator."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from splitting import partition_all
from torch import fx
from torch.utils._python_dispatch import TorchDispatchMode

from xdit_compile.capture.capture import TOLERANCE, capture, relative_difference
from xdit_compile.errors import PartitionError, one_line
from xdit_compile.ir.axes import Axis, Product, atoms
from xdit_compile.ir.sharding import Unit
from xdit_compile.passes.axes.infer import Inference, infer
from xdit_compile.passes.axes.rule import operator_name
from xdit_compile.passes.rules.registry import rulebook
from xdit_compile.plan import Plan
from xdit_compile.runtime.verify.simulated_mesh import run_simulated

from .samples import Case

RANKS = (2, 3, 5)
MOST_WAYS = 30
Units = tuple[Unit, ...]


class Draws(TorchDispatchMode):
    """Notices operators that draw random numbers."""

    found = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found = self.found or torch.Tag.nondeterministic_seeded in func.tags
        return func(*args, **(kwargs or {}))


@dataclasses.dataclass
class Outcome:
    """What became of one case.

    ``gathered`` counts splits in which something but the result was gathered, by the reason; ``wrong`` has what is no
    better than a wrong number: a difference, a shard that cannot run, an error that is no refusal.
    """

    operator: str
    form: str
    at: int
    targets: list[str] = dataclasses.field(default_factory=list)
    splits: int = 0
    exact: int = 0
    gathered: dict[str, int] = dataclasses.field(default_factory=dict)
    refused: dict[str, int] = dataclasses.field(default_factory=dict)
    wrong: list[str] = dataclasses.field(default_factory=list)
    left_out: str = ""


def tried(case: Case, ranks: tuple[int, ...] = RANKS) -> Outcome:
    """Capture one case and split it every way."""
    outcome = Outcome(case.operator, case.form, case.at)
    if "empty" in case.operator:
        outcome.left_out = "its result is memory as it was found"
        return outcome
    try:
        with torch.no_grad(), Draws() as draws:
            expected = case.module.eval()(*case.inputs)
    except Exception as error:
        outcome.left_out = f"torch refuses it: {one_line(error)}"
        return outcome
    if draws.found:
        outcome.left_out = "draws random numbers"
        return outcome
    if not expected:
        outcome.left_out = "its result has no tensor"
        return outcome
    try:
        inference = infer(capture(case.module, case.inputs, {}), rulebook())
    except Exception as error:
        outcome.left_out = f"not captured: {one_line(error, 600)}"
        return outcome
    outcome.targets = sorted({operator_name(node.target) for _, node, _ in inference.nodes()})
    outcome.wrong += sorted({op_axes.unread for *_, op_axes in inference.nodes() if op_axes.unread})
    with interpreted():
        for units in ways(inference):
            for count in ranks if case.form == "plain" else ranks[1:2]:
                _split(case, inference, units, count, expected, outcome)
    return outcome


@contextmanager
def interpreted() -> Iterator[None]:
    """Graphs made meanwhile are only walked: writing each out as Python takes half the time."""
    with mock.patch.object(fx.GraphModule, "recompile", lambda module: None):
        yield


def ways(inference: Inference) -> Iterator[Units]:
    """What can be split: every atom alone, all atoms of an axis together, and an axis's factors as one."""
    found: dict[tuple, Units] = {}
    for axis in _axes(inference):
        inner = [(atom,) for atom in dict.fromkeys(atoms(axis)) if atom.size > 1]
        options: list[Units] = [(unit,) for unit in inner] + [tuple(inner)] * (len(inner) > 1)
        if isinstance(axis, Product):
            options.append((axis.factors,))
        for units in options:
            found.setdefault(tuple(tuple(id(factor) for factor in unit) for unit in units), units)
    yield from list(found.values())[:MOST_WAYS]


def _axes(inference: Inference) -> list[Axis]:
    """Every axis of the program, those of its inputs first."""
    tables = [inference.axes, *(frame.axes for frame in inference.frames)]
    every = [axis for table in tables for groups in table.values() for axes in groups for axis in axes]
    return list({id(axis): axis for axis in every}.values())


def _split(
    case: Case, inference: Inference, units: Units, count: int, expected: tuple[torch.Tensor, ...], outcome: Outcome
) -> None:
    outcome.splits += 1
    where = f"{count} ranks over {units}"
    try:
        ranks = partition_all(inference, Plan(ulysses=count), units)
    except PartitionError as error:
        _count(outcome.refused, one_line(error))
        return
    except Exception as error:
        outcome.wrong.append(f"{where}: {type(error).__name__}: {one_line(error)}")
        return
    try:
        results = run_simulated([rank.program for rank in ranks], case.module, case.inputs, {})
    except Exception as error:
        outcome.wrong.append(f"{where}: {type(error).__name__}: {one_line(error)}")
        return
    problems = [problem for result in results if (problem := differs(result, expected))]
    if problems:
        outcome.wrong.append(f"{where}: {problems[0]}")
        return
    outcome.exact += 1
    for reason in {gather.reason for rank in ranks for gather in rank.ledger.gathers} - {"the result"}:
        _count(outcome.gathered, reason)


def _count(counts: dict[str, int], reason: str) -> None:
    counts[reason] = counts.get(reason, 0) + 1


def differs(found: Any, expected: tuple[torch.Tensor, ...]) -> str:
    """In what two results differ; nothing where they are equal to rounding."""
    if len(found) != len(expected):
        return f"{len(found)} results in place of {len(expected)}"
    for one, other in zip(found, expected, strict=True):
        if one.shape != other.shape or one.dtype != other.dtype:
            return f"{one.dtype}{tuple(one.shape)} in place of {other.dtype}{tuple(other.shape)}"
        difference = relative_difference(one, other)
        if not difference <= TOLERANCE.get(torch.float32 if other.is_complex() else other.dtype, 0.0):
            return f"differs by {difference:.1e}"
    return ""
