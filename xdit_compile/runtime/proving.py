"""Compares what runs in a module's place with the module itself; a smaller call where there is no memory for that."""

from __future__ import annotations

import dataclasses
import logging
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from xdit_compile.backends.base import Backend
from xdit_compile.backends.eager import Eager
from xdit_compile.capture.capture import first_line
from xdit_compile.capture.interpret import assemble
from xdit_compile.capture.state.containers import Outcome
from xdit_compile.capture.state.in_place import as_it_was
from xdit_compile.capture.state.module_snapshot import same_random_numbers
from xdit_compile.compiler import Analysis, analyse
from xdit_compile.distributed.agreement import Agreement
from xdit_compile.distributed.mesh import Mesh
from xdit_compile.errors import StateError, VerificationError
from xdit_compile.ir.digest import digest, digest_program
from xdit_compile.ir.peak_memory import if_room
from xdit_compile.ir.precision import precision_for
from xdit_compile.kernels.registry import exactly
from xdit_compile.passes.axes.infer import Inference
from xdit_compile.passes.local.layout import Chosen
from xdit_compile.plan import Plan
from xdit_compile.plan.plan import INEXACT_ATTENTIONS
from xdit_compile.runtime.verify.inexact import Moved, moved, refuse_far
from xdit_compile.runtime.verify.room import has_room
from xdit_compile.runtime.verify.smaller import smaller
from xdit_compile.runtime.verify.verification import Difference, Slack, narrow_rounding, verify, verify_later
from xdit_compile.weights.weights import Weights

from .compiled_call import CompiledCall
from .data_parallel import Batch
from .stored.keeper import Keeper

logger = logging.getLogger("xdit_compile")


