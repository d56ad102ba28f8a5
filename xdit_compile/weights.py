"""A module's tensors as programs bind them: whole, or the slices that this rank keeps."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable
from typing import Protocol

import torch
from torch import nn

from .errors import UsageError
from .program import Input, Piece, Program

Key = tuple[str, tuple[Piece, ...]]
NOTHING = (Piece(0, ()),)
"""The pieces of a parameter of which this rank keeps none."""
Gather = Callable[[torch.Size, tuple[Piece, ...], torch.Tensor], torch.Tensor]


@dataclasses.dataclass(frozen=True)
class _Slice:
    """A slice and the state of the parameter that it was cut from."""

    value: torch.Tensor
    source: tuple[int, int, int] | None

    def fits(self, whole: torch.Tensor) -> bool:
        return whole.is_meta or self.source == _state(whole)


class Source(Protocol):
    """Where parameters that the module does not hold are read from."""

    def read(self, name: str, pieces: tuple[Piece, ...]) -> torch.Tensor:
        """Pieces of one parameter, or all of it where there are none."""
        ...


class Weights:
    """Parameters and buffers of a module, whole or in slices.

    A slice is cut once, and cut anew when its parameter was replaced or written to. Parameters of which every program
    takes slices can be released: the module then keeps one of the same shape on the meta device.

    Args:
        module: holds the parameters; those on the meta device are read from ``source``.
        source: where they are read from; without one they cannot be read.
        device: where what is read is put.
    """

    def __init__(self, module: nn.Module, source: Source | None = None, device: torch.device | str = "cpu"):
        self.module = module
        self._source = source
        self._device = device
        self._slices: dict[Key, _Slice] = {}
        self._released: dict[str, tuple[Piece, ...]] = {}
        self._differ = False

    @property
    def partial(self) -> bool:
        """Whether the module itself cannot run, because some of its parameters are not there."""
        return any(parameter.is_meta for parameter in self.module.parameters())

    @property
    def elements(self) -> int:
        """How many elements of the parameters this rank holds, whole ones and slices."""
        whole = sum(parameter.numel() for parameter in self.module.parameters() if not parameter.is_meta)
        return whole + sum(kept.value.numel() for kept in self._slices.values())

    def find(self, given: Input) -> torch.Tensor:
        """The tensor for a parameter or buffer of a program.

        Raises:
            UsageError: it was released and is wanted in another form than it was kept in.
        """
        name = str(given.target)
        whole = self.module.get_parameter(name) if given.kind == "parameter" else self.module.get_buffer(name)
        if not given.pieces:
            return self._read(name, ()) if whole.is_meta else whole
        key = (name, given.pieces)
        kept = self._slices.get(key)
        if kept is None or not kept.fits(whole):
            value = self._read(name, given.pieces) if whole.is_meta else cut(whole, given.pieces)
            kept = self._slices[key] = _Slice(value, _state(whole))
        return kept.value

    def load(self, program: Program) -> None:
        """Read what a program takes of parameters that the module does not hold, and give the module whole ones."""
        for given in program.inputs:
            name = str(given.target)
            if given.kind == "parameter" and self.module.get_parameter(name).is_meta:
                value = self.find(given)
                if not given.pieces:
                    self.put_back(name, value)

    def load_first(self) -> None:
        """Read the first parameter: libraries look at it for the device that a module is on."""
        for name, parameter in itertools.islice(self.module.named_parameters(), 1):
            if parameter.is_meta:
                self.put_back(name, self._read(name, ()))

    def release(self, programs: Iterable[Program]) -> None:
        """Give back the memory of parameters of which programs take one and the same slice; the first one stays."""
        first = next(self.module.parameters(), None)
        taken = [given for program in programs for given in program.inputs if given.kind == "parameter"]
        pieces: dict[str, set[tuple[Piece, ...]]] = {}
        for given in taken:
            pieces.setdefault(str(given.target), set()).add(given.pieces)
        for given in taken:
            name, whole = str(given.target), self.module.get_parameter(str(given.target))
            if not given.pieces or len(pieces[name]) > 1 or whole.is_meta or whole is first:
                continue
            self.find(given)
            self._replace(whole, nn.Parameter(torch.empty_like(whole, device="meta"), whole.requires_grad))
            self._released[name] = given.pieces

    def release_others(self, programs: Iterable[Program]) -> None:
        """Give back the memory of parameters that none of the programs takes; the first parameter stays."""
        taken = {str(given.target) for program in programs for given in program.inputs if given.kind == "parameter"}
        first = next(self.module.parameters(), None)
        for name, whole in list(self.module.named_parameters()):
            if name not in taken and not whole.is_meta and whole is not first:
                nothing = whole.detach().flatten()[:0].clone()
                self._replace(whole, nn.Parameter(torch.empty_like(whole, device="meta"), whole.requires_grad))
                self._released[name], self._slices[name, NOTHING] = NOTHING, _Slice(nothing, None)
        self._differ = True

    def recover(self, gather: Gather) -> None:
        """Make the module whole again: released parameters are gathered, others read.

        Args:
            gather: from a parameter's shape, its pieces here and their values to the whole; every rank calls it for the
                same parameters in the same order.
        """
        for name in self._to_gather():
            whole, pieces = self.module.get_parameter(name), self._released.get(name, ())
            found = gather(whole.shape, pieces, self._slices[name, pieces].value if pieces else whole.detach())
            if pieces:
                self.put_back(name, found)
        self._slices.clear()
        for name, parameter in list(self.module.named_parameters()):
            if parameter.is_meta:
                self.put_back(name, self._read(name, ()))

    def _to_gather(self) -> list[str]:
        """The parameters that some rank released, the same on every rank: all, where ranks released different ones."""
        if not self._differ:
            return list(self._released)
        return [name for name, _ in self.module.named_parameters()] if self._source is None else []

    def put_back(self, name: str, value: torch.Tensor) -> None:
        """Give a parameter on the meta device its values."""
        stand_in = self.module.get_parameter(name)
        self._replace(stand_in, nn.Parameter(value, stand_in.requires_grad))
        self._released.pop(name, None)

    def _replace(self, old: nn.Parameter, new: nn.Parameter) -> None:
        for module in self.module.modules():
            for name, parameter in module._parameters.items():
                if parameter is old:
                    module._parameters[name] = new

    def _read(self, name: str, pieces: tuple[Piece, ...]) -> torch.Tensor:
        if self._source is None:
            raise UsageError(
                f"{name} is needed in another form than earlier calls took, and the rest of it was released; "
                "parallelize the pipeline with Plan(keep_weights=True) for such calls"
            )
        dtype = self.module.get_parameter(name).dtype
        return self._source.read(name, pieces).to(self._device, dtype)


def cut(whole: torch.Tensor, pieces: Iterable[Piece]) -> torch.Tensor:
    """Pieces of a tensor in memory of their own."""
    value = whole.detach()
    for piece in pieces:
        value = piece.of(value)
    return value.clone(memory_format=torch.contiguous_format)


def place(whole: torch.Tensor, pieces: tuple[Piece, ...], value: torch.Tensor) -> None:
    """Write what `cut` took back to where it came from."""
    if not value.numel():
        return
    if not pieces:
        whole.copy_(value)
        return
    first, *rest = pieces
    positions = torch.cat([torch.arange(*run, device=whole.device) for run in first.runs])
    if rest:
        inner = whole.index_select(first.dim, positions)
        place(inner, tuple(rest), value)
        value = inner
    whole.index_copy_(first.dim, positions, value)


def _state(tensor: torch.Tensor) -> tuple[int, int, int] | None:
    return None if tensor.is_meta else (id(tensor), tensor.data_ptr(), tensor._version)
