"""Runs a denoiser as a pipeline of stages through which patches flow (PipeFusion, arXiv:2405.14430).

The first steps of a generation compute all tokens at once, one stage after the other. Every later call answers at once:
its result comes in patches, which the first stage gets from the last as they are done, so that the next step begins
before this one has ended.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from xdit_compile.backends.sites import Sites
from xdit_compile.capture.interpret import assemble, bind
from xdit_compile.capture.state.containers import Outcome
from xdit_compile.capture.state.signature import Signature
from xdit_compile.compiler import Analysis
from xdit_compile.distributed.devices import finish
from xdit_compile.ir.patch_layout import PatchLayout
from xdit_compile.ir.program import Program
from xdit_compile.passes.stages.assign_stages import Stage
from xdit_compile.plan.methods import BATCH
from xdit_compile.runtime.cfg_branches import Call, alone
from xdit_compile.runtime.compiled_call import CompiledCall
from xdit_compile.runtime.generation import BranchState
from xdit_compile.runtime.runner import Runner, device_of
from xdit_compile.runtime.stored.stored_call import StoredCall
from xdit_compile.runtime.tensors.patched_tensor import Part, PatchedTensor, whole_of

from .cfg_pipelines import CfgPipelines
from .flow import Flow, Kept, stages_of
from .stage_channel import Incoming, Pipe


class _Drains:
    """Says once a generation what it costs that something between two steps needs all patches."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._generation, self._said = 0, False

    def took(self, begin: float) -> None:
        """What began then is over, when the device is done; it is waited for until the cost was said."""
        if not self._said:
            finish()
        self.seconds += time.perf_counter() - begin

    def between(self, generation: int) -> None:
        """Another call of a generation, by its number, begins."""
        if generation != self._generation:
            self._generation, self._said = generation, False
        elif self.seconds and not self._said:
            self._said = True
            warnings.warn(
                f"all patches were read between two steps, which waited {self.seconds:.2f} s for the whole pipeline: "
                "a callback that reads latents does that, or a scheduler that needs all of them",
                stacklevel=2,
            )
        self.seconds = 0.0