class Proving:
    """The part of a runner that compares; what ranks go on to after it, all have said."""

    module: nn.Module
    name: str
    weights: Weights
    plan: Plan
    mesh: Mesh
    backend: Backend
    _agreement: Agreement
    _keeper: Keeper
    _trace_only: bool
    _was_compared: bool
    """Whether the latest call that was made was compared with the module."""
    _choose: Callable[[Inference, Plan], Chosen]
    _own_outcome: Callable[[tuple, dict], Outcome]
    _release_all: Callable[[], None]
    _placed: Callable[[Analysis, torch.device], CompiledCall]
    _found: Callable[[CompiledCall, list[Any]], Iterator[tuple[torch.Tensor, ...]]]

    def _has_room(self, computation: Callable[..., Any], args: tuple, kwargs: dict) -> bool:
        """Whether every rank has the memory for the module itself to run, as far as can be known."""
        device = device_of(pytree.tree_leaves((args, kwargs)))
        with as_it_was(self.module):
            enough = self.weights.partial or has_room(self.module, computation, args, kwargs, device)
        return not self._agreement.any("room for the module itself", not enough)

    def _proven(self, compiled_call: CompiledCall, computation: Callable[..., Any], leaves: list[Any]) -> CompiledCall:
        """What runs a call, compared with the module itself, or of a smaller call where there is no memory for that."""
        rewritten = (
            self.mesh.world_size > 1 or self.plan.patch_count > 1 or compiled_call.stored is not None
            or not isinstance(self.backend, Eager) or self.plan.attention != "auto"
        )  # fmt: skip
        self._was_compared = False
        if not self.plan.verify or self._trace_only:
            return compiled_call
        if compiled_call.room and not rewritten:
            self._was_compared = not self.weights.partial
            return compiled_call
        if self._agreement.any("whole weights", self.weights.partial):
            return compiled_call
        if compiled_call.room and self._verify(compiled_call, leaves):
            return compiled_call
        why = self._rehearsed(compiled_call, computation, leaves)
        if why:
            warnings.warn(
                f"the first call of {self.name} was not compared with the module itself, for which there is no memory "
                f"on a rank, nor was a smaller one: {why}; compare results at a smaller size yourself",
                stacklevel=2,
            )
        else:
            logger.info("of %s a smaller call was compared, for want of memory for the module itself", self.name)
        return dataclasses.replace(compiled_call, room=False)

    def _verify(self, compiled_call: CompiledCall, leaves: list[Any]) -> bool:
        """Compare a call with the module itself; False where a rank has not the memory to run that.

        Raises:
            VerificationError: on all ranks, where the results of one differ by more than rounding.
        """
        with precision_for(compiled_call.made):
            expected = self._expected(compiled_call, leaves)
            if self._agreement.any("what the module itself gives", expected is None):
                return False
            slack, wrong = self._slack(compiled_call, leaves), None
            with exactly():
                for actual in self._found(compiled_call, leaves):
                    try:
                        verify(assemble(compiled_call.whole, actual), expected, slack)
                    except VerificationError as error:
                        wrong = wrong or error
            if self._agreement.any("a wrong result", wrong is not None):
                raise wrong or VerificationError("another rank's result is not the unsplit one; it says how it differs")
            if expected is not None and self.plan.attention in INEXACT_ATTENTIONS:
                self._tell_inexact(compiled_call, leaves, expected)
        self._was_compared = True
        return True

    def _tell_inexact(self, compiled_call: CompiledCall, leaves: list[Any], expected: Outcome) -> None:
        """Say how far attention that is not exact moves the results of a call that is right with another.

        Raises:
            VerificationError: on all ranks, where it is farther than that explains.
        """
        farthest = Moved()
        for actual in self._found(compiled_call, leaves):
            farthest = farthest.or_more(moved(assemble(compiled_call.whole, actual), expected))
        if self._agreement.any("a result that is too far", not farthest.allowed):
            refuse_far(farthest, self.name, self.plan.attention)
            raise VerificationError("another rank's result is too far from the unsplit one; it says how far")
        if self.mesh.rank == 0:
            warnings.warn(
                f"attention={self.plan.attention!r} is not exact: it moves what {self.name} gives by {farthest}",
                stacklevel=2,
            )

    def _rehearsed(self, compiled_call: CompiledCall, computation: Callable[..., Any], leaves: list[Any]) -> str:
        """Compare a smaller call, uncompiled; why it could not be, where it could not."""
        if compiled_call.shared is not None:
            return "ranks run calls of other samples each"
        args, kwargs = pytree.tree_unflatten(leaves, compiled_call.whole.in_spec)
        call = smaller(compiled_call.analysis.inference, args, kwargs, self.mesh.world_size)
        if call is None:
            return "its inputs name no axis that could be shorter"
        small, why = self._small(computation, *call)
        if self._agreement.any("a smaller call", small is None) or small is None:
            return why or "another rank could not run it"
        graph = digest([digest_program(small.analysis.program), small.analysis.units])
        self._agreement.agree("its smaller graph", {"smaller graph": graph})
        return "" if self._verify(small, pytree.tree_leaves(call)) else "there is no memory for that either"

    def _small(self, computation: Callable[..., Any], args: tuple, kwargs: dict) -> tuple[CompiledCall | None, str]:
        """What runs a smaller call, uncompiled, or why the module does not take it.

        Raises:
            StateError: the module keeps something from call to call.
        """
        compiler, self.backend = self.backend, Eager()
        try:
            with as_it_was(self.module):
                analysis = analyse(self.module, self.plan, args, kwargs, forward=computation, choose=self._choose)
            small = self._placed(analysis, device_of(pytree.tree_leaves((args, kwargs))))
            return dataclasses.replace(small, batch=Batch.of(analysis)), ""
        except StateError:
            raise
        except Exception as error:  # noqa: BLE001 - any refusal of the module's own code
            return None, first_line(error)
        finally:
            self.backend = compiler

    def _expected(self, compiled_call: CompiledCall, leaves: list[Any]) -> Outcome | None:
        """What the module itself does with the inputs of a call, which stay as they are; None without the memory."""
        if compiled_call.whole.outcome.form.written:
            leaves = [leaf.clone() if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        args, kwargs = pytree.tree_unflatten(leaves, compiled_call.whole.in_spec)
        with same_random_numbers():
            return if_room(lambda: self._own_outcome(args, kwargs), device_of(leaves))

    def _verify_later(self, compiled_call: CompiledCall, leaves: list[Any], actual: Any, expected: Any) -> None:
        if expected is not None:
            if self.plan.attention in INEXACT_ATTENTIONS:
                refuse_far(moved(actual, expected), self.name, self.plan.attention)
            else:
                verify_later(actual, expected, self.name, self._slack(compiled_call, leaves))
            self._keeper.compared(compiled_call.ticket, leaves, device_of(leaves))
        self._release_all()

    def _slack(self, compiled_call: CompiledCall, leaves: list[Any]) -> Slack:
        args, kwargs = pytree.tree_unflatten(leaves, compiled_call.whole.in_spec)

        def rounding() -> Difference:
            return narrow_rounding(compiled_call.captured, self.module, args, kwargs)

        return lambda: if_room(rounding, device_of(leaves)) or Difference()


def device_of(leaves: list[Any]) -> torch.device:
    """Where the largest input lies; index lists that the passes made must lie there too."""
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    return max(tensors, key=torch.Tensor.numel).device if tensors else torch.device("cpu")
