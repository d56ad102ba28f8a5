"""Stands in for an autoencoder's ``decode`` and ``encode``: runs them split by rows."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from xdit_compile.backends.eager import Eager
from xdit_compile.capture.state.in_place import held, put_back, put_in_place
from xdit_compile.capture.state.module_snapshot import preserved
from xdit_compile.errors import CaptureError, UsageError
from xdit_compile.ir.peak_memory import release_unused
from xdit_compile.passes.choose.rows import choose_rows
from xdit_compile.runtime.compiled_call import CompiledCall
from xdit_compile.runtime.diffusers_pipeline import CODING
from xdit_compile.runtime.methods.draws import DrawingRunner, unmoved
from xdit_compile.runtime.proving import device_of
from xdit_compile.runtime.runner import Runner
from xdit_compile.runtime.session import Session, Target
from xdit_compile.runtime.tensors.deferred_tensor import values_of
from xdit_compile.weights.weights import Weights

REHEARSED = {"decode": 16, "encode": 128}
"""Rows and columns to which an input is cut when a method is compared with the module itself."""


@dataclasses.dataclass(frozen=True)
class Team:
    """What the runners of one autoencoder share."""

    weights: Weights
    session: Session
    place: Target

    def runner(self, module: nn.Module, name: str, computation: Callable[..., Any], **options: Any) -> Runner:
        """A runner that splits ``computation`` by rows."""
        weights = self.weights if module is self.weights.module else Weights(module)
        return DrawingRunner(
            weights, self.session, name,
            place=self.place, computation=computation, choose=choose_rows, budget=self.place.plan.vae_bytes, **options,
        )  # fmt: skip


class RowMethod:
    """Called in place of ``decode`` or ``encode`` of an autoencoder.

    The first call with inputs of new sizes is rehearsed: inputs cut to a few rows and columns go through the module and
    through its split program, uncompiled, which must agree. Of the whole inputs the module sees nothing, since one
    device may not have the memory. What an accelerator's allocator kept of the steps before is given back first: blocks
    of other sizes than these. While the module's tiling is on, it cuts the tiles itself and each is split by rows.

    Called with ``gather=False`` every rank keeps the rows that it made, in rank order.
    """

    def __init__(self, team: Team, method: str):
        self.team, self.name = team, method
        self.module = team.weights.module
        self.method = getattr(self.module, method)
        self.session = team.session
        runner = functools.partial(team.runner, self.module, method, self._computed)
        uncompiled = dataclasses.replace(team, place=dataclasses.replace(team.place, backend=Eager()))
        self._checked = runner()
        self._rehearsal = uncompiled.runner(self.module, f"the rehearsal of {method}", self._computed)
        self._trusting = {gather: runner(gather=gather, trace_only=True) for gather in (True, False)}
        self._rehearsed: set[Hashable] = set()
        self._children: dict[str, _Child] = {}

    def __call__(self, *args: Any, gather: bool = True, **kwargs: Any) -> Any:
        with self.session.call():
            release_unused(device_of(pytree.tree_leaves((args, kwargs))))
            return self._coded(args, kwargs, gather)

    def _coded(self, args: tuple, kwargs: dict, gather: bool) -> Any:
        args, kwargs = _arrived((args, kwargs))
        self._refuse_unfit(args, kwargs)
        if getattr(self.module, "use_tiling", False):
            return self._tiled(args, kwargs, gather)
        small, sizes = cut_small((args, kwargs), REHEARSED[self.name]), _sizes((args, kwargs))
        if gather and _sizes(small) == sizes:
            return self._checked(*args, **kwargs)
        if self.team.place.plan.verify and sizes not in self._rehearsed:
            with unmoved(small):
                self._rehearsal(*small[0], **small[1])
            self._rehearsed.add(sizes)
        return self._trusting[gather](*args, **kwargs)

    def refresh(self) -> None:
        """Forget every program and slice of weights."""
        children = [child._runner for child in self._children.values()]
        for runner in (self._checked, self._rehearsal, *self._trusting.values(), *children):
            runner.refresh()
        self._rehearsed.clear()

    def latest(self) -> CompiledCall | None:
        """What ran last among the programs of this method, the largest inputs first."""
        for runner in (*self._trusting.values(), self._checked):
            if runner.calls:
                return runner.calls.latest
        return None

    def _computed(self, *args: Any, **kwargs: Any) -> Any:
        """What the method itself computes; the module is left as it was."""
        with preserved(self.module):
            return self.method(*args, **kwargs)

    def _refuse_unfit(self, args: tuple, kwargs: dict) -> None:
        tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        for tensor in tensors:
            if tensor.is_floating_point() and not tensor.is_meta and not bool(torch.isfinite(tensor).all()):
                raise UsageError(f"the input of {self.name} holds NaN or infinite values; nothing was computed of it")
        parts = self.team.place.mesh.world_size
        rows = max((tensor.shape[-2] for tensor in tensors if tensor.dim() >= 4), default=parts)
        if rows < parts:
            idle = f"{parts - rows} of {parts} ranks have nothing to do"
            warnings.warn(f"{self.name}: {rows} rows, so {idle}; lower vae_degree", stacklevel=3)

    def _tiled(self, args: tuple, kwargs: dict, gather: bool) -> Any:
        if not gather:
            raise UsageError(f"{self.name} with gather=False has no use while tiling is on; call disable_tiling()")
        with self._split_children():
            return self.method(*args, **kwargs)

    @contextmanager
    def _split_children(self) -> Iterator[None]:
        """Have every module that the method calls directly split what it is given."""
        replaced = {}
        for name, child in self.module.named_children():
            if next(child.parameters(), None) is None or "forward" in vars(child):
                continue
            runner = self._children.get(name)
            if runner is None or runner.module is not child:
                runner = self._children[name] = _Child(self.team, name, child)
            replaced[child] = runner
        try:
            for child, runner in replaced.items():
                put_in_place(child, {"forward": runner})
            yield
        finally:
            for child in filter(held, replaced):
                put_back(child)


class _Child:
    """Called in place of the forward of one module inside an autoencoder; runs it as it is where it must."""

    def __init__(self, team: Team, name: str, module: nn.Module):
        self.name, self.module = name, module
        self._forward = module.forward
        self._runner = team.runner(module, name, self._forward)
        self._whole = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self._whole:
            try:
                return self._runner(*args, **kwargs)
            except CaptureError as error:
                self._whole = True
                warnings.warn(f"{self.name} runs whole on every rank while tiling is on: {error}", stacklevel=2)
        return self._forward(*args, **kwargs)


def split_rows(team: Team) -> None:
    """Put a `RowMethod` in the place of every coding method of an autoencoder."""
    put_in_place(team.weights.module, {name: RowMethod(team, name) for name in CODING})


def row_methods(module: nn.Module) -> list[RowMethod]:
    """The methods of a module that run split by rows."""
    return [method for method in held(module).values() if isinstance(method, RowMethod)]


def restore_rows(module: nn.Module) -> None:
    """Undo `split_rows`."""
    if row_methods(module):
        put_back(module)


def _arrived(inputs: tuple[tuple, dict]) -> tuple[tuple, dict]:
    """Inputs with values; the very ones where all have them, as the method may write to its lists."""
    leaves, spec = pytree.tree_flatten(inputs)
    values = [values_of(leaf) for leaf in leaves]
    same = all(one is other for one, other in zip(leaves, values, strict=True))
    return inputs if same else pytree.tree_unflatten(values, spec)


def cut_small(inputs: tuple[tuple, dict], few: int) -> tuple[tuple, dict]:
    """Inputs cut to few rows and columns of the first of them that has both, and to as large a part of the others.

    What is left is the rest that the whole leaves when it is divided by a power of two, and ``few``. Others whose sizes
    are no multiple of the first's stay as they are.
    """
    leaves, spec = pytree.tree_flatten(inputs)
    first = next((leaf for leaf in leaves if _has_rows(leaf)), None)
    if first is None:
        return inputs
    whole = first.shape[-2:]
    cut = [min(size, few + size % few) for size in whole]
    return pytree.tree_unflatten([_cut_alike(leaf, whole, cut) if _has_rows(leaf) else leaf for leaf in leaves], spec)


def _has_rows(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.dim() >= 4


def _cut_alike(leaf: torch.Tensor, whole: Sequence[int], cut: Sequence[int]) -> torch.Tensor:
    kept = [
        size * part // of if size * part % of == 0 and (size % of == 0 or of % size == 0) else size
        for size, of, part in zip(leaf.shape[-2:], whole, cut, strict=True)
    ]
    return leaf[..., : kept[0], : kept[1]]


def _sizes(inputs: tuple[tuple, dict]) -> Hashable:
    leaves, spec = pytree.tree_flatten(inputs)
    return str(spec), tuple(
        (leaf.shape, leaf.dtype) if isinstance(leaf, torch.Tensor) else _said(leaf) for leaf in leaves
    )


def _said(leaf: Any) -> str:
    return "generator" if isinstance(leaf, torch.Generator) else repr(leaf)
