"""What a runner does with the cache: finds calls that others made, has programs compiled, and keeps what it made."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch.utils import _pytree as pytree

from xdit_compile.backends.codes import Codes
from xdit_compile.backends.forms import Forms, TensorForm, contiguous, form_of
from xdit_compile.backends.sites import Sites
from xdit_compile.cache.portable import describe_call, describe_module
from xdit_compile.cache.sources import Recording, manifest, recorded
from xdit_compile.cache.unportable import Unportable
from xdit_compile.ir.program import Input, Program
from xdit_compile.plan import Plan
from xdit_compile.weights.bindings import OF_MODULE
from xdit_compile.weights.weights import Weights

from .compile_together import Shares, Wanted, compile_together
from .pending import Pending
from .progress import Progress
from .shelf import Shelf, Ticket
from .stored_call import StoredCall, StoredCode, stays_on_host

Run = Callable[..., tuple[Any, ...]]
Parts = Mapping[str, tuple[Program, Run]]
"""Programs by name, each with what computes it."""
APART = ("cache", "compile", "backend", "verify", "timeout_s", "max_programs", "keep_weights", "warmup_steps")
"""Fields of a plan that change no program."""
ROWS = ("vae", "vae_degree", "vae_memory")
"""Fields of a plan that concern autoencoders alone."""
logger = logging.getLogger("xdit_compile")
ready = logging.getLogger("xdit_compile.ready")


class Keepable(Protocol):
    """What a runner made of a call."""

    @property
    def parts(self) -> Parts: ...
    @property
    def facts(self) -> dict[str, Any]: ...
    @property
    def over(self) -> str: ...
    @property
    def unshared(self) -> tuple[Any, ...] | None: ...
    @property
    def made(self) -> Sequence[torch.Tensor]: ...
    @property
    def shared(self) -> object | None: ...
    @property
    def stored(self) -> StoredCall | None: ...


class Keeper:
    """The cache as one runner uses it.

    Args:
        name: what the module is called in messages.
        progress: what shows the phases of making a call ready.
        speaks: whether this rank says that one is.
    """

    def __init__(
        self, shelf: Shelf, codes: Codes | None, weights: Weights, name: str, progress: Callable[[], Progress],
        speaks: bool,
    ):  # fmt: skip
        self._shelf, self._codes, self._weights, self._name, self._speaks = shelf, codes, weights, name, speaks
        self._progress = progress
        self._recording: Recording | None = None
        self._ticket: Ticket | None = None
        self._code: dict[str, StoredCode] = {}
        self._show = progress()
        self._before = (0, 0)

    def find(
        self, args: tuple, kwargs: dict[str, Any], plan: Plan, besides: Sequence[Any], device: torch.device,
        apart: Sequence[str] = APART,
    ) -> StoredCall | None:  # fmt: skip
        """What every rank has kept of a call; from here on it is counted how long it takes to be ready.

        Args:
            besides: what else decides on programs: this rank, and what its runner does.
            apart: fields of the plan that do not.
        """
        fields = {each.name: getattr(plan, each.name) for each in dataclasses.fields(plan) if each.name not in apart}

        def described() -> Any:
            call = describe_call(args, kwargs, self._shelf.kind)
            module = describe_module(self._weights.module, device.type, self._shelf.kind)
            return [module, call, str(fields), list(map(str, besides))]

        self._show, self._code, self._recording = self._progress(), {}, None
        self._before = self._counted()
        self._ticket = self._shelf.ticket(described, {"for": self._about(args, kwargs, plan)}, device)
        stored = self._shelf.find(self._ticket, pytree.tree_leaves((args, kwargs)), device)
        if stored is None:
            self._shelf.expect(device)
            self._show.stage("capturing")
        return stored

    def _about(self, args: tuple, kwargs: dict[str, Any], plan: Plan) -> str:
        leaves = pytree.tree_leaves((args, kwargs))
        shapes = ["x".join(map(str, leaf.shape)) for leaf in leaves if isinstance(leaf, torch.Tensor)]
        degrees = [f"{name}={getattr(plan, name)}" for name in plan.used]
        kind = type(self._weights.module).__name__
        card = "" if self._codes is None or self._codes.card is None else f", for {self._codes.card.target}"
        said = f"{kind}, {self._name} of {shapes[0] if shapes else 'nothing'}, {' '.join(degrees) or 'one process'}"
        return said + card

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Note the Python files that run meanwhile, where the call is to be kept."""
        if self._ticket is None:
            yield
            return
        with recorded() as self._recording:
            yield

    def compile(
        self, parts: Parts, leaves: Sequence[Any], device: torch.device, stored: StoredCall | None,
        background: bool = False,
    ) -> Pending | None:  # fmt: skip
        """Have programs run compiled code, wherever it comes from; all ranks call this at once.

        Args:
            leaves: the flat inputs of the call.
            stored: what was kept of it.
            background: whether what is missing is compiled by other processes, while programs run op by op. Ranks need
                a folder in common for that.

        Returns:
            What is on its way then.
        """
        company, wanted = self._shelf.company(), []
        if self._codes is None:
            return None
        for name, (program, run) in parts.items():
            if isinstance(run, Sites):
                known = None if stored is None else stored.code.get(name)
                wanted.append(self._wanted(program, run, leaves, device, known))
                self._code[name] = wanted[-1].code
        if background and self._shelf.folder is not None and company.together:
            return Pending.begin(wanted, self._codes, company, self._shelf.folder, self._name, self._show)
        compile_together(Shares.agreed(wanted, self._codes, company), self._codes, company, self._show)
        return None

    def _wanted(
        self, program: Program, run: Sites, leaves: Sequence[Any], device: torch.device, known: StoredCode | None
    ) -> Wanted:  # fmt: skip
        assert self._codes is not None
        inputs = forms_of_inputs(program, self._weights, leaves, device)
        if self._shelf.kind is not None:
            inputs = _moved(program, inputs, device)
        if known is not None and known.inputs == inputs:
            return Wanted(run, known)
        return Wanted.of(run, inputs, self._codes)

    def keep(
        self, call: Keepable, leaves: Sequence[Any], device: torch.device, verified: bool, tried: bool = True
    ) -> None:  # fmt: skip
        """Keep a call that is ready; all ranks call this at once.

        Args:
            leaves: its flat inputs.
            verified: whether it was compared with the module.
            tried: whether the module was tried where the graph does not say how the samples can be shared.
        """
        if call.stored is not None:
            again = dataclasses.replace(call.stored, verified=verified)
            self._shelf.keep(self._ticket, leaves, device, again)
            return
        making = self._shelf.making()
        if self._ticket is None:
            return
        try:
            sources = self._sources(call, tried)
        except Unportable as error:
            logger.info("%s is not kept for other processes: %s", self._name, error)
            return
        results = tuple(contiguous(each.shape, each.dtype, torch.device("cpu")) for each in call.made)
        programs = {name: program for name, (program, _) in call.parts.items()}
        unshared = call.unshared
        stored = StoredCall(
            making, verified, False, call.over, unshared, call.facts, results, sources, programs, dict(self._code)
        )
        self._shelf.keep(self._ticket, leaves, device, stored)

    def _sources(self, call: Keepable, tried: bool) -> dict[str, str]:
        """The files that ran.

        Raises:
            Unportable: not all of them are known, or the call is none that can be kept.
        """
        if call.shared is not None:
            raise Unportable("each rank runs a call of some of its samples")
        if call.unshared is not None and not tried:
            raise Unportable("whether its samples can be shared was not tried, as verify=False asks")
        if self._recording is None or self._recording.incomplete is not None:
            raise Unportable("the capture was not watched" if self._recording is None else self._recording.incomplete)
        return manifest(self._recording.files)

    def drop(self, leaves: Sequence[Any], device: torch.device) -> None:
        """Keep the latest call no more: what was kept of it is wrong."""
        self._shelf.drop(self._ticket, leaves, device)

    @property
    def ticket(self) -> Ticket | None:
        """What the latest call is kept under."""
        return self._ticket

    def compared(self, ticket: Ticket | None, leaves: Sequence[Any], device: torch.device) -> None:
        """Note of a call that a later one was compared with the module, too."""
        self._shelf.compared(ticket, leaves, device)

    def stage(self, what: str) -> None:
        """Another phase of making a call ready begins."""
        self._show.stage(what)

    def end(self) -> None:
        """No phase goes on any more, whatever came of it."""
        self._show.end()

    def say(self, kept: bool) -> str:
        """Say that a call is ready, and where its graphs came from, in the words that are returned."""
        self._show.end()
        loaded, compiled = (now - before for now, before in zip(self._counted(), self._before, strict=True))
        counts = f"{loaded} graphs from the cache, {compiled} compiled"
        graphs = counts if self._codes is not None else "not compiled"
        where = ", from the cache" if kept and self._codes is None else "" if kept else ", captured anew"
        said = f"{self._name} ready in {self._show.seconds:.1f} s: {graphs}{where}"
        if self._speaks:
            ready.info("%s", said)
        return said

    def _counted(self) -> tuple[int, int]:
        return (0, 0) if self._codes is None else (self._codes.counts.loaded, self._codes.counts.compiled)


