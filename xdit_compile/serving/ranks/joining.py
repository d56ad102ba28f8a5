"""Calls of one denoiser by several requests, run as one call of all their samples and taken apart again.

Nothing tells which inputs go by sample. It is found as for ``cfg``: the joined call is cut in all likely ways, and each is
tried with other values for the samples of one request, which must change nothing of another's result.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from xdit_compile.capture.cutting import Call as Inputs
from xdit_compile.capture.cutting import Cut, Made, Path, counts_of, pieces_of, ways_to_cut
from xdit_compile.distributed.agreement import Agreement
from xdit_compile.ir.digest import digest, digest_tensors
from xdit_compile.ir.results import Template, tensors_of
from xdit_compile.runtime.verify.independence import Independent, independent

from .gate import Call, Gate

COUNTS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
"""How many calls run as one: each number is a program of its own, so calls between two are filled up."""


@dataclasses.dataclass(frozen=True)
class Joint:
    """How calls of one form join.

    Args:
        entries: the inputs that go by sample.
        samples: of one call.
        single: the form of one call's result, tensors on the meta device.
    """

    entries: frozenset[Path]
    samples: int
    single: Made


class Joiner:
    """Runs calls, several as one where that gives each what it would get alone.

    Every rank is given the same calls in the same order, so what is tried is the same on all of them.

    Args:
        agreement: the talk among the ranks.
        most: calls that may run as one.
    """

    def __init__(self, agreement: Agreement, most: int):
        self._agreement, self._most = agreement, most
        self._joints: dict[str, Joint | None] = {}

    def key(self, call: Call) -> str:
        """What calls that may join have in common; another one for each that may not."""
        form = _form(call)
        if self._most == 1 or (joint := self._joints.get(form, _UNTRIED)) is None:
            return f"{form} alone"
        return form if joint is _UNTRIED else f"{form} {_others(call, joint.entries)}"

    def run(self, calls: Sequence[Call]) -> list[Any]:
        """The result of every call. Calls of one key are of one gate.

        Raises:
            XditCompileError: as calls of a parallelized module do.
        """
        form = _form(calls[0])
        if len(calls) > 1 and form not in self._joints:
            self._try(form, calls[:2])
        joint = self._joints.get(form)
        if len(calls) == 1 or joint is None:
            return [call.gate.runner(*call.args, **call.kwargs) for call in calls]
        return self._joined(joint, calls)

    def _try(self, form: str, calls: Sequence[Call]) -> None:
        """Find out how calls of a form join; where they could not be tried, another time may show it."""
        forward = calls[0].gate.runner
        with torch.no_grad():
            alone = forward(*calls[0].args, **calls[0].kwargs)
        template = Template.of(alone)
        made = (template, [tensor.to("meta") for tensor in tensors_of(alone)])
        tried = False
        for samples in counts_of(template, [tensor.shape for tensor in made[1]]):
            for way in ways_to_cut((calls[0].args, calls[0].kwargs), samples, 1):
                if len({_others(call, way.entries) for call in calls}) > 1:
                    continue
                tried = True
                if self._holds(forward, calls, way.entries, samples):
                    self._joints[form] = Joint(way.entries, samples, made)
                    return
        if tried:
            self._joints[form] = None

    def _holds(
        self, forward: Callable[..., Any], calls: Sequence[Call], entries: frozenset[Path], samples: int
    ) -> bool:
        args, kwargs = _concatenated(calls, entries)
        verdict = independent(calls[0].gate.module, forward, args, kwargs, [len(calls)], [samples * len(calls)])
        mine = isinstance(verdict, Independent) and verdict.cut.entries == entries
        return not self._agreement.any("a trial of joined calls", not mine)

    def _joined(self, joint: Joint, calls: Sequence[Call]) -> list[Any]:
        count = next((count for count in COUNTS if count >= len(calls)), len(calls))
        filled = [*calls, *[calls[-1]] * (min(count, self._most) - len(calls))]
        args, kwargs = _concatenated(filled, joint.entries)
        result = calls[0].gate.runner(*args, **kwargs)
        cut = Cut(joint.samples * len(filled), len(filled), joint.entries)
        return _apart(result, joint, cut)[: len(calls)]


_UNTRIED = Joint(frozenset(), 0, (Template.of(None), []))


def _form(call: Call) -> str:
    """Digest of a denoiser and of the forms of what it is given."""
    leaves, spec = pytree.tree_flatten((call.args, call.kwargs))
    forms = [
        (list(leaf.shape), str(leaf.dtype), str(leaf.device)) if isinstance(leaf, torch.Tensor) else type(leaf).__name__
        for leaf in leaves
    ]
    return digest([call.gate.name, str(spec), forms])


def _others(call: Call, entries: frozenset[Path]) -> str:
    """Digest of the values of what does not go by sample."""
    whole = Cut(1, 1, entries).mapped((call.args, call.kwargs), lambda value: None)
    leaves = pytree.tree_leaves(whole)
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    return digest([digest_tensors(tensors), [repr(leaf) for leaf in leaves if not isinstance(leaf, torch.Tensor)]])


def _concatenated(calls: Sequence[Call], entries: frozenset[Path]) -> Inputs:
    """One call of the samples of several, in their order."""
    by_call: list[list[Any]] = []
    for call in calls:
        by_call.append([])
        Cut(1, 1, entries).mapped((call.args, call.kwargs), by_call[-1].append)
    joined = iter([_end_to_end(values) for values in zip(*by_call, strict=True)])
    return Cut(1, 1, entries).mapped((calls[0].args, calls[0].kwargs), lambda value: next(joined))


def _end_to_end(values: Sequence[Any]) -> Any:
    if isinstance(values[0], torch.Tensor):
        return torch.cat(list(values))
    return type(values[0])(each for value in values for each in value)


def _apart(result: Any, joint: Joint, cut: Cut) -> list[Any]:
    """Every call's result out of the joined one; what it holds is its own, so that pipelines may write to it."""
    tensors, (template, likes) = tensors_of(result), joint.single
    pieces = pieces_of((Template.of(result), tensors), [joint.single] * cut.parts, cut)
    if pieces is None:
        raise AssertionError("a joined call returned another form than the one that was tried")
    by_call: list[list[Any]] = [[None] * len(likes) for _ in range(cut.parts)]
    for tensor, places in zip(tensors, pieces, strict=True):
        for part, place in places:
            rows = slice(*cut.span(part)) if len(places) > 1 else slice(None)
            by_call[part][place] = tensor[rows].clone()
    return [template.filled(each) for each in by_call]