class PipelineRunner(Runner):
    """Called in place of ``module.forward``; results come in patches once the warm-up is over."""

    compares_later = False  # stages hold their own weights alone
    cuts_calls = False

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.generation = self.session.generation
        self.collected = 0
        self._drains = _Drains()
        self.taken: list[Program] = []
        self.places: dict[str, int] = {}
        self.cfg_pipelines = CfgPipelines(self.mesh)
        self.stage, self.last = self.mesh.coordinate("pipefusion"), self.mesh.size("pipefusion") - 1
        self.pipe = Pipe(self.mesh) if self.last else None
        self.stages = self.mesh.peers("pipefusion")
        self.session.after_failure(self._reset)

    def _reset(self) -> None:
        self.cfg_pipelines.reset()
        if self.pipe is not None:
            self.pipe.reset()

    def _run(self, args: tuple, kwargs: dict) -> Outcome:
        flow, leaves = self._known(args, kwargs)
        assert isinstance(flow, Flow)
        device = device_of(leaves)
        branch = self.generation.branch(self, flow, flow.constants(leaves), lambda: flow.states(device))
        branch.enter(tuple(leaves[at] for at in flow.pipeline.varying))
        fresh = self.generation.waits(branch)
        if self.cfg_pipelines.count > 1 and self.generation.active and flow.over != BATCH:
            return assemble(flow.program, tuple(self._on_one_pipeline(flow, leaves, branch, fresh)))
        tensors = self._at_once(flow, leaves, branch) if fresh else self._in_patches(flow, leaves, branch)
        return assemble(flow.program, tuple(tensors))

    def _on_one_pipeline(self, flow: Flow, leaves: list[Any], branch: BranchState, fresh: bool) -> list[PatchedTensor]:
        """A branch of guidance that one pipeline computes, while the others compute theirs; results in patches on all.

        Raises:
            XditCompileError: the generation has no other branch.
        """
        if branch.steps > 1 and self.generation.branches(self) == 1:
            unshared = None if flow.batch is None else flow.batch.unshared
            raise alone(self.plan.cfg, Call(self.module, self.name, leaves, unshared))
        self.cfg_pipelines.turn()
        given = [part for leaf in leaves if isinstance(leaf, PatchedTensor) for part in leaf.parts]
        branch.settle(tuple(part for part in given if part.here))
        device, cfg_rank = device_of(leaves), branch.index % self.cfg_pipelines.count
        if cfg_rank != self.cfg_pipelines.here:
            return self._patched(flow, [self._taken(flow, patch, device, cfg_rank) for patch in flow.patches], device)
        if not fresh:
            return self._in_patches(flow, leaves, branch, shared=True)
        outputs = self._stage_at_once(flow, leaves, branch)
        done: list[Sequence[torch.Tensor]] = [()] * len(flow.patches)
        if self.stage == self.last:
            done = [
                [layout.take(each, patch) for each, layout in zip(outputs, flow.pipeline.results, strict=True)]
                for patch in flow.patches
            ]
            for results in done:
                self._give(results, shared=True)
        return self._patched(flow, self._elsewhere(flow, device) or _here(done), device)

    def _prepare(self, key: Signature, args: tuple, kwargs: dict, leaves: list[Any]) -> CompiledCall:
        args, kwargs = pytree.tree_map(whole_of, (args, kwargs))
        return super()._prepare(key, args, kwargs, [whole_of(leaf) for leaf in leaves])

    def _placed(self, analysis: Analysis, device: torch.device) -> CompiledCall:
        state = self._compiled(analysis, device, places=self.places)
        analysis, pipeline = state.analysis, state.stages
        assert pipeline is not None
        if not any(program.parameters() for program in pipeline.programs):
            warnings.warn(
                f"stage {self.stage} of {self.last + 1} holds no parameters, so that other ranks hold them all; "
                "use fewer stages, or say with stage_layers which blocks each has",
                stacklevel=2,
            )
        common, runs = state.runs["common"], [run for name, run in state.runs.items() if name != "common"]
        stages = pipeline.full.program, runs[0], pipeline, common, tuple(runs)
        return Flow(lambda: analysis, *stages, dict(self.places))

    def _restored(
        self, stored: StoredCall, analysed: Callable[[], Analysis], device: torch.device
    ) -> CompiledCall:  # fmt: skip
        self.places.update(stored.facts["places"])
        pipeline = stages_of(stored.programs, stored.facts)
        full, common, *patches = (self._run_of(each, device) for each in pipeline.programs)
        return Flow(analysed, pipeline.full.program, full, pipeline, common, (full, *patches), dict(self.places))

    @property
    def _besides(self) -> list[Any]:
        return [*super()._besides, sorted(self.places.items())]

    def _can_compare(self, leaves: list[Any]) -> bool:
        return not any(isinstance(leaf, PatchedTensor) for leaf in leaves)

    def refresh(self) -> None:
        super().refresh()
        self.taken.clear()

    def _release(self, compiled_call: CompiledCall) -> None:
        self.taken += compiled_call.programs
        self.weights.release(self.taken)
        self.weights.release_others(self.taken)

    def _found(self, compiled_call: CompiledCall, leaves: list[Any]) -> Iterator[tuple[torch.Tensor, ...]]:
        """All tokens at once, and patch by patch with what that left: the same, because the step is."""
        assert isinstance(compiled_call, Flow)
        branch = BranchState(lambda: compiled_call.states(device_of(leaves)))
        self._compile(compiled_call, leaves, branch)
        yield tuple(self._at_once(compiled_call, leaves, branch))
        yield tuple(map(whole_of, self._in_patches(compiled_call, leaves, branch)))
        self._drains.seconds = 0.0

    def _compile(self, flow: Flow, leaves: list[Any], branch: BranchState) -> None:
        """Run every program of this stage once on nothing, so that all stages compile at the same time.

        Programs that are compiled already have nothing to gain.
        """
        if all(isinstance(run, Sites) for run in flow.runs):
            return
        device, common = device_of(leaves), flow.beside(self.weights, leaves, branch)
        for index, stage in enumerate((flow.pipeline.full, *flow.pipeline.patches)):
            patches: Kept = {k: layout.take(leaves[k], max(index - 1, 0)) for k, layout in flow.pipeline.inputs.items()}
            received = [torch.zeros_like(like, device=device) for like in stage.received]
            flow.runs[index](*bind(stage.program, self.weights, leaves, {**common, **patches}), *received)

    def _at_once(self, flow: Flow, leaves: list[Any], branch: BranchState) -> list[torch.Tensor]:
        """All tokens, stage after stage; the results on every rank."""
        results, device = self._stage_at_once(flow, leaves, branch), device_of(leaves)
        if self.pipe is None:
            return list(results)
        if self.stage < self.last:
            pairs = zip(flow.pipeline.results, flow.likes(0), strict=True)
            results = [layout.empty(like, device) for layout, like in pairs]
        return [self.pipe.broadcast(tensor, self.last) for tensor in results]

    def _stage_at_once(self, flow: Flow, leaves: list[Any], branch: BranchState) -> Sequence[torch.Tensor]:
        """This stage of all tokens; the last one has the results."""
        leaves = [whole_of(leaf) for leaf in leaves]
        device, stage = device_of(leaves), flow.pipeline.full
        self._turn()
        received: Sequence[torch.Tensor] = ()
        if self.pipe is not None and self.stage:
            received = self.pipe.receive(stage.received, device, self.stages[self.stage - 1]).wait()
        outputs: Sequence[torch.Tensor] = flow.runs[0](
            *bind(stage.program, self.weights, leaves, branch.states), *received
        )
        if self.pipe is not None and self.stage < self.last:
            self.pipe.send(outputs, self.stages[self.stage + 1])
        return outputs

    def _in_patches(
        self, flow: Flow, leaves: list[Any], branch: BranchState, shared: bool = False
    ) -> list[PatchedTensor]:  # fmt: skip
        """Patch after patch, with the keys and values that other patches left; ``shared`` with other pipelines."""
        self._drains.between(self.generation.number)
        self._turn()
        device = device_of(leaves)
        inputs = {
            position: self._patches(leaves[position], layout) for position, layout in flow.pipeline.inputs.items()
        }
        incoming = [self._asked(stage, device) for stage in flow.pipeline.patches]
        parts = self._elsewhere(flow, device)
        common = flow.beside(self.weights, leaves, branch)
        done: list[Sequence[torch.Tensor]] = []
        for patch, stage in enumerate(flow.pipeline.patches):
            wanted = {int(each.target) for each in stage.program.inputs if each.kind == "patch"}
            kept = dict(common)
            kept.update((target, inputs[target][patch].value()) for target in wanted)
            tensors = bind(stage.program, self.weights, leaves, kept)
            outputs = flow.runs[patch + 1](*tensors, *incoming[patch]())
            if self.pipe is not None and self.stage < self.last:
                self.pipe.send(outputs, self.stages[self.stage + 1])
            else:
                self._give(outputs, shared)
            done.append(outputs)
        return self._patched(flow, parts or _here(done), device)

    def _give(self, results: Sequence[torch.Tensor], shared: bool) -> None:
        """Send the results of a patch from the last stage to where they are needed."""
        if self.pipe is not None:
            self.pipe.send(results, self.stages[0])
        if shared:
            self.cfg_pipelines.give(results)

    def _patched(self, flow: Flow, parts: list[list[Part]], device: torch.device) -> list[PatchedTensor]:
        return [
            PatchedTensor([part[k] for part in parts], layout, device, self._collect)
            for k, layout in enumerate(flow.pipeline.results)
        ]

    def _turn(self) -> None:
        if self.pipe is not None:
            self.pipe.turn()

    def _asked(self, stage: Stage, device: torch.device) -> Callable[[], Sequence[torch.Tensor]]:
        if self.pipe is None or not self.stage:
            return tuple
        return self.pipe.receive(stage.received, device, self.stages[self.stage - 1]).wait

    def _elsewhere(self, flow: Flow, device: torch.device) -> list[list[Part]]:
        """The results patch by patch where the last stage is another: on their way to the first, to none between.

        They are asked for before anything is computed, so that the last stage can send each as it is done.
        """
        if self.pipe is None or self.stage == self.last:
            return []
        if self.stage:
            return [[Part(like) for like in flow.likes(patch)] for patch in flow.patches]
        source = self.stages[self.last]
        return [
            _coming(self.pipe.receive(flow.likes(patch), device, source), flow.likes(patch)) for patch in flow.patches
        ]

    def _taken(self, flow: Flow, patch: int, device: torch.device, cfg_rank: int) -> list[Part]:
        """The results of a patch that another pipeline computes: on their way to the first and last stage here."""
        if self.stage in (0, self.last):
            return _coming(self.cfg_pipelines.take(flow.likes(patch), device, cfg_rank), flow.likes(patch))
        return [Part(like) for like in flow.likes(patch)]

    def _patches(self, leaf: torch.Tensor, layout: PatchLayout) -> list[Part]:
        """An input patch by patch."""
        if isinstance(leaf, PatchedTensor) and leaf.patch_layout == layout:
            return leaf.parts
        whole = whole_of(leaf)
        return [Part.of(layout.take(whole, patch)) for patch in range(len(layout.positions))]

    def _collect(self, tensor: PatchedTensor) -> torch.Tensor:
        """All patches on every rank, from the last stage, which computes every one."""
        self.collected += 1
        begin = time.perf_counter()
        self.session.agreement.exchange("a read of all patches", None)
        if self.pipe is None or self.stage == self.last:
            whole = tensor.patch_layout.join([part.value() for part in tensor.parts])
        else:
            whole = tensor.patch_layout.empty(tensor.parts[0].like, tensor.device)
        whole = whole if self.pipe is None else self.pipe.broadcast(whole, self.last)
        self._drains.took(begin)
        return whole


def _here(done: Sequence[Sequence[torch.Tensor]]) -> list[list[Part]]:
    return [[Part.of(tensor) for tensor in results] for results in done]


def _coming(incoming: Incoming, likes: Sequence[torch.Tensor]) -> list[Part]:
    return [Part(like, make=_item(incoming, k)) for k, like in enumerate(likes)]


def _item(incoming: Incoming, index: int) -> Callable[[], torch.Tensor]:
    return lambda: incoming.wait()[index]