def forms_of_inputs(program: Program, weights: Weights, leaves: Sequence[Any], device: torch.device) -> Forms:
    """The forms that the inputs of a program's root have when it is run.

    Args:
        leaves: the flat inputs of the call.
        device: where states are, and what other programs and ranks hand over.
    """
    placeholders = program.root.graph.find_nodes(op="placeholder")
    forms: list[TensorForm] = []
    for spec, node in zip(program.inputs, placeholders, strict=False):
        if spec.kind in OF_MODULE:
            forms.append(_form_of_weight(spec, weights))
        elif spec.kind == "constant":
            forms.append(form_of(program.constants[str(spec.target)]))
        else:
            here = leaves[int(spec.target)].device if spec.kind in ("user", "patch") else device
            forms.append(contiguous(node.meta["val"].shape, node.meta["val"].dtype, here))
    received = placeholders[len(program.inputs) :]
    return (*forms, *(contiguous(node.meta["val"].shape, node.meta["val"].dtype, device) for node in received))


def _moved(program: Program, inputs: Forms, device: torch.device) -> Forms:
    """The forms of a program's inputs where those that lie on the host will be on a device."""
    moved = [form._replace(device=device) for form in inputs]
    for place, (spec, form) in enumerate(zip(program.inputs, inputs, strict=False)):
        if spec.kind == "constant" and stays_on_host(form.shape, form.dtype):
            moved[place] = form
    return tuple(moved)


def _form_of_weight(spec: Input, weights: Weights) -> TensorForm:
    """The form of a parameter or buffer as a program takes it; nothing is read or cut for that."""
    if spec.members:
        parts = [_form_of_weight(member, weights) for member in spec.members]
        shape = (sum(part.shape[0] for part in parts), *parts[0].shape[1:])
        return contiguous(shape, parts[0].dtype, parts[0].device)
    whole = weights.whole(spec)
    device = torch.device(weights.device) if whole.is_meta else whole.device
    if spec.pieces or whole.is_meta:
        return contiguous(spec.sizes(whole.shape), whole.dtype, device)
    return form_of(whole)
