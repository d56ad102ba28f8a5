"""Programs as plain data and tensors, and back; and both as one string of bytes.

What a call returns is described as the containers and objects that it is made of. Objects are made again without their
class's ``__init__``, by the parts that they had, as `xdit_compile.ir.results` copies them.
"""

from __future__ import annotations

import collections
import json
from collections.abc import Mapping
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import nn
from torch.utils import _pytree as pytree

from xdit_compile.ir.program import Guard, Input, Program, WeightSlice
from xdit_compile.ir.results import Slot, Spot, Template, container_of, is_open, members_of

from .graphs import Plain, Tensors, graph_from_plain, graph_to_plain, restored, stored
from .unportable import Unportable, inside
from .values import Make, class_at, from_plain, path_of, thing_at, to_plain

IN_FILES = {
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool,
}  # fmt: skip
"""Dtypes that every version of safetensors holds; tensors of others are written as bytes."""
PREFIX = 8
"""Bytes that say how long the text is."""
STRUCTURES = "structures/"
CLASSES: Mapping[str, Make] = {"class": class_at}


def program_to_plain(program: Program, structures: bool = True) -> tuple[Plain, Tensors]:
    """A program as plain data, with the tensors that belong to it: constants, guards, those of structures.

    Args:
        structures: whether the graphs of structures are described, or named alone.

    Raises:
        Unportable: modules that are kept as they are, a class that is not found by its name, sizes that are no numbers,
            and whatever else plain data cannot say; the message begins with where it stands.
    """
    if program.kept:
        names = ", ".join(each.name for each in program.kept)
        raise Unportable(f"it runs modules as they are, which no graph describes: {names}")
    with inside("root"):
        root, tensors = graph_to_plain(program.root, structures, STRUCTURES)
    constants = {f"constants/{name}": value for name, value in program.constants.items()}
    guards = {f"guards/{number}": guard.value for number, guard in enumerate(program.guards)}
    forms = {}
    for name, value in {**constants, **guards}.items():
        with inside(name):
            forms[name], values = stored(value)
            tensors |= {} if values is None else {name: values}
    with inside("the arguments of the call"):
        in_spec = _spec_to_plain(program.in_spec)
    plain = {
        "root": root,
        "inputs": [_input_to_plain(each) for each in program.inputs],
        "constants": {name: forms[f"constants/{name}"] for name in program.constants},
        "in_spec": in_spec,
        "outcome": _template_to_plain(program.outcome),
        "guards": [[guard.position, forms[name]] for name, guard in zip(guards, program.guards, strict=True)],
        "how": program.how,
    }
    return plain, tensors


def program_from_plain(
    plain: Plain,
    tensors: Mapping[str, torch.Tensor],
    device: torch.device | None = None,
    structures: Mapping[str, nn.Module] | None = None,
) -> Program:
    """The program that `program_to_plain` described.

    What registers the operators of its graphs has to be imported; modules of the classes in its result are imported
    here.

    Args:
        tensors: those that came with it.
        device: where constants and tensors of structures go that were on a device of its kind, and what such devices in
            graphs and results become.
        structures: what stands in the place of structures that were not described, by name; `Absent` for others.

    Raises:
        Unportable: an operator or class that is not there, or tensors that are missing.
    """
    with inside("root"):
        root = graph_from_plain(plain["root"], tensors, device, structures, STRUCTURES)
    constants = {
        name: restored(form, tensors.get(f"constants/{name}"), device) for name, form in plain["constants"].items()
    }
    guards = (
        Guard(position, restored(form, tensors.get(f"guards/{number}"), device))
        for number, (position, form) in enumerate(plain["guards"])
    )
    return Program(
        root,
        tuple(map(_input_from_plain, plain["inputs"])),
        constants,
        _spec_from_plain(plain["in_spec"]),
        _template_from_plain(plain["outcome"], device),
        tuple(guards),
        plain["how"],
    )


def packed(plain: Any, tensors: Mapping[str, torch.Tensor]) -> bytes:
    """Plain data and tensors as one string of bytes: the length of a text, the text, then a safetensors file.

    Tensors may be of any dtype and device and share memory; each is written by itself, as contiguous.
    """
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    others = {name: tensor for name, tensor in whole.items() if tensor.dtype not in IN_FILES}
    as_bytes = {name: [to_plain(tensor.dtype), list(tensor.shape)] for name, tensor in others.items()}
    written = {name: (_bytes_of(tensor) if name in others else tensor).clone() for name, tensor in whole.items()}
    text = json.dumps({"plain": plain, "as_bytes": as_bytes}, separators=(",", ":"), allow_nan=False).encode()
    return len(text).to_bytes(PREFIX, "little") + text + safetensors.torch.save(written)


