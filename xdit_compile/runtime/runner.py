"""Stands in for a module's forward: finds or makes the program for a call, and runs it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch.utils import _pytree as pytree

from xdit_compile.capture.interpret import assemble, bind
from xdit_compile.capture.state.containers import Outcome, leave, observed
from xdit_compile.capture.state.in_place import as_it_was, found_method, refuse_lost
from xdit_compile.capture.state.signature import Fingerprint, fingerprint, kept, signature
from xdit_compile.capture.state.unchanged import Watch
from xdit_compile.ir.digest import digest
from xdit_compile.ir.precision import precision_for
from xdit_compile.ir.results import replaced, tensors_of
from xdit_compile.passes.axes.infer import Inference
from xdit_compile.passes.choose.units import choose_units
from xdit_compile.passes.local.layout import Chosen
from xdit_compile.plan import Plan
from xdit_compile.plan.methods import BATCH
from xdit_compile.runtime.tensors.deferred_tensor import Deferred, values_of
from xdit_compile.runtime.verify.later_call import LaterCall
from xdit_compile.weights.weights import Gather, Weights

from .cfg_branches import Call
from .compiled_call import CompiledCall
from .data_parallel import Batches
from .making import Making
from .programs import Programs
from .proving import device_of
from .session import Session, Target
from .unsplit import Changing, RunsWhole, Unsplit

Computing = Callable[[list[Any]], tuple[torch.Tensor, ...]]
"""From the flat inputs of a call to the tensors of its result."""


class Runner(Making):
    """Called in place of ``module.forward``.

    A call whose signature is known runs at once; another is captured, partitioned, compiled and, with ``plan.verify``,
    compared with the module itself. Values of guards that changed make a new program too. Of more programs than
    ``plan.max_programs`` the one that was not used for the longest time is dropped.

    Args:
        weights: of the module.
        session: what the ranks share.
        name: what the module is called in messages.
        place: what graphs are made for, where that is not the session's own.
        computation: what to compute in place of the module's ``forward``: another method of it.
        choose: says what of a program is split.
        gather: whether results are made whole; without it each rank has its part of them.
        budget: bytes beside weights that this rank may take; convolutions run in strips where that takes it.
        trace_only: the module itself never runs, neither to be captured nor to be compared with, as its memory might
            not be there.
    """

    compares_later = True
    cuts_calls = True
    """Whether a rank may run a call of some of the samples in place of its part of the whole one."""

    def __init__(
        self,
        weights: Weights,
        session: Session,
        name: str = "module",
        *,
        place: Target | None = None,
        computation: Callable[..., Any] | None = None,
        choose: Callable[[Inference, Plan], Chosen] = choose_units,
        gather: bool = True,
        budget: int | None = None,
        trace_only: bool = False,
    ):
        self.weights, self.module, self.name = weights, weights.module, name
        self.session = session
        place = place or session.place
        self.plan, self.mesh, self.backend = place.plan, place.mesh, place.backend
        self._is_denoiser = place is session.place
        self._guided = self._is_denoiser and session.branches.active
        self._given = computation
        self._choose, self._gather, self._budget, self._trace_only = choose, gather, budget, trace_only
        self.calls: Programs[CompiledCall] = Programs(self.plan.max_programs)
        self.unsplit = Unsplit(name)
        self._compares = self.compares_later and self._is_denoiser and self.plan.verify
        self._unreleased: list[CompiledCall] = []
        self._changing = Changing()
        self._later = LaterCall()
        self._watch: Watch | None = None
        self._agreement = session.agreement
        self._keeper = session.keeper(weights, name, self.backend)
        self._batches = Batches(self.plan, self.mesh, session.agreement, self.cuts_calls)
        self._branches = session.branches
        self._timings = session.timings
        session.before_request(self.renew)
        session.after_request(self._unwatch)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self.session.call(), self.session.times.calling() if self._is_denoiser else nullcontext():
            try:
                outcome = self._run(*self._arrived(args, kwargs))
            except RunsWhole:
                return self._run_whole(args, kwargs)
            leave(outcome, (args, kwargs))
            return outcome.result

    @property
    def _computation(self) -> Callable[..., Any]:
        return self._given or found_method(self.module, "forward")

    def _run_whole(self, args: tuple, kwargs: dict) -> Any:
        """The module's own result; what it leaves in containers it leaves in the caller's."""
        arrived = self._arrived(args, kwargs)
        outcome = self._own_outcome(*arrived)
        if arrived[0] is not args:
            leave(outcome, (args, kwargs))
        return outcome.result

    def by_itself(self, *args: Any, **kwargs: Any) -> Any:
        """What the module itself returns, unsplit and of this rank alone; it may write to what it is given."""
        return self._own_outcome(args, kwargs).result

    def _own_outcome(self, args: tuple, kwargs: dict) -> Outcome:
        computation = self._computation
        with as_it_was(self.module):
            return observed(computation, args, kwargs)

    def _run(self, args: tuple, kwargs: dict) -> Outcome:
        if self._on_trial(args, kwargs):
            return self._tried(args, kwargs)
        compiled_call, leaves = self._known(args, kwargs)
        compute = self._compared(compiled_call, self._computing_part(compiled_call, leaves), leaves)
        if self._guided:
            if compiled_call.batch is None or compiled_call.batch.over != BATCH:
                return self._deferred(compiled_call, leaves, compute)
            self._branches.note_shared()
        return assemble(compiled_call.whole, compute(leaves))

    def _on_trial(self, args: tuple, kwargs: dict) -> bool:
        """Whether the module itself runs a call, until it is seen that there are branches of guidance to share."""
        if not (self._guided and self.cuts_calls and self.session.in_request):
            return False
        if not self._branches.on_trial(pytree.tree_leaves((args, kwargs))) or self.plan.tensor > 1:
            return False
        if self._agreement.any("whole weights", self.weights.partial):
            return False
        return self._has_room(self._computation, args, kwargs)

    def _tried(self, args: tuple, kwargs: dict) -> Outcome:
        """What the module itself makes of one branch, if there are others."""
        leaves, spec = pytree.tree_flatten((args, kwargs))
        inputs = self.session.inputs
        leaves = inputs.agreed(leaves) if inputs.first(self) else inputs.known(leaves)
        self.session.announce(f"{self.name} by itself", leaves)
        kept = [leaf.clone() if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        outcome = self._own_outcome(*pytree.tree_unflatten(leaves, spec))
        tensors = tensors_of(outcome.result)
        if outcome.changes or not tensors:
            return outcome
        results = self._branches.call(Call(self.module, self.name, kept, None), lambda: tensors, tensors)
        made = {id(tensor): result for tensor, result in zip(tensors, results, strict=True)}
        return outcome._replace(result=replaced(outcome.result, torch.Tensor, lambda tensor: made[id(tensor)]))

    def renew(self) -> None:
        """Notice what changed without a word since the last request; to be called when one begins.

        Raises:
            UsageError: calls of the module come here no more.
        """
        refuse_lost(self.module, self.name)
        if self.session.in_request:
            self._unwatch()
        self._changing.begin()
        self._release_all()
        self.weights.renew()

    def recover(self, gather: Gather) -> None:
        """Give the module its weights back, once all ranks have come to gather the same ones.

        Raises:
            AgreementError: a rank has other ones, or does not come.
            UsageError: the values of some are nowhere.
        """
        if self.plan.tensor > 1 or self.plan.pipefusion > 1:
            self._agreement.agree("restore", {"set of released weights": digest(self.weights.to_gather())})
        self.weights.recover(gather)

    def refresh(self) -> None:
        """Forget slices of weights, and programs, which may hold values that the module keeps outside of parameters.

        Raises:
            UsageError: weights were released and cannot be had again.
        """
        self.weights.refresh()
        self.calls.clear()
        self.unsplit.clear()

    def _computing(self, compiled_call: CompiledCall, leaves: list[Any]) -> Computing:
        """How the results of this call come from its inputs, now or later."""
        return lambda inputs: compiled_call.run(*bind(compiled_call.program, self.weights, inputs))

    def _computing_part(self, compiled_call: CompiledCall, leaves: list[Any]) -> Computing:
        """The same, where this rank may run a part of the call."""
        shared = compiled_call.shared
        if shared is None:
            return self._computing(compiled_call, leaves)
        compute = self._computing(compiled_call, shared.taken(leaves))
        return lambda inputs: shared.gathered(compute(shared.taken(inputs)))

    def _compared(self, compiled_call: CompiledCall, compute: Computing, leaves: list[Any]) -> Computing:
        """The same, compared with the module itself if this is the later call that is."""
        if not self._is_compared(compiled_call):
            return compute

        def compared(inputs: list[Any]) -> tuple[torch.Tensor, ...]:
            with precision_for(compiled_call.made):
                expected = self._expected(compiled_call, inputs)
                tensors = compute(inputs)
            self._verify_later(compiled_call, inputs, assemble(compiled_call.whole, tensors), expected)
            return tensors

        return compared

    def _is_compared(self, compiled_call: CompiledCall) -> bool:
        due = self._compares_later(compiled_call) and self._later.due(compiled_call, self.session.steps)
        return due and not self.weights.partial

    def _compares_later(self, compiled_call: CompiledCall) -> bool:
        """Whether a later call is to be compared, which another process may have done."""
        done = compiled_call.stored is not None and compiled_call.stored.compared
        return self._compares and compiled_call.room and not done

    def _known(self, args: tuple, kwargs: dict) -> tuple[CompiledCall, list[Any]]:
        """What runs a call of this signature, made if need be, and the flat inputs to run it with."""
        leaves, spec = pytree.tree_flatten((args, kwargs))
        inputs, first = self.session.inputs, self.session.in_request and self.session.inputs.first(self)
        leaves = inputs.agreed(leaves) if first else inputs.known(leaves)
        key = signature(self.module, args, kwargs, self._watched())
        whole, known = self.unsplit.covers(key), self.calls.find(key, leaves)
        which = "whole" if whole else "new" if known is None else known[0]
        self.session.announce(f"{self.name} {which}", leaves)
        if whole:
            raise RunsWhole
        if known is not None:
            self._advance(known[1], leaves)
            return known[1], leaves
        self._unwatch()
        leaves = leaves if first else inputs.agreed(leaves)
        args, kwargs = pytree.tree_unflatten(leaves, spec)
        kept(key.modules)
        compiled_call = self._prepare(key, args, kwargs, leaves)
        left = dataclasses.replace(key, modules=kept(fingerprint(self.module)))
        self.calls.add(compiled_call, key, left)
        return compiled_call, leaves

    def _watched(self) -> Fingerprint:
        """The fingerprint of the module as it is now; taken once, for as long as nothing is seen to have changed."""
        if self._watch is None or not self._watch.same():
            self._watch = Watch(self.module)
            self._watch.fingerprint = self.calls.described(self._watch.fingerprint)
        self.weights.bindings.of_state(self._watch)
        return self._watch.fingerprint

    def _unwatch(self) -> None:
        """The module is about to change, or a request is over: look at all of it when it is called again."""
        self._watch = None
        self.weights.bindings.of_state(None)

    def _arrived(self, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """The inputs with the values of those that another denoiser has not computed yet."""
        if not self._guided:
            return args, kwargs
        if any(isinstance(leaf, Deferred) and not leaf.settled for leaf in pytree.tree_leaves((args, kwargs))):
            self._branches.flush(asking=self.module)
        return pytree.tree_map(values_of, (args, kwargs))

    def _deferred(self, compiled_call: CompiledCall, leaves: list[Any], compute: Computing) -> Outcome:
        """One branch of guidance: its inputs are kept as they are now, its results come with the other branches'."""
        device = device_of(leaves)
        kept = [leaf.clone() if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        likes = [torch.empty(fake.shape, dtype=fake.dtype, device=device) for fake in compiled_call.made]
        call = Call(self.module, self.name, kept, None if compiled_call.batch is None else compiled_call.batch.unshared)
        return assemble(compiled_call.whole, tuple(self._branches.call(call, lambda: compute(kept), likes)))

    def _settle(self, compiled_call: CompiledCall) -> None:
        """Bring the weights that programs need, and release what they leave, now or after the later comparison."""
        for program in compiled_call.programs:
            self.weights.load(program)
        if not self.plan.keep_weights:
            self._unreleased.append(compiled_call)
            later = self._compares_later(compiled_call) and self.session.steps > 1
            if not later or self.weights.partial:
                self._release_all()
        self._agreement.agree("its weights", {})

    def _release_all(self) -> None:
        """Release the weights that programs leave, after the last time that the module itself runs."""
        if self._unreleased:
            self._unwatch()
            before = kept(fingerprint(self.module))
            for compiled_call in self._unreleased:
                self._release(compiled_call)
            self._unreleased.clear()
            self.calls.follow(before, kept(fingerprint(self.module)))

    def _release(self, compiled_call: CompiledCall) -> None:
        self.weights.release(compiled_call.programs)

    def _found(self, compiled_call: CompiledCall, leaves: list[Any]) -> Iterator[tuple[torch.Tensor, ...]]:
        """The results of a call, for every way in which it can be computed."""
        yield tuple(self._computing_part(compiled_call, leaves)(leaves))
