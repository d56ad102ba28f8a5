"""Makes what runs a new call: out of what another process kept of one that was alike, or of the module itself."""

from __future__ import annotations

import abc
import dataclasses
import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch.utils import _pytree as pytree

from xdit_compile.capture.state.in_place import as_it_was
from xdit_compile.capture.state.signature import Signature, signature
from xdit_compile.capture.state.unsupported import moves_weights, refuse_draws, refuse_unsupported
from xdit_compile.compiler import Analysis, Compilation, analyse, compiled
from xdit_compile.errors import CaptureError, NoRoomError, VerificationError, one_line
from xdit_compile.ir.digest import digest, digest_program, digest_shapes
from xdit_compile.ir.program import Program
from xdit_compile.passes.fuse.timings import Timings
from xdit_compile.reports.dump import observers
from xdit_compile.runtime.verify.independence import Bound

from .cfg_branches import unshared_images
from .compiled_call import CompiledCall, Run
from .data_parallel import Batch, Batches
from .proving import Proving, device_of
from .session import Session
from .stored.keeper import APART, ROWS
from .stored.stored_call import StoredCall
from .unsplit import Changing, RunsWhole, Unsplit

logger = logging.getLogger("xdit_compile")


class Making(Proving):
    """The part of a runner that makes what runs a call; all ranks go through it in step."""

    session: Session
    unsplit: Unsplit
    _batches: Batches
    _changing: Changing
    _is_denoiser: bool
    _gather: bool
    _budget: int | None
    _settle: Callable[[CompiledCall], None]
    _timings: Callable[[torch.device], Timings]

    @property
    @abc.abstractmethod
    def _computation(self) -> Callable[..., Any]:
        """What a program is made of: the module's own forward, or another method of it."""

    def _prepare(self, key: Signature, args: tuple, kwargs: dict, leaves: list[Any]) -> CompiledCall:
        """What runs a new call: what was kept of one that was alike, or made of the module."""
        shapes = {"plan": digest([self.plan]), "input shape": digest_shapes(leaves)}
        self._agreement.agree("a new program", shapes)
        stored = self._find(args, kwargs, device_of(leaves))
        make = self._made if stored is None else functools.partial(self._remade, stored)
        try:
            compiled_call = make(key, args, kwargs, leaves)
            self._settle(compiled_call)
        finally:
            self._keeper.end()
        said = self._keeper.say(kept=compiled_call.stored is not None)
        return dataclasses.replace(compiled_call, said=said)

    def _recapturing(self, stored: StoredCall, args: tuple, kwargs: dict) -> Callable[[], Analysis]:
        """What finds out about a call of which nothing is known but its programs; it holds no input of the call."""
        guarded = {guard.position for program in stored.programs.values() for guard in program.guards}
        leaves, spec = pytree.tree_flatten((args, kwargs))
        light = [leaf if at in guarded else _without_memory(leaf) for at, leaf in enumerate(leaves)]

        def analysed() -> Analysis:
            args, kwargs = pytree.tree_unflatten(light, spec)
            with as_it_was(self.module):
                return analyse(
                    self.module, self.plan, args, kwargs, forward=self._computation, choose=self._choose, run=False
                )

        return analysed

    def prepare_ahead(self, args: tuple, kwargs: dict) -> bool:
        """Make and keep what runs a call, and run nothing; whether it was there already."""
        leaves = pytree.tree_leaves((args, kwargs))
        stored = self._find(args, kwargs, self._device(leaves))
        if stored is None:
            self._made(signature(self.module, args, kwargs), args, kwargs, leaves)
        return stored is not None

    def _device(self, leaves: list[Any]) -> torch.device:
        """Where a call with these flat inputs will run, which may be a device that is not there."""
        return self.session.ahead_for or device_of(leaves)

    def _find(self, args: tuple, kwargs: dict, device: torch.device) -> StoredCall | None:
        apart = (*APART, *ROWS) if self._is_denoiser else APART
        besides = [*self._besides, self._timings(device).digest]
        return self._keeper.find(args, kwargs, self.plan, besides, device, apart)

    @property
    def _in_background(self) -> bool:
        return self.plan.compile == "background"

    def _advance(self, compiled_call: CompiledCall, leaves: list[Any]) -> None:
        """Go on with what was compiled in the background, from the step on at which all ranks can; compared there."""
        pending = compiled_call.pending
        if pending is None or pending.done or not pending.advance(self._agreement.any):
            return
        self._keeper.say(kept=False)
        compares = self.plan.verify and compiled_call.room and self._can_compare(leaves)
        if compares and not self._agreement.any("whole weights", self.weights.partial):
            self._verify(compiled_call, leaves)

    def _can_compare(self, leaves: list[Any]) -> bool:
        """Whether the module itself can be given the flat inputs of a call."""
        return True

    @property
    def _besides(self) -> list[Any]:
        """What decides on the programs of a call besides the module, the call and the plan."""
        place = [self.mesh.rank, self.mesh.world_size, self.backend.name]
        kind = [type(self).__name__, self.name, self._choose.__name__, self._is_denoiser]
        return [*place, *kind, self._gather, self._budget, self._trace_only and not self._is_denoiser]

    def _made(self, key: Signature, args: tuple, kwargs: dict, leaves: list[Any]) -> CompiledCall:
        """What runs a call, made of the module, and kept for other processes."""
        computation, device = self._computation, self._device(leaves)
        analysis, room = self._analysed(key, computation, args, kwargs)
        self._agreement.agree("its graph", {"graph": digest([digest_program(analysis.program), analysis.units])})
        self._keeper.stage("passes")
        analysis, batch = self._shared(analysis, computation, args, kwargs, room)
        compiled_call = dataclasses.replace(self._placed(analysis, device), batch=batch, room=room)
        pending = self._keeper.compile(compiled_call.parts, leaves, device, None, self._in_background)
        self._keeper.stage("checking")
        compiled_call = self._proven(compiled_call, computation, leaves)
        verified = self._was_compared and pending is None
        self._keeper.keep(compiled_call, leaves, device, verified=verified, tried=self.plan.verify)
        return dataclasses.replace(compiled_call, ticket=self._keeper.ticket, pending=pending)

    def _remade(self, stored: StoredCall, key: Signature, args: tuple, kwargs: dict, leaves: list[Any]) -> CompiledCall:
        """What runs a call, made of what was kept; compared with the module where that was not done."""
        refuse_unsupported(self.module, self.name)
        self._changing.note(key)
        computation, device = self._computation, device_of(leaves)
        batch = Batch(stored.over, unshared=None if stored.unshared is None else Bound(*stored.unshared))
        analysed = self._recapturing(stored, args, kwargs)
        compiled_call = self._restored(stored, analysed, device)
        compiled_call = dataclasses.replace(compiled_call, batch=batch, stored=stored, ticket=self._keeper.ticket)
        pending = self._keeper.compile(compiled_call.parts, leaves, device, stored, self._in_background)
        compiled_call = dataclasses.replace(compiled_call, pending=pending)
        if stored.verified or not self.plan.verify or self._trace_only:
            return compiled_call
        self._keeper.stage("checking")
        room = self._has_room(computation, args, kwargs)
        try:
            compiled_call = self._proven(dataclasses.replace(compiled_call, room=room), computation, leaves)
        except VerificationError as error:
            logger.warning("what was kept of a call of %s is wrong and made anew: %s", self.name, one_line(error))
            if pending is not None:
                pending.stop()
            self._keeper.drop(leaves, device)
            return self._made(key, args, kwargs, leaves)
        if self._was_compared and pending is None:
            self._keeper.keep(compiled_call, leaves, device, verified=True)
        return compiled_call

    def _analysed(
        self, key: Signature, computation: Callable[..., Any], args: tuple, kwargs: dict
    ) -> tuple[Analysis, bool]:  # fmt: skip
        """The captured call, and whether every rank had the memory to run the module for that.

        Raises:
            RunsWhole: a rank cannot capture it, and the plan says what to do then.
        """
        runs = not self._trace_only and self._has_room(computation, args, kwargs)
        analysis, failed = self._attempt(key, computation, args, kwargs, runs)
        if runs and self._agreement.any("memory for the module itself", isinstance(failed, NoRoomError)):
            runs = False
            analysis, failed = self._attempt(key, computation, args, kwargs, runs)
        if self.plan.fallback == "unsplit" and self._agreement.any("a refused capture", failed is not None):
            gone = self.weights.partial and not moves_weights(self.module)
            if not self._agreement.any("whole weights", gone):
                self.unsplit.add(key, failed or CaptureError("another rank could not capture it"))
                raise RunsWhole
        if analysis is None:
            raise failed or CaptureError("not captured")
        return analysis, runs

    def _attempt(
        self, key: Signature, computation: Callable[..., Any], args: tuple, kwargs: dict, runs: bool
    ) -> tuple[Analysis | None, CaptureError | None]:  # fmt: skip
        """The captured call, or why there is none; without ``runs`` it is recorded and not compared."""
        try:
            refuse_unsupported(self.module, self.name)
            self._changing.note(key)
            with as_it_was(self.module):
                analysis = analyse(
                    self.module, self.plan, args, kwargs, forward=computation, check=self.plan.verify,
                    choose=self._choose, run=runs, observers=observers(self.name, self.mesh.rank),
                    watched=self._keeper.recording,
                )  # fmt: skip
            if self._is_denoiser and self.mesh.world_size > 1:
                refuse_draws(analysis.program)
        except CaptureError as error:
            return None, error
        return analysis, None

    def _shared(
        self, analysis: Analysis, computation: Callable[..., Any], args: tuple, kwargs: dict, room: bool
    ) -> tuple[Analysis, Batch]:  # fmt: skip
        """What a rank runs, and how ranks share the batch of a call.

        Raises:
            UsageError: there are data ranks, and they have none to share.
        """
        if not self._is_denoiser:
            return analysis, Batch.of(analysis)
        with as_it_was(self.module):
            analysis, batch = self._batches.of(
                self.module, computation, analysis, (args, kwargs), self.weights.partial or not room
            )
        if self.plan.data > 1 and not batch.over:
            raise unshared_images(self.plan.data, self.name, batch.unshared)
        return analysis, batch

    def _placed(self, analysis: Analysis, device: torch.device) -> CompiledCall:
        state = self._compiled(analysis, device)
        return CompiledCall(lambda: state.analysis, state.programs["call"], state.runs["call"])

    def _restored(
        self, stored: StoredCall, analysed: Callable[[], Analysis], device: torch.device
    ) -> CompiledCall:  # fmt: skip
        """What runs the programs that were kept of a call."""
        program = stored.programs["call"]
        return CompiledCall(analysed, program, self._run_of(program, device))

    def _run_of(self, program: Program, device: torch.device) -> Run:
        """What computes a program on a device."""
        return self.backend.compile(program.root.to(device))

    def _compiled(self, analysis: Analysis, device: torch.device, **wanted: Any) -> Compilation:
        """What the passes for this rank make of a call."""
        return compiled(
            analysis, self.plan, self.mesh, gather=self._gather, budget=self._budget, backend=self.backend,
            device=device, timings=self._timings(device), observers=observers(self.name, self.mesh.rank), **wanted,
        )  # fmt: skip


def _without_memory(leaf: Any) -> Any:
    """A tensor of the same form without values, which takes next to no memory; any other leaf as it is."""
    if not isinstance(leaf, torch.Tensor):
        return leaf
    return torch.zeros((), dtype=leaf.dtype, device=leaf.device).expand(leaf.shape)
