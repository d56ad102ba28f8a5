"""Ways to record what a module does for given inputs, each as one graph whose weights are placeholders."""

from __future__ import annotations

import dataclasses
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn
from torch.export.graph_signature import InputKind, OutputKind
from torch.utils import _pytree as pytree

from xdit_compile.capture.state.containers import Outcome, observed
from xdit_compile.errors import CaptureError
from xdit_compile.ir.kept_modules import KeptModule
from xdit_compile.ir.program import Guard, Input
from xdit_compile.ir.results import Template, tensors_of

PREFIX = "module"


@dataclasses.dataclass
class Trace:
    """A recorded graph: placeholders in the order of ``inputs`` with fakes in ``meta["val"]``, a flat tuple as output.

    Each computing node carries ``meta["calls"]``, the nest of module calls it was made in, outermost first, each as
    ``(path of the module, key of the call)``. ``functional`` says that no node writes to a tensor and that composite
    operators are already decomposed.
    """

    graph: fx.GraphModule
    inputs: tuple[Input, ...]
    constants: dict[str, torch.Tensor]
    functional: bool = False
    guards: tuple[Guard, ...] = ()
    functionalize: Callable[[], Trace] | None = None
    kept: tuple[KeptModule, ...] = ()


@dataclasses.dataclass(eq=False)
class Seen:
    """What a call of a module was seen to do: an `Outcome` without its tensors."""

    outcome: Template | None = None

    @property
    def written(self) -> list[int]:
        """Positions of the flat inputs that it writes to."""
        return [each.position for each in self.outcome.form.written] if self.outcome else []


class Flat(nn.Module):
    """A module seen as a function of its tensor leaves alone, contiguous ones; every other leaf is baked in.

    ``runs`` says whether the module may run as it is, and ``seen``, once it ran, how what it does is made of tensors.
    """

    def __init__(self, module: nn.Module, forward: Callable[..., Any], args: tuple, kwargs: dict) -> None:
        super().__init__()
        self.module = module
        self.call = forward
        self.runs = True
        leaves, self.in_spec = pytree.tree_flatten((args, kwargs))
        self.leaves = [leaf.contiguous() if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        self.positions = tuple(i for i, leaf in enumerate(self.leaves) if isinstance(leaf, torch.Tensor))
        self.fixed = [None if isinstance(leaf, torch.Tensor) else leaf for leaf in self.leaves]
        self.seen = Seen()

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        leaves = list(self.fixed)
        for position, tensor in zip(self.positions, tensors, strict=True):
            leaves[position] = tensor.clone() if position in self.seen.written else tensor
        args, kwargs = pytree.tree_unflatten(leaves, self.in_spec)
        if torch.compiler.is_dynamo_compiling():
            assert self.seen.outcome is not None
            return tuple(self.seen.outcome.taken(Outcome(self.call(*args, **kwargs))))
        outcome = observed(self.call, args, kwargs, self.seen.written)
        if self.seen.outcome is None:
            self.seen.outcome = Template.of(outcome)
        return tuple(tensors_of(outcome))

    @property
    def objects(self) -> list[Any]:
        """The inputs that are no tensors."""
        return [leaf for leaf in self.leaves if not isinstance(leaf, torch.Tensor)]

    def own_inputs(self) -> tuple[tuple, dict]:
        """``(args, kwargs)`` of the example call, with tensors that a call may write to without harm."""
        leaves = [leaf.clone() if isinstance(leaf, torch.Tensor) else leaf for leaf in self.leaves]
        return pytree.tree_unflatten(leaves, self.in_spec)

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """The tensor leaves of the example inputs."""
        return tuple(self.leaves[i] for i in self.positions)


def by_export(flat: Flat) -> Trace:
    """Non-strict ``torch.export``: Python runs, tensors are fakes."""
    return _exported(flat, strict=False)


def by_dynamo(flat: Flat) -> Trace:
    """Strict ``torch.export``: bytecode is analysed, so writes to tensor data and attributes are understood.

    Raises:
        CaptureError: the module changes what it is given, which this cannot see.
    """
    if flat.seen.outcome is not None and flat.seen.outcome.form.changes:
        raise CaptureError("the module changes a list, dict or tensor that it is given")
    return _exported(flat, strict=True)


def _exported(flat: Flat, strict: bool) -> Trace:
    with _quiet():
        program = torch.export.export(flat, flat.tensors(), strict=strict)
    return _from_exported(program, flat, functional=False)


def _from_exported(program: torch.export.ExportedProgram, flat: Flat, functional: bool) -> Trace:
    def functionalize() -> Trace:
        with _quiet():
            return _from_exported(program.run_decompositions({}), flat, functional=True)

    inputs: list[Input] = []
    constants: dict[str, torch.Tensor] = {}
    users = iter(flat.positions)
    for spec in program.graph_signature.input_specs:
        name = spec.arg.name
        if spec.kind is InputKind.USER_INPUT:
            inputs.append(Input(name, "user", next(users)))
        elif spec.kind is InputKind.PARAMETER:
            inputs.append(Input(name, "parameter", own_name(spec.target)))
        elif spec.kind is InputKind.BUFFER:
            inputs.append(Input(name, "buffer", own_name(spec.target)))
        elif spec.kind is InputKind.CONSTANT_TENSOR:
            constants[name] = program.constants[spec.target]
            inputs.append(Input(name, "constant", name))
        else:
            raise CaptureError(f"input {name} of kind {spec.kind.name} is no tensor")
    for out in program.graph_signature.output_specs:
        if out.kind is not OutputKind.USER_OUTPUT:
            if functional:
                raise CaptureError(f"the module writes to {own_name(out.target or out.arg.name)} ({out.kind.name})")
    graph = program.graph_module
    for node in graph.graph.nodes:
        node.meta["calls"] = tuple(
            (own_name(path), key) for key, (path, _) in (node.meta.get("nn_module_stack") or {}).items() if path
        )
    return Trace(graph, tuple(inputs), constants, functional, functionalize=None if functional else functionalize)


def own_name(name: str) -> str:
    """A qualified name inside ``Flat`` as one inside the user's module."""
    return name.removeprefix(PREFIX).removeprefix(".")


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporters' warnings: a method that fails is reported once, with its reason."""
    loggers = [logging.getLogger(name) for name in ("torch.export", "torch._dynamo", "torch.fx")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
