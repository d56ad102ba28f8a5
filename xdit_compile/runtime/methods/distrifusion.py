"""Runs a denoiser on ranks that share its tokens and do not wait for one another (DistriFusion, arXiv:2402.19481).

The first steps of a generation exchange keys, values and rows before they are used. Later ones take what other ranks
sent during the step before, and send their own while they go on.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch.utils import _pytree as pytree

from xdit_compile.capture.interpret import bind, run_outcome
from xdit_compile.compiler import Analysis
from xdit_compile.ir.peak_memory import if_room
from xdit_compile.ir.precision import precision_for
from xdit_compile.ir.program import Program
from xdit_compile.passes.stages.choose_patches import stepping
from xdit_compile.plan.methods import PATCH
from xdit_compile.runtime.compiled_call import CompiledCall
from xdit_compile.runtime.generation import BranchState, States
from xdit_compile.runtime.runner import Computing, Runner, device_of
from xdit_compile.runtime.stored.stored_call import StoredCall
from xdit_compile.weights.weights import Weights

from .stepped_call import SteppedCall

Run = Callable[..., tuple[Any, ...]]


@dataclasses.dataclass(frozen=True, eq=False)
class StaleCall(SteppedCall):
    """What one signature runs on this rank: with exchanges that it waits for, and with those of the step before.

    Args:
        stale: the program that waits for nothing, and ``run_stale`` what runs it.
        outgoing: names of what it sends, after its results.
        may_step: positions among the flat inputs of those that may change from step to step, and ``varying`` of those
            among them that do.
    """

    stale: Program
    run_stale: Run
    outgoing: tuple[str, ...]
    may_step: frozenset[int]
    varying: tuple[int, ...]

    @property
    def parts(self) -> Mapping[str, tuple[Program, Run]]:
        return {"waiting": (self.program, self.run), "stale": (self.stale, self.run_stale)}

    @property
    def facts(self) -> dict[str, Any]:
        return {"outgoing": self.outgoing, "may_step": tuple(sorted(self.may_step)), "varying": self.varying}

    @property
    def stepping(self) -> frozenset[int]:
        return self.may_step

    @property
    def kept(self) -> Mapping[str | int, torch.Tensor]:
        placeholders = self.stale.root.graph.find_nodes(op="placeholder")
        pairs = zip(self.stale.inputs, (node.meta["val"] for node in placeholders), strict=True)
        return {spec.target: like for spec, like in pairs if spec.kind in ("state", "incoming")}

    def at_once(self, weights: Weights, leaves: list[Any], states: States) -> tuple[torch.Tensor, ...]:
        """A call that waits for other ranks."""
        return self.run(*bind(self.program, weights, leaves, states))

    def on(self, weights: Weights, leaves: list[Any], states: States) -> tuple[torch.Tensor, ...]:
        """A call that goes on with what other ranks left, and leaves its own."""
        outputs = self.run_stale(*bind(self.stale, weights, leaves, states))
        results = len(outputs) - len(self.outgoing)
        states.update(zip(self.outgoing, outputs[results:], strict=True))
        return outputs[:results]


class StaleRunner(Runner):
    """Called in place of ``module.forward``; waits for other ranks in the first steps of a generation alone."""

    cuts_calls = False

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.generation = self.session.generation

    def _computing(self, compiled_call: CompiledCall, leaves: list[Any]) -> Computing:
        assert isinstance(compiled_call, StaleCall)
        device = device_of(leaves)
        branch = self.generation.branch(
            self, compiled_call, compiled_call.constants(leaves), lambda: compiled_call.states(device)
        )
        branch.enter(tuple(leaves[at] for at in compiled_call.varying))
        way = compiled_call.at_once if self.generation.waits(branch) else compiled_call.on
        return lambda inputs: way(self.weights, inputs, branch.states)

    def _compared(self, compiled_call: CompiledCall, compute: Computing, leaves: list[Any]) -> Computing:
        """What other ranks left is a step old: in the place of its result the unsplit program's is compared."""
        if self._is_compared(compiled_call):
            args, kwargs = pytree.tree_unflatten(leaves, compiled_call.program.in_spec)
            with precision_for(compiled_call.made):
                expected = self._expected(compiled_call, leaves)
                unsplit = functools.partial(run_outcome, compiled_call.analysis.program, self.module, args, kwargs)
                actual = None if expected is None else if_room(unsplit, device_of(leaves))
            self._verify_later(compiled_call, leaves, actual, expected if actual is not None else None)
        return compute

    def _placed(self, analysis: Analysis, device: torch.device) -> CompiledCall:
        state = self._compiled(analysis, device)
        waiting, stale = (state.partitioned[way] for way in ("waiting", "stale"))
        users = {spec.name: int(spec.target) for spec in analysis.program.inputs if spec.kind == "user"}
        some, varying = ([users[n] for n in names] for names in stepping(analysis.inference, analysis.units[PATCH]))
        ways = waiting.program, state.runs["waiting"], stale.program, state.runs["stale"]
        return StaleCall(lambda: state.analysis, *ways, stale.outgoing, frozenset(some), tuple(varying))

    def _restored(
        self, stored: StoredCall, analysed: Callable[[], Analysis], device: torch.device
    ) -> CompiledCall:  # fmt: skip
        waiting, stale = (stored.programs[way] for way in ("waiting", "stale"))
        ways = waiting, self._run_of(waiting, device), stale, self._run_of(stale, device)
        facts = stored.facts
        return StaleCall(analysed, *ways, facts["outgoing"], frozenset(facts["may_step"]), facts["varying"])

    def _found(self, compiled_call: CompiledCall, leaves: list[Any]) -> Iterator[tuple[torch.Tensor, ...]]:
        """Waiting for other ranks, going on with what that left, and with what this left: the same, the step is."""
        assert isinstance(compiled_call, StaleCall)
        branch = BranchState(lambda: compiled_call.states(device_of(leaves)))
        yield compiled_call.at_once(self.weights, leaves, branch.states)
        for _ in range(2):
            yield compiled_call.on(self.weights, leaves, branch.states)
        branch.finish()