def unpacked(data: bytes) -> tuple[Any, Tensors]:
    """What `packed` was given, all tensors on the CPU.

    Raises:
        Unportable: other bytes than `packed` makes.
    """
    end = PREFIX + int.from_bytes(data[:PREFIX], "little")
    try:
        header = json.loads(data[PREFIX:end])
        tensors = safetensors.torch.load(data[end:])
        for name, (dtype, shape) in header["as_bytes"].items():
            tensors[name] = tensors[name].view(from_plain(dtype)).reshape(shape)
        return header["plain"], tensors
    except (ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise Unportable(f"these {len(data)} bytes are no packed program: {error}") from error


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def _input_to_plain(each: Input) -> list[Any]:
    pieces = [[piece.dim, list(map(list, piece.runs))] for piece in each.pieces]
    return [each.name, each.kind, each.target, pieces, list(map(_input_to_plain, each.members))]


def _input_from_plain(plain: list[Any]) -> Input:
    name, kind, target, pieces, members = plain
    slices = tuple(WeightSlice(dim, tuple(map(tuple, runs))) for dim, runs in pieces)
    return Input(name, kind, target, slices, tuple(map(_input_from_plain, members)))


def _spec_to_plain(spec: pytree.TreeSpec) -> Any:
    """How the leaves of a call's arguments are put together: None for a leaf, else class, context and children."""
    if spec.is_leaf():
        return None
    context = to_plain(spec.context, _described_class)
    return [path_of(spec.type), context, [_spec_to_plain(child) for child in spec.children()]]


def _described_class(value: Any) -> Any:
    return {"class": path_of(value)} if isinstance(value, type) else None


def _spec_from_plain(plain: Any) -> pytree.TreeSpec:
    if plain is None:
        return pytree.tree_structure(0)
    path, context, children = plain
    kind = thing_at(path)
    if kind not in pytree.SUPPORTED_NODES:
        raise Unportable(f"{path} is no container that pytree knows")
    return pytree.TreeSpec(kind, from_plain(context, None, CLASSES), list(map(_spec_from_plain, children)))


def _template_to_plain(template: Template) -> Plain:
    with inside("the result of the call"):
        form, paths = to_plain(template.form, _DescribedParts()), to_plain(template.paths)
    return {"form": form, "count": template.count, "paths": paths}


def _template_from_plain(plain: Plain, device: torch.device | None) -> Template:
    form = from_plain(plain["form"], device, _MadeParts(device).makers)
    return Template(form, plain["count"], from_plain(plain["paths"]))


class _DescribedParts:
    """Describes containers and objects by their class and what they hold; one that stands in two places once.

    All but tuples are counted in the order in which they are met. Plain tuples are left to `to_plain`.
    """

    def __init__(self) -> None:
        self._numbers: dict[int, int] = {}
        self._alive: list[Any] = []

    def __call__(self, value: Any) -> Any:
        if isinstance(value, Slot):
            return {"slot": value.number}
        if not is_open(value) or type(value) in (tuple, torch.Size):
            return None
        if id(value) in self._numbers:
            return {"again": self._numbers[id(value)]}
        members = members_of(value)
        path, more = path_of(type(value)), _arguments(value)
        if not isinstance(value, tuple):
            _shell(type(value), more, 0)
            self._numbers[id(value)] = len(self._numbers)
            self._alive.append(value)
        described = [self._member(spot, part) for spot, part in members]
        return {"object": [path, to_plain(more, _described_class), list(getattr(value, "__dict__", ())), described]}

    def _member(self, spot: Spot, part: Any) -> list[Any]:
        return [spot.container is not None, to_plain(spot.key), spot.attribute, to_plain(part, self)]


class _MadeParts:
    """Makes again what `_DescribedParts` described, in the same order."""

    def __init__(self, device: torch.device | None):
        self._device = device
        self._known: list[Any] = []
        self.makers: dict[str, Make] = {"slot": Slot, "again": self._known.__getitem__, "object": self._object}

    def _object(self, plain: list[Any]) -> Any:
        path, more, attributes, members = plain
        cls = class_at(path)
        if issubclass(cls, tuple):
            return self._tuple(cls, members)
        items = sum(is_item for is_item, *_ in members)
        shell = _shell(cls, from_plain(more, self._device, CLASSES), items)
        self._known.append(shell)
        for name in attributes:  # they keep the order in which they were set
            Spot(attribute=name).put(shell, None)
        container = container_of(cls)
        for is_item, key, attribute, part in members:
            spot = Spot(container if is_item else None, from_plain(key, self._device), attribute)
            spot.put(shell, self._part(part))
        return shell

    def _tuple(self, cls: type[tuple], members: list[Any]) -> Any:
        parts = [(is_item, attribute, self._part(member)) for is_item, _, attribute, member in members]
        items = [member for is_item, _, member in parts if is_item]
        if pytree.is_structseq_class(cls):
            return cls(items)
        made = tuple.__new__(cls, items)
        for _, attribute, member in parts:
            if attribute is not None:
                Spot(attribute=attribute).put(made, member)
        return made

    def _part(self, plain: Any) -> Any:
        return from_plain(plain, self._device, self.makers)


def _arguments(value: Any) -> Any:
    """What a container needs to be made beside its items."""
    if isinstance(value, collections.defaultdict):
        return value.default_factory
    return value.maxlen if isinstance(value, collections.deque) else None


def _shell(cls: type, more: Any, count: int) -> Any:
    """A container or object of a class without what it holds, with room for so many items where they have numbers.

    Raises:
        Unportable: a class that is not written in Python.
    """
    container = container_of(cls)
    try:
        made = (container or object).__new__(cls)
    except TypeError as error:
        raise Unportable(f"objects of {path_of(cls)} are not made of attributes alone: {error}") from error
    if container is collections.defaultdict:
        container.__init__(made, more)
    elif container is collections.deque:
        container.__init__(made, [None] * count, more)
    elif container is list:
        container.extend(made, [None] * count)
    return made
