"""Calls of one denoiser by several requests, run as one call of all their samples and taken apart again.

Nothing tells which inputs go by sample. It is found as for ``cfg``: the joined call is cut in all likely ways, and each
is tried with other values for the samples of one request, which must change nothing of another's result.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from xdit_compile.capture.cutting import Call as Inputs
from xdit_compile.capture.cutting import Cut, Made, Path, counts_of, joined, pieces_of, ways_to_cut
from xdit_compile.distributed.agreement import Agreement
from xdit_compile.ir.digest import digest, digest_tensors
from xdit_compile.ir.results import Template, tensors_of
from xdit_compile.runtime.verify.independence import Bound, Independent, alike, independent, made

from .gate import Call

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


Known = dict[str, Joint | None]
"""How calls join, by digests of their forms; None where they do not."""


class Joiner:
    """Runs calls, several as one where that gives each what it would get alone.

    Every rank is given the same calls in the same order, so what is tried is the same on all of them.

    Args:
        agreement: the talk among the ranks.
        most: calls that may run as one.
        known: what was tried before, by digests of forms; added to.
    """

    def __init__(self, agreement: Agreement, most: int, known: Known):
        self._agreement, self._most, self._joints = agreement, most, known

    def key(self, call: Call) -> str:
        """What calls that may join have in common; another one for each that may not."""
        form = _form(call)
        if self._most == 1 or (joint := self._joints.get(form, _UNTRIED)) is None:
            return f"{form} {id(call):x} alone"
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
            return [call.gate.run(*call.args, **call.kwargs) for call in calls]
        return self._joined(joint, calls)

    def _try(self, form: str, calls: Sequence[Call]) -> None:
        """Find out how calls of a form join; where they could not be tried, another time may show it."""
        trial = _Trial(calls, self._agreement)
        for samples in counts_of(trial.single[0], [tensor.shape for tensor in trial.single[1]]):
            for way in _ways(calls[0], samples):
                entries = trial.held(way, samples)
                if entries is not None:
                    self._joints[form] = Joint(entries, samples, trial.single)
                    return
        if trial.tried:
            self._joints[form] = None

    def _joined(self, joint: Joint, calls: Sequence[Call]) -> list[Any]:
        count = next((count for count in COUNTS if count >= len(calls)), len(calls))
        filled = [*calls, *[calls[-1]] * (min(count, self._most) - len(calls))]
        args, kwargs = _concatenated(filled, joint.entries)
        result = calls[0].gate.run(*args, **kwargs)
        cut = Cut(joint.samples * len(filled), len(filled), joint.entries)
        return _apart(result, joint, cut)[: len(calls)]


class _Trial:
    """Tries by the module itself, on every rank alike, whether two calls join.

    Attributes:
        single: the form of one call's result.
        tried: whether anything was.
    """

    def __init__(self, calls: Sequence[Call], agreement: Agreement):
        self._calls, self._agreement = calls, agreement
        runner = calls[0].gate.runner
        self._forward = runner if runner.weights.partial else runner.by_itself
        self._alone = [made(self._forward, (call.args, call.kwargs)) for call in calls]
        self.single = (self._alone[0][0], [tensor.to("meta") for tensor in self._alone[0][1]])
        self.tried = False

    def held(self, entries: frozenset[Path], samples: int) -> frozenset[Path] | None:
        """Which of some inputs go by sample; None where the calls cannot join so."""
        while entries and len({_others(call, entries) for call in self._calls}) == 1:
            self.tried = True
            fewer = self._fewer(entries, samples)
            if fewer is None or fewer == entries:
                return fewer
            entries = fewer
        return None

    def _fewer(self, entries: frozenset[Path], samples: int) -> frozenset[Path] | None:
        """Those that still seem to go by sample after a trial; the same on all ranks."""
        args, kwargs = _concatenated(self._calls, entries)
        count = len(self._calls)
        verdict: Independent | Bound = Bound("gives other results together than alone")
        if self._gives_the_same(args, kwargs, entries, samples):
            module = self._calls[0].gate.module
            verdict = independent(module, self._forward, args, kwargs, [count], [samples * count])
        kept = verdict.cut.entries if isinstance(verdict, Independent) else None
        if self._agreement.any("a trial of joined calls", kept is None):
            return None
        return kept

    def _gives_the_same(self, args: tuple, kwargs: dict[str, Any], entries: frozenset[Path], samples: int) -> bool:
        count = len(self._calls)
        try:
            together = made(self._forward, (args, kwargs))
        except Exception:  # noqa: BLE001 - any refusal of the module's own code
            return False
        pieces = pieces_of(together, [self.single] * count, Cut(samples * count, count, entries))
        if pieces is None:
            return False
        return alike(together[1], joined(pieces, [tensors for _, tensors in self._alone]))


def _ways(call: Call, samples: int) -> Iterator[frozenset[Path]]:
    """Inputs that may go by sample: likelier guesses first, then those without lists, then those without one input."""
    inputs = (call.args, call.kwargs)
    ways = [way.entries for way in ways_to_cut(inputs, samples, 1)]
    tensors = [frozenset(path for path in way if isinstance(_at(inputs, path), torch.Tensor)) for way in ways]
    fewer = [way - {path} for way in [*ways, *tensors] for path in sorted(way, key=str)]
    yield from dict.fromkeys([*ways, *tensors, *fewer])


def _at(inputs: Any, path: Path) -> Any:
    for key in path:
        inputs = inputs[key]
    return inputs


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
    whole = iter([_end_to_end(values) for values in zip(*by_call, strict=True)])
    return Cut(1, 1, entries).mapped((calls[0].args, calls[0].kwargs), lambda value: next(whole))


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
