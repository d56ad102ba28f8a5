"""A module's tensors as programs bind them: whole, or the slices that this rank keeps."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

import torch
from torch import nn

from xdit_compile.errors import UsageError
from xdit_compile.ir.program import Input, Program, WeightSlice
from xdit_compile.ir.versions import version_of

from .bindings import Bindings
from .joined import Joiner, Part
from .released import Refusals, Released, refuse_released, released
from .samples import Sample, Samples

MOST_NAMED = 3
Pieces = tuple[WeightSlice, ...]
Key = tuple[str, Pieces]
NOTHING = (WeightSlice(0, ()),)
"""The pieces of a parameter of which this rank keeps none."""
Gather = Callable[[torch.Size, Pieces, torch.Tensor], torch.Tensor]
State = tuple[int, int, int | None]


@dataclasses.dataclass(frozen=True)
class _Slice:
    """A slice, and the state of the tensor in the module that it was cut from."""

    value: torch.Tensor
    state: State
    sample: Sample

    def fits(self, whole: torch.Tensor | None) -> bool:
        return whole is not None and self.state == _state(whole)


class Source(Protocol):
    """Where parameters that the module does not hold are read from."""

    def read(self, name: str, pieces: Pieces) -> torch.Tensor:
        """Pieces of one parameter, or all of it where there are none."""
        ...

    def reopen(self) -> None:
        """Look at the files anew: from now on what they hold now is read."""
        ...


class Weights:
    """Parameters and buffers of a module, whole or in slices.

    A slice is cut once, and cut anew when its parameter was replaced or written to (`renew` notices the rest).
    Parameters of which every program takes the same slices can be released: the module then holds a stand-in that
    refuses to be read or written (`Released`), and goes by the name that the parameter had, wherever in the module an
    adapter puts it.

    Args:
        module: holds the parameters; those on the meta device are read from ``source``.
        source: where they are read from; without one they cannot be read. Buffers were read from it already.
        device: where what is read is put.
    """

    def __init__(self, module: nn.Module, source: Source | None = None, device: torch.device | str = "cpu"):
        self.module = module
        self._source = source
        self.device = device
        self._slices: dict[Key, _Slice] = {}
        self._samples: tuple[list[Key], Samples] | None = None
        self._held: dict[str, dict[Pieces, torch.Tensor]] = {}
        self._released: dict[str, Pieces] = {}
        self._wanted: dict[str, set[Pieces]] = {}
        self._read_whole: dict[State, tuple[str, Sample]] = {}
        self._differ = False
        self._refusals = Refusals()
        self._joiner = Joiner()
        self.bindings = Bindings()
        if source is not None:
            self._await_reading()

    @property
    def partial(self) -> bool:
        """Whether the module itself cannot run, because some of its parameters are not there."""
        return any(parameter.is_meta for parameter in self.module.parameters())

    @property
    def elements(self) -> int:
        """How many elements of the parameters this rank holds, whole ones and slices."""
        whole = sum(parameter.numel() for parameter in self.module.parameters() if not parameter.is_meta)
        held = sum(value.numel() for ways in self._held.values() for value in ways.values())
        return whole + held + sum(kept.value.numel() for kept in self._slices.values())

    def find(self, spec: Input) -> torch.Tensor:
        """The tensor for a parameter or buffer of a program.

        Raises:
            UsageError: it is not there, or was released and is wanted in another form than it was kept in.
        """
        if spec.members:
            return self._joiner.joined([self._part(member) for member in spec.members])
        name, whole = str(spec.target), self.whole(spec)
        if whole.is_meta:
            return self._absent(name, whole, spec.pieces)
        if not spec.pieces:
            return whole
        key = (name, spec.pieces)
        kept = self._slices.get(key)
        if kept is None or not kept.fits(whole):
            self._samples = None
            kept = self._slices[key] = _Slice(cut(whole, spec.pieces), _state(whole), Sample(whole))
        return kept.value

    def _part(self, spec: Input) -> Part:
        """A parameter, or what this rank has of it, that can be given another place in memory."""
        name, whole = str(spec.target), self.whole(spec)

        def put(value: torch.Tensor) -> None:
            if isinstance(whole, Released):
                self._held[whole.origin][spec.pieces] = value
            elif spec.pieces:
                self._slices[name, spec.pieces] = dataclasses.replace(self._slices[name, spec.pieces], value=value)
            else:
                self._move(whole, value)

        return Part(self.find(spec), put)

    def _move(self, whole: torch.Tensor, value: torch.Tensor) -> None:
        """Give a parameter its values in another place; what was read from a file is still that."""
        origin = self._origin(whole)
        whole.data = value
        if origin is not None:
            self._note_read([(origin, whole)])

    def whole(self, spec: Input) -> torch.Tensor:
        """The module's own tensor for a parameter or buffer of a program, or what stands in its place."""
        return _held(self.module, str(spec.target), spec.kind)

    def _absent(self, name: str, whole: torch.Tensor, pieces: Pieces) -> torch.Tensor:
        """What a program takes of a tensor that the module does not hold; slices of it are read once."""
        if not isinstance(whole, Released):
            raise UsageError(_lost([name]))
        ways = self._held.get(whole.origin, {})
        if pieces in ways:
            return ways[pieces]
        value = self._read(whole, pieces)
        if pieces:
            self._held.setdefault(whole.origin, {})[pieces] = value
        return value

    def values(self) -> list[torch.Tensor]:
        """One value of every parameter that is here, by dtype: ranks compare them once a request."""
        kinds: dict[tuple[torch.dtype, torch.device], list[torch.Tensor]] = {}
        for parameter in self.module.parameters():
            if not parameter.is_meta and parameter.numel():
                value = parameter.detach().reshape(-1)[parameter.numel() // 2]
                kinds.setdefault((parameter.dtype, parameter.device), []).append(value)
        return [torch.stack(values) for values in kinds.values()]

    def renew(self) -> None:
        """Forget slices of tensors that hold other values than when they were cut, to be called once a request.

        Of each tensor about 64 values are compared: that notices what raises no version number, such as writes
        through ``.data``. A write there that leaves all of them as they were is not seen.
        """
        if self._samples is None:
            self._samples = list(self._slices), Samples([kept.sample for kept in self._slices.values()])
        keys, samples = self._samples
        for at in samples.changed():
            self._forget(keys[at])

    def _forget(self, key: Key) -> None:
        self._slices.pop(key, None)
        self._samples = None
        self.bindings.forget()

    def _forget_gone(self) -> None:
        """Forget slices of tensors that are no more in the module."""
        present: dict[str, torch.Tensor] = dict(self.module.named_parameters(remove_duplicate=False))
        present.update(self.module.named_buffers(remove_duplicate=False))
        for key, kept in list(self._slices.items()):
            if not kept.fits(present.get(key[0])):
                self._forget(key)

    def refresh(self) -> None:
        """Forget every slice, and what was read and not changed since: it is cut or read anew.

        Raises:
            UsageError: a parameter was released and there is no file to read it from.
        """
        self.bindings.forget()
        if self._source is None:
            refuse_released(self.module)
        else:
            self._source.reopen()
            self._held.clear()
            self._released.clear()
            self._forget_read()
        self._wanted.clear()
        for key in list(self._slices):
            self._forget(key)

    def load(self, program: Program) -> None:
        """Read what a program takes of parameters that the module does not hold, and give the module whole ones."""
        self._forget_gone()
        for spec in program.parameters():
            if (whole := self.module.get_parameter(str(spec.target))).is_meta:
                value = self.find(spec)
                if not spec.pieces:
                    self._put_read(whole, value)

    def load_first(self) -> None:
        """Read the first parameter: libraries look at it for the device that a module is on."""
        for name, parameter in itertools.islice(self.module.named_parameters(), 1):
            if parameter.is_meta:
                self._put_read(parameter, self._absent(name, parameter, ()))

    def release(self, programs: Iterable[Program]) -> None:
        """Give back the memory of parameters of which all programs so far take one and the same slice.

        The first parameter stays.
        """
        for program in programs:
            for spec in program.parameters():
                self._wanted.setdefault(str(spec.target), set()).add(spec.pieces)
        for name, whole in self._releasable():
            ways = self._wanted.get(name, {()})
            if len(ways) == 1 and () not in ways:
                (pieces,) = ways
                self._let_go(name, whole, pieces, self.find(Input(name, "parameter", name, pieces)))
        self._refusals.put_on(self.module)

    def release_others(self, programs: Iterable[Program]) -> None:
        """Give back the memory of parameters that none of the programs takes; the first parameter stays."""
        taken = {str(spec.target) for program in programs for spec in program.parameters()}
        for name, whole in self._releasable():
            if name not in taken:
                self._let_go(name, whole, NOTHING, whole.detach().flatten()[:0].clone())
        self._differ = True
        self._refusals.put_on(self.module)

    def _releasable(self) -> list[tuple[str, nn.Parameter]]:
        """The parameters that can be had again: neither the first nor read from a file and changed since.

        Nor one of which the name is that of another one that was released.
        """
        others = [(name, each) for name, each in list(self.module.named_parameters())[1:] if not each.is_meta]
        known = self._source is None
        return [(n, each) for n, each in others if n not in self._released and (known or self._origin(each) == n)]

    def _let_go(self, name: str, whole: nn.Parameter, pieces: Pieces, value: torch.Tensor) -> None:
        self._forget((name, pieces))
        self._held[name], self._released[name] = {pieces: value}, pieces
        self._replace(whole, released(whole, name))

    def recover(self, gather: Gather) -> None:
        """Make the module whole again: released parameters are gathered, others read.

        Args:
            gather: from a parameter's shape, its pieces here and their values to the whole; every rank calls it for the
                same parameters in the same order (`to_gather`).

        Raises:
            UsageError: some parameters can neither be gathered nor read; nothing was changed.
        """
        lost = [n for n, p in self.module.named_parameters() if p.is_meta and not isinstance(p, Released)]
        if lost:
            raise UsageError(_lost(lost))
        with torch.inference_mode(False), torch.no_grad():
            for name in self.to_gather():
                whole = self.module.get_parameter(name)
                found = gather(whole.shape, *self._here(whole))
                if isinstance(whole, Released):
                    self._put_back(whole, found)
            for parameter in list(self.module.parameters()):
                if isinstance(parameter, Released):
                    self._put_read(parameter, self._read(parameter, ()))
        for key in list(self._slices):
            self._forget(key)
        self._refusals.take_off()

    def _here(self, whole: nn.Parameter) -> tuple[Pieces, torch.Tensor]:
        """What this rank has of a parameter."""
        if not isinstance(whole, Released):
            return (), whole.detach()
        pieces = self._released[whole.origin]
        return pieces, self._held[whole.origin][pieces]

    def to_gather(self) -> list[str]:
        """The parameters that some rank released, the same on every rank: all, where ranks released different ones."""
        if self._differ:
            return [name for name, _ in self.module.named_parameters()] if self._source is None else []
        named = self.module.named_parameters()
        return [name for name, each in named if isinstance(each, Released) and each.origin in self._released]

    def _put_back(self, stand_in: Released, value: torch.Tensor) -> nn.Parameter:
        """Give a released parameter its values."""
        made = nn.Parameter(value, stand_in.requires_grad)
        self._replace(stand_in, made)
        self._released.pop(stand_in.origin, None)
        self._held.pop(stand_in.origin, None)
        return made

    def _put_read(self, stand_in: torch.Tensor, value: torch.Tensor) -> None:
        assert isinstance(stand_in, Released)
        with torch.inference_mode(False):
            self._note_read([(stand_in.origin, self._put_back(stand_in, value))])

    def _forget_read(self) -> None:
        """Take out of the module what was read into it and not changed since.

        The first parameter and buffers are read at once.
        """
        assert self._source is not None
        buffers: list[tuple[str, torch.Tensor]] = []
        for name, buffer in self._stored_buffers():
            if (origin := self._origin(buffer)) is not None:
                owner, _, own = name.rpartition(".")
                read = self._source.read(origin, ()).to(self.device, buffer.dtype)
                self.module.get_submodule(owner)._buffers[own] = read
                buffers.append((origin, read))
        for parameter in list(self.module.parameters()):
            if not parameter.is_meta and (origin := self._origin(parameter)) is not None:
                self._replace(parameter, released(parameter, origin))
        self._read_whole = {}
        self._note_read(buffers)
        self.load_first()

    def _await_reading(self) -> None:
        """Put stand-ins in the place of parameters that are yet to be read."""
        for name, parameter in list(self.module.named_parameters()):
            if parameter.is_meta:
                self._replace(parameter, released(parameter, name))
        self._note_read(self._stored_buffers())
        self._refusals.put_on(self.module)

    def _note_read(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        self._read_whole.update((_state(tensor), (name, Sample(tensor))) for name, tensor in tensors)

    def _origin(self, tensor: torch.Tensor) -> str | None:
        """The name in the file of what was read from it and not changed since."""
        name, sample = self._read_whole.get(_state(tensor), (None, None))
        return None if sample is None or Samples([sample]).changed() else name

    def _stored_buffers(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The buffers that a file has."""
        for path, child in self.module.named_modules():
            for own, buffer in child._buffers.items():
                if buffer is not None and own not in child._non_persistent_buffers_set:
                    yield (f"{path}.{own}" if path else own), buffer

    def _replace(self, old: nn.Parameter, new: nn.Parameter) -> None:
        self.bindings.forget()
        for module in self.module.modules():
            for name, parameter in module._parameters.items():
                if parameter is old:
                    module._parameters[name] = new

    def _read(self, whole: Released, pieces: Pieces) -> torch.Tensor:
        if self._source is None:
            raise UsageError(
                f"this call needs other parts of {whole.origin} than calls before it, and the rest of it was released; "
                "call xdit_compile.restore(pipe) and parallelize it with Plan(keep_weights=True) for such calls"
            )
        with torch.inference_mode(False):
            return self._source.read(whole.origin, pieces).to(self.device, whole.dtype)


def _lost(names: list[str]) -> str:
    return (
        f"{', '.join(names[:MOST_NAMED])} {'is' if len(names) == 1 else 'are'} on the meta device, without values "
        "(adapters follow the device of the weights that they are added to, which were released); take the adapter "
        "off, call xdit_compile.restore(pipe), and add it again before you parallelize"
    )


def cut(whole: torch.Tensor, pieces: Iterable[WeightSlice]) -> torch.Tensor:
    """Pieces of a tensor in memory of their own."""
    with torch.inference_mode(False), torch.no_grad():
        value = whole.detach()
        for piece in pieces:
            value = piece.of(value)
        return value.clone(memory_format=torch.contiguous_format)


def place(whole: torch.Tensor, pieces: tuple[WeightSlice, ...], value: torch.Tensor) -> None:
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


def _state(tensor: torch.Tensor) -> State:
    return id(tensor), tensor.data_ptr(), version_of(tensor)


def _held(module: nn.Module, name: str, kind: str) -> torch.Tensor:
    """A parameter or buffer by its path, as ``get_parameter`` finds it; that takes longer, and looks at every call."""
    *path, attribute = name.split(".")
    holder: nn.Module | None = module
    for each in path:
        holder = None if holder is None else holder._modules.get(each)
    if holder is not None:
        tensor = (holder._parameters if kind == "parameter" else holder._buffers).get(attribute)
        if tensor is not None:
            return tensor
    return module.get_parameter(name) if kind == "parameter" else module.get_buffer(name)
