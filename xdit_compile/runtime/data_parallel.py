"""Shares the batch of calls whose graph has no axis for it: each rank runs a call of some of the samples."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from xdit_compile.capture.cutting import Leaf, counts_of, joined
from xdit_compile.capture.state.containers import RESULT
from xdit_compile.compiler import Analysis, analyse
from xdit_compile.distributed.agreement import Agreement
from xdit_compile.distributed.mesh import Mesh
from xdit_compile.ir.digest import digest, digest_program
from xdit_compile.ir.program import Guard, Program
from xdit_compile.passes.choose.batch import choose_joined_batch
from xdit_compile.passes.choose.units import choose_within_batch
from xdit_compile.plan import Plan
from xdit_compile.plan.methods import BATCH, DATA, MEMBERS
from xdit_compile.runtime.verify.independence import Bound, Independent, few, independent

from .cfg_branches import exchanged


@dataclasses.dataclass(frozen=True, eq=False)
class SharedCall:
    """A call of which this rank runs a part.

    Args:
        name: which ranks share it.
        whole: the program of the whole call, which nobody runs.
        found: how it falls into parts.
        inputs: this rank's part of the flat inputs.
        group: role of the ranks that share it.
        guards: of all parts, by the positions of the whole call.
    """

    name: str
    whole: Program
    found: Independent
    inputs: tuple[Leaf, ...]
    group: str
    guards: tuple[Guard, ...]

    def taken(self, leaves: Sequence[Any]) -> list[Any]:
        """The flat inputs of this rank's part."""
        return [leaf.of(leaves) for leaf in self.inputs]

    def gathered(self, mine: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """The tensors of the whole result from those of this rank's part."""
        parts = exchanged(mine, self.found.likes, self.group, mine[0].device)
        return tuple(joined(self.found.pieces, parts))


@dataclasses.dataclass(frozen=True)
class Batch:
    """How the batch of a call is shared.

    Args:
        over: which ranks share it: `BATCH`, `DATA` or none.
        shared: the whole call, where a rank runs a part of it.
        unshared: why ranks do not all have a part of it, and how many samples it seems to have; None where they do.
    """

    over: str
    shared: SharedCall | None = None
    unshared: Bound | None = None

    @classmethod
    def of(cls, analysis: Analysis, shared: SharedCall | None = None, unshared: Bound | None = None) -> Batch:
        """How the batch of what a rank runs is shared."""
        names = [name for name in (BATCH, DATA) if analysis.units.get(name)]
        return cls(shared.name if shared is not None else next(iter(names), ""), shared, unshared)


class Batches:
    """Says how ranks share the batch of calls.

    Args:
        plan, mesh: this rank's place.
        agreement: the talk among all ranks.
        by_trial: whether a call may be cut after a trial, or taken apart and joined again, where its graph names no
            batch.
    """

    def __init__(self, plan: Plan, mesh: Mesh, agreement: Agreement, by_trial: bool):
        self._plan, self._mesh, self._agreement, self._by_trial = plan, mesh, agreement, by_trial

    def of(
        self, module: nn.Module, forward: Callable[..., Any], analysis: Analysis, call: tuple[tuple, dict],
        partial: bool,
    ) -> tuple[Analysis, Batch]:  # fmt: skip
        """What a rank runs, and how a call is shared; all ranks say the same, and have agreed on the call before.

        Args:
            partial: whether weights are not all here, or the memory for them to be used, so that the module cannot be
                tried.
        """
        names = {name: self._mesh.size(MEMBERS[name]) for name in (BATCH, DATA)}
        if analysis.units.get(BATCH) or names[BATCH] == 1:
            return analysis, Batch.of(analysis)
        counts = _counts(analysis.program)
        if analysis.units.get(DATA):
            return analysis, Batch.of(analysis, unshared=Bound(few(counts[0], names[BATCH]), counts[0]))
        parts = [count for count in dict.fromkeys(names.values()) if count > 1]
        verdict = self._tried(module, forward, call, parts, counts, partial, analysis.program.outcome.form.changes)
        if isinstance(verdict, Bound):
            joined_analysis, unshared = self._joined(analysis, verdict)
            return joined_analysis, Batch.of(joined_analysis, unshared=unshared)
        name = next(name for name, count in names.items() if count == verdict.cut.parts)
        part_analysis, shared = self._cut(module, forward, analysis, call, verdict, name)
        unshared = None if name == BATCH else Bound(few(verdict.cut.samples, names[BATCH]))
        return part_analysis, Batch.of(part_analysis, shared, unshared)

    def _tried(
        self, module: nn.Module, forward: Callable[..., Any], call: tuple[tuple, dict], parts: list[int],
        counts: list[int], partial: bool, changes: bool,
    ) -> Independent | Bound:  # fmt: skip
        """What a trial of the module says, if every rank's says so."""
        if changes:
            return Bound("changes what it is given", counts[0])
        if max(counts) < min(parts):
            return Bound(few(counts[0], min(parts)), counts[0])
        if not self._by_trial:
            return Bound("has no batch that its graph names, which pipefusion and distrifusion need", counts[0])
        if not self._plan.verify:
            return Bound("may be cut after a trial alone, which verify=False forbids", counts[0])
        if self._agreement.any("whole weights", partial):
            why = "may be cut after a trial alone, for which not all weights are here, or too little memory is"
            return Bound(why, counts[0])
        verdict = independent(module, forward, *call, parts, counts)
        if self._agreement.any("a trial of its batch", isinstance(verdict, Bound)) and not isinstance(verdict, Bound):
            return Bound("mixes its samples on another rank", verdict.cut.samples)
        return verdict

    def _joined(self, analysis: Analysis, bound: Bound) -> tuple[Analysis, Bound | None]:
        """A batch that the graph takes apart, where sharing it nevertheless is worth it."""
        if not self._by_trial:
            return analysis, bound
        units = choose_joined_batch(analysis.inference, self._plan)
        joined = dataclasses.replace(analysis, units={**analysis.units, **units})
        return joined, None if units[BATCH] else bound

    def _cut(
        self, module: nn.Module, forward: Callable[..., Any], analysis: Analysis, call: tuple[tuple, dict],
        division: Independent, name: str,
    ) -> tuple[Analysis, SharedCall]:  # fmt: skip
        here, spec = self._mesh.index(MEMBERS[name]), pytree.tree_structure(call)
        args, kwargs = division.cut.part(call, here)
        part_analysis = analyse(module, self._plan, args, kwargs, forward=forward, choose=choose_within_batch)
        inputs = division.cut.leaves(spec, here)
        guarded = self._agreed(
            here, part_analysis, [inputs[guard.position].position for guard in part_analysis.program.guards]
        )
        leaves = pytree.tree_leaves(call)
        guards = tuple(Guard(position, leaves[position].detach().clone()) for position in guarded)
        group = self._mesh.group(MEMBERS[name])
        return part_analysis, SharedCall(
            name, analysis.program, division, inputs, group, (*analysis.program.guards, *guards)
        )

    def _agreed(self, here: int, part_analysis: Analysis, guarded: Sequence[int]) -> list[int]:
        """Which inputs any part has baked in, once ranks of one part are seen to have the same graph.

        Raises:
            AgreementError: they have not.
        """
        graph = digest([digest_program(part_analysis.program), part_analysis.units])
        said = self._agreement.exchange("a part of its batch", [here, graph, list(guarded)])
        for rank, (theirs, other, _) in said.items():
            if theirs == here and other != graph:
                raise self._agreement.called_otherwise(rank, "graph")
        return sorted({position for each in (guarded, *(other for _, _, other in said.values())) for position in each})


def _counts(program: Program) -> list[int]:
    """How many samples a call may be of, by the forms of its result."""
    (output,) = program.root.graph.find_nodes(op="output")
    return counts_of(program.outcome.inner(RESULT), [leaf.meta["val"].shape for leaf in output.args[0]]) or [1]
