"""Stands in for a module's forward: finds or makes the program for a call, and runs it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from .build import Analysis, analyse, choose_units, place
from .deferred import Deferred, values_of
from .digest import digest, digest_program, digest_shapes
from .dump import dump
from .errors import UsageError
from .in_place import as_it_was, found_method, refuse_lost
from .interpret import assemble, bind
from .passes.infer import Inference
from .passes.layout import BATCH, DATA, Chosen
from .passes.strips import in_strips
from .plan import Plan
from .program import Program
from .session import Place, Session
from .signature import Signature, fingerprint, signature
from .verification import narrow_rounding, verify
from .weights import Gather, Weights

Computing = Callable[[list[Any]], tuple[torch.Tensor, ...]]
"""From the flat inputs of a call to the tensors of its result."""


@dataclasses.dataclass(frozen=True, eq=False)
class Prepared:
    """What one signature runs on this rank."""

    analysis: Analysis
    program: Program
    run: Callable[..., tuple[Any, ...]]

    @property
    def programs(self) -> Sequence[Program]:
        """All that this rank runs."""
        return [self.program]

    def fits(self, leaves: list[Any]) -> bool:
        """Whether the values that the capture baked in are those of this call."""
        return all(torch.equal(leaves[guard.position], guard.value) for guard in self.program.guards)


class Runner:
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
        budget: bytes of activations that this rank may hold; convolutions run in strips where that takes it.
        trace_only: the module itself never runs, neither to be captured nor to be compared with, as its memory might
            not be there.
    """

    def __init__(
        self,
        weights: Weights,
        session: Session,
        name: str = "module",
        *,
        place: Place | None = None,
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
        self.prepared: dict[Signature, list[Prepared]] = {}
        self._agreement = session.agreement
        self._branches = session.branches
        session.before_request(self.renew)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self.session.call():
            return self._run(args, kwargs)

    @property
    def _computation(self) -> Callable[..., Any]:
        return self._given or found_method(self.module, "forward")

    def _run(self, args: tuple, kwargs: dict) -> Any:
        if self._guided:
            args, kwargs = self._arrived(args, kwargs)
        prepared, leaves = self._known(args, kwargs)
        compute = self._computing(prepared, leaves)
        if self._guided:
            if not prepared.analysis.units.get(BATCH):
                return self._deferred(prepared, leaves, compute)
            self._branches.shared += 1
        return assemble(prepared.program, compute(leaves))

    def renew(self) -> None:
        """Notice what changed without a word since the last request; to be called when one begins.

        Raises:
            UsageError: calls of the module come here no more.
        """
        refuse_lost(self.module, self.name)
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
        self.prepared.clear()

    def _computing(self, prepared: Prepared, leaves: list[Any]) -> Computing:
        """How the results of this call come from its inputs, now or later."""
        return lambda given: prepared.run(*bind(prepared.program, self.weights, given))

    def _known(self, args: tuple, kwargs: dict) -> tuple[Prepared, list[Any]]:
        """What runs a call of this signature, made if need be, and the flat inputs to run it with."""
        leaves, spec = pytree.tree_flatten((args, kwargs))
        inputs, first = self.session.inputs, self.session.in_request and self.session.inputs.first(self)
        leaves = inputs.agreed(leaves) if first else inputs.known(leaves)
        key = signature(self.module, args, kwargs)
        known = self.prepared[key] = self.prepared.pop(key, [])
        prepared = next((one for one in known if one.fits(leaves)), None)
        self.session.announce(f"{self.name} {'new' if prepared is None else known.index(prepared)}", leaves)
        if prepared is None:
            leaves = leaves if first else inputs.agreed(leaves)
            args, kwargs = pytree.tree_unflatten(leaves, spec)
            prepared = self._prepare(args, kwargs, leaves)
            known.append(prepared)
            self._drop_oldest()
        return prepared, leaves

    def _drop_oldest(self) -> None:
        while sum(map(len, self.prepared.values())) > self.plan.max_programs:
            key, known = next((key, known) for key, known in self.prepared.items() if known)
            known.pop(0)
            if not known:
                del self.prepared[key]

    def _arrived(self, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """The inputs with the values of those that another denoiser has not computed yet."""
        if any(isinstance(leaf, Deferred) and not leaf.settled for leaf in pytree.tree_leaves((args, kwargs))):
            self._branches.flush(asking=self.module)
        return pytree.tree_map(values_of, (args, kwargs))

    def _deferred(self, prepared: Prepared, leaves: list[Any], compute: Computing) -> Any:
        """One branch of guidance: its inputs are kept as they are now, its results come with the other branches'."""
        device = device_of(leaves)
        kept = [leaf.clone() if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]

        (output,) = prepared.analysis.program.root.graph.find_nodes(op="output")
        fakes = [leaf.meta["val"] for leaf in output.args[0]]
        likes = [torch.empty(fake.shape, dtype=fake.dtype, device=device) for fake in fakes]
        return assemble(prepared.program, tuple(self._branches.call(self.module, lambda: compute(kept), likes)))

    def _prepare(self, args: tuple, kwargs: dict, leaves: list[Any]) -> Prepared:
        shapes = {"plan": digest([self.plan]), "input shape": digest_shapes(leaves)}
        self._agreement.agree("a new program", shapes)
        own = self._computation
        with as_it_was(self.module):
            analysis = analyse(
                self.module, self.plan, args, kwargs, forward=own, check=self.plan.verify,
                choose=self._choose, run=not self._trace_only,
            )  # fmt: skip
        self._refuse_alone(analysis)
        prepared = self._placed(analysis, device_of(leaves))
        self._agreement.agree("its graph", {"graph": digest([digest_program(analysis.program), analysis.units])})
        rewritten = self.mesh.world_size > 1 or self.plan.patch_count > 1
        if self.plan.verify and not self._trace_only and rewritten:
            if not self._agreement.any("whole weights", self.weights.partial):
                self._verify(prepared, own, args, kwargs, leaves)
        self._settle(prepared)
        return prepared

    def _refuse_alone(self, analysis: Analysis) -> None:
        """See to it that data ranks have a batch to share."""
        shared = analysis.units.get(BATCH) or analysis.units.get(DATA)
        if self.plan.data > 1 and self._is_denoiser and not shared:
            raise UsageError(
                f"data={self.plan.data} but {self.name} is called with fewer images at once, or takes them one by one: "
                "give more prompts or a greater num_images_per_prompt, or use data=1"
            )

    def _placed(self, analysis: Analysis, device: torch.device) -> Prepared:
        partitioned = place(analysis, self.plan, self.mesh, self._gather)
        if self._budget is not None:
            partitioned = dataclasses.replace(partitioned, program=in_strips(partitioned.program, self._budget))
        partitioned.program.root.to(device)
        dump(analysis, partitioned, self.mesh.rank)
        return Prepared(analysis, partitioned.program, self.backend.compile(partitioned.program.root))

    def _settle(self, prepared: Prepared) -> None:
        """Bring the weights that programs need, and release what they leave; known signatures follow the module."""
        before = fingerprint(self.module)
        for program in prepared.programs:
            self.weights.load(program)
        if not self.plan.keep_weights:
            self._release(prepared)
        self._agreement.agree("its weights", {})
        after = fingerprint(self.module)
        if after != before:
            for key in [key for key in self.prepared if key.modules == before]:
                self.prepared[dataclasses.replace(key, modules=after)] = self.prepared.pop(key)

    def _release(self, prepared: Prepared) -> None:
        self.weights.release(prepared.programs)

    def _verify(
        self, prepared: Prepared, own: Callable[..., Any], args: tuple, kwargs: dict, leaves: list[Any]
    ) -> None:
        with as_it_was(self.module):
            expected = own(*args, **kwargs)
        slack = functools.partial(narrow_rounding, prepared.analysis.program, self.module, args, kwargs)
        for found in self._found(prepared, leaves):
            verify(assemble(prepared.program, found), expected, slack)
        self._agreement.agree("its verdict", {})

    def _found(self, prepared: Prepared, leaves: list[Any]) -> Iterator[tuple[torch.Tensor, ...]]:
        """The results of a call, for every way in which it can be computed."""
        yield tuple(self._computing(prepared, leaves)(leaves))


def device_of(leaves: list[Any]) -> torch.device:
    """Where the largest input lies; index lists that the passes made must lie there too."""
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    return max(tensors, key=torch.Tensor.numel).device if tensors else torch.device("cpu")
