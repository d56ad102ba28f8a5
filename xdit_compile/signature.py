"""What a capture depends on besides the values of tensors: equal signatures share a program, others need their own."""

from __future__ import annotations

import dataclasses
import enum
import weakref
from collections.abc import Hashable, Iterable
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from .in_place import HELD, own_class

TORCH_STATE = frozenset(vars(nn.Module()))
"""Names that every module carries; those that matter are read by name."""

AROUND = frozenset({"forward", HELD, "_hf_hook", "_old_forward", "_diffusers_hook"})
"""Attributes of a root that concern what happens around its forward, or what stands in its place."""

HOOKS = ("_forward_pre_hooks", "_forward_hooks")
VALUES = frozenset({bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size, type})

Fingerprint = dict[str, tuple[Any, ...]]


@dataclasses.dataclass(frozen=True, eq=False)
class Signature:
    """A hashable description of a call and of the module called.

    Args:
        spec: the containers of ``(args, kwargs)``.
        leaves: for each flat leaf its shape, dtype and device, or the value itself where it is no tensor.
        ambient: the dtype that autocast uses on each kind of device, or None.
        modules: for each module by path what decides what it computes.
    """

    spec: pytree.TreeSpec
    leaves: tuple[Hashable, ...]
    ambient: tuple[Hashable, ...]
    modules: Fingerprint

    def __hash__(self) -> int:
        return hash((self.leaves, self.ambient, len(self.modules)))

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Signature)
            and self.leaves == other.leaves
            and self.ambient == other.ambient
            and self.modules == other.modules
            and self.spec == other.spec
        )

    def difference(self, other: Signature, most: int = 8) -> str:
        """What changed from this signature to the other, in words; empty where nothing did."""
        found = []
        if self.spec != other.spec:
            found.append("the containers of the inputs differ")
        else:
            pairs = enumerate(zip(self.leaves, other.leaves, strict=True))
            found += [f"input {i} was {_say(a)} and is {_say(b)}" for i, (a, b) in pairs if a != b]
        if self.ambient != other.ambient:
            found.append(f"autocast was {self.ambient} and is {other.ambient}")
        if self.modules != other.modules:
            found += _changed_modules(self.modules, other.modules)
        return "; ".join(found[:most]) + (f"; and {len(found) - most} more" if len(found) > most else "")


def signature(module: nn.Module, args: tuple, kwargs: dict) -> Signature:
    """Describe a call of a module.

    Noticed are: containers, shapes, dtypes, devices and non-tensor arguments; autocast; and in the module tree the
    identity of modules, parameters, hooks, patched methods and of every object or function that hangs on a module
    (attention processors), shapes of buffers, and flags and numbers. Not noticed are: the root's own ``forward``,
    patched or not; values and strides of tensors; tensors that a module keeps as plain attributes (caches).
    """
    leaves, spec = pytree.tree_flatten((args, kwargs))
    ambient = tuple(
        torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None for kind in ("cpu", "cuda")
    )
    return Signature(spec, tuple(_leaf(leaf) for leaf in leaves), ambient, fingerprint(module))


def fingerprint(module: nn.Module) -> Fingerprint:
    """Path and state of each module of a tree, as far as it decides what the tree computes."""
    found: Fingerprint = {}
    pending = [("", module)]
    while pending:
        path, item = pending.pop()
        found[path] = tuple(_state(item, root=not path))
        prefix = f"{path}." if path else ""
        pending += [(prefix + name, child) for name, child in item._modules.items() if child is not None]
    return found


def _state(module: nn.Module, root: bool) -> Iterable[Any]:
    own = vars(module)
    yield id(module)
    yield own_class(module)
    yield module.training
    if root:
        yield ("forward", _Same(getattr(own_class(module), "forward", None)))
    for name, parameter in own["_parameters"].items():
        if parameter is not None:
            yield (name, id(parameter), parameter.shape, parameter.dtype, parameter.device)
    for name, buffer in own["_buffers"].items():
        if buffer is not None:
            yield (name, buffer.shape, buffer.dtype, buffer.device)
    for hooks in HOOKS:
        if own[hooks]:
            yield (hooks, *(_Same(hook) for hook in own[hooks].values()))
    for name, value in own.items():
        if name in TORCH_STATE or value is None or (root and name in AROUND):
            continue
        if value.__class__ in VALUES:
            yield (name, value)
        elif (described := _attribute(value)) is not None:
            yield (name, described)


def _attribute(value: Any, depth: int = 0) -> Any:
    """What counts of an attribute; None for what does not: tensors, and containers that hold only them."""
    if value.__class__ in VALUES:
        return value
    if value is None or isinstance(value, torch.Tensor):
        return None
    if isinstance(value, enum.Enum):
        return (type(value), value.name)
    if isinstance(value, dict):
        pairs = ((key, _attribute(item, depth + 1)) for key, item in value.items())
        return tuple((key, item) for key, item in pairs if item is not None) or None
    if isinstance(value, list | tuple | set | frozenset):
        items = tuple(item for item in (_attribute(item, depth + 1) for item in value) if item is not None)
        return (frozenset(items) if isinstance(value, set | frozenset) else items) or None
    if isinstance(value, nn.Module) or depth or not hasattr(value, "__dict__"):
        return _Same(value)
    return (_Same(value), _attribute(vars(value), 1))


def _leaf(leaf: Any) -> Hashable:
    if isinstance(leaf, torch.Tensor):
        return (leaf.shape, leaf.dtype, leaf.device)
    if leaf is None or leaf.__class__ in VALUES or isinstance(leaf, enum.Enum):
        return (leaf.__class__, leaf)
    return _Same(leaf)


class _Same:
    """An object that equals only itself, without keeping it alive where it can be referred to weakly."""

    __slots__ = ("key", "reference")

    def __init__(self, value: Any) -> None:
        self.key = id(value)
        try:
            self.reference: Any = weakref.ref(value)
        except TypeError:
            self.reference = lambda: value

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, _Same) and self.key == other.key and (value := self.reference()) is not None
            and value is other.reference()
        )  # fmt: skip

    def __hash__(self) -> int:
        return self.key

    def __repr__(self) -> str:
        return f"a {type(self.reference()).__name__}"


def _changed_modules(before: Fingerprint, after: Fingerprint) -> list[str]:
    found = [f"module {path or '(root)'} is gone" for path in before if path not in after]
    found += [f"module {path or '(root)'} is new" for path in after if path not in before]
    for path in before:
        if path in after and before[path] != after[path]:
            found.append(f"module {path or '(root)'}: {_changed_state(before[path], after[path])}")
    return found


def _changed_state(before: tuple[Any, ...], after: tuple[Any, ...]) -> str:
    if before[0] != after[0]:
        return f"another {_say(after[1])} in place of a {_say(before[1])}"
    if before[2] != after[2]:
        return "its training flag"
    named = [{entry[0]: entry[1:] for entry in state[3:]} for state in (before, after)]  # type: ignore[index]
    names = [name for name in {**named[0], **named[1]} if named[0].get(name) != named[1].get(name)]
    return ", ".join(names) if names else "the order of its attributes"


def _say(value: Any) -> str:
    if isinstance(value, type):
        return value.__name__
    if isinstance(value, tuple) and len(value) == 3 and isinstance(value[0], torch.Size):
        return f"{value[1]}{tuple(value[0])} on {value[2]}"
    return repr(value[1]) if isinstance(value, tuple) and len(value) == 2 else repr(value)
