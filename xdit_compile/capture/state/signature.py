"""What a capture depends on besides the values of tensors: equal signatures share a program, others need their own."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Collection, Hashable, Iterable
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from .attributes import VALUES, Same, Seen, described, keep, place_of_change
from .in_place import HELD, own_class

TORCH_STATE = frozenset(vars(nn.Module()))
"""Names that every module carries; those that matter are read by name."""

AROUND = frozenset({"forward", HELD, "_hf_hook", "_old_forward", "_diffusers_hook"})
"""Attributes of a root that concern what happens around its forward, or what stands in its place."""

HOOKS = ("_forward_pre_hooks", "_forward_hooks")

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
            and (self.modules is other.modules or self.modules == other.modules)
            and self.spec == other.spec
        )

    @property
    def call(self) -> tuple[Hashable, ...]:
        """What describes the call alone, without the module called."""
        return (self.spec, self.leaves, self.ambient)

    def difference(self, other: Signature, most: int = 8) -> str:
        """What changed from this signature to the other, in words; empty where nothing did."""
        differences = []
        if self.spec != other.spec:
            differences.append("the containers of the inputs differ")
        else:
            pairs = enumerate(zip(self.leaves, other.leaves, strict=True))
            differences += [f"input {i} was {_say(a)} and is {_say(b)}" for i, (a, b) in pairs if a != b]
        if self.ambient != other.ambient:
            differences.append(f"autocast was {self.ambient} and is {other.ambient}")
        if self.modules != other.modules:
            differences += _changed_modules(self.modules, other.modules)
        return "; ".join(differences[:most]) + (
            f"; and {len(differences) - most} more" if len(differences) > most else ""
        )


def signature(module: nn.Module, args: tuple, kwargs: dict, modules: Fingerprint | None = None) -> Signature:
    """Describe a call of a module.

    Args:
        modules: the fingerprint of the module, where it is known.

    Noticed are: containers, shapes, dtypes, devices and non-tensor arguments; autocast; and in the module tree the
    identity of modules, parameters, hooks, patched methods and of every object or function that hangs on a module
    (attention processors), shapes of buffers, and flags and numbers. Not noticed are: the root's own ``forward``,
    patched or not; values and strides of tensors that are inputs, parameters or buffers. All else that hangs on a
    module counts as deep as it goes, tensors by their values (`attributes.py`).
    """
    leaves, spec = pytree.tree_flatten((args, kwargs))
    ambient = tuple(
        torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None for kind in ("cpu", "cuda")
    )
    modules = fingerprint(module) if modules is None else modules
    return Signature(spec, tuple(_leaf(leaf) for leaf in leaves), ambient, modules)


def fingerprint(module: nn.Module, seen: Seen | None = None) -> Fingerprint:
    """Path and state of each module of a tree, as far as it decides what the tree computes.

    Args:
        seen: takes up the containers and objects that were met, where somebody wants to know them.
    """
    states: Fingerprint = {}
    seen = {} if seen is None else seen
    pending = [("", module)]
    while pending:
        path, item = pending.pop()
        states[path] = tuple(_state(item, not path, seen))
        prefix = f"{path}." if path else ""
        pending += [(prefix + name, child) for name, child in item._modules.items() if child is not None]
    return states


def kept(states: Fingerprint) -> Fingerprint:
    """The same fingerprint, which can be compared from now on whatever becomes of the tensors that it describes."""
    for state in states.values():
        keep(state)
    return states


def changes(before: Fingerprint, after: Fingerprint) -> dict[tuple[str, str], str]:
    """What differs between two fingerprints: module and attribute, with the path to the change in words."""
    differences = {}
    for path in [path for path in before if path in after and before[path] != after[path]]:
        old, new = _by_name(before[path]), _by_name(after[path])
        for name in _differing(old, new):
            inside = place_of_change(old.get(name, ())[:1], new.get(name, ())[:1])
            differences[path, name] = f"{name}{inside} of {path or 'the module itself'}"
    return differences


def without(states: Fingerprint, entries: Collection[tuple[str, str]]) -> Fingerprint:
    """A fingerprint without some attributes of some modules."""
    return {
        path: tuple(entry for position, entry in enumerate(state) if position < 3 or (path, entry[0]) not in entries)
        for path, state in states.items()
    }


def _state(module: nn.Module, root: bool, seen: Seen) -> Iterable[Any]:
    attributes = vars(module)
    yield id(module)
    yield own_class(module)
    yield module.training
    if root:
        yield ("forward", Same(getattr(own_class(module), "forward", None)))
    for name, parameter in attributes["_parameters"].items():
        if parameter is not None:
            yield (name, id(parameter), parameter.shape, parameter.dtype, parameter.device)
    for name, buffer in attributes["_buffers"].items():
        if buffer is not None:
            yield (name, buffer.shape, buffer.dtype, buffer.device)
    for hooks in HOOKS:
        if attributes[hooks]:
            yield (hooks, *(described(hook, seen) for hook in attributes[hooks].values()))
    for name, value in attributes.items():
        if name in TORCH_STATE or value is None or (root and name in AROUND):
            continue
        yield (name, value if value.__class__ in VALUES else described(value, seen))


def _leaf(leaf: Any) -> Hashable:
    if isinstance(leaf, torch.Tensor):
        return (leaf.shape, leaf.dtype, leaf.device)
    if leaf is None or leaf.__class__ in VALUES or isinstance(leaf, enum.Enum):
        return (leaf.__class__, leaf)
    return described(leaf, {})


def _changed_modules(before: Fingerprint, after: Fingerprint) -> list[str]:
    differences = [f"module {path or '(root)'} is gone" for path in before if path not in after]
    differences += [f"module {path or '(root)'} is new" for path in after if path not in before]
    for path in before:
        if path in after and before[path] != after[path]:
            differences.append(f"module {path or '(root)'}: {_changed_state(before[path], after[path])}")
    return differences


def _changed_state(before: tuple[Any, ...], after: tuple[Any, ...]) -> str:
    if before[0] != after[0]:
        return f"another {_say(after[1])} in place of a {_say(before[1])}"
    if before[2] != after[2]:
        return "its training flag"
    names = _differing(_by_name(before), _by_name(after))
    return ", ".join(names) if names else "the order of its attributes"


def _differing(old: dict[str, tuple[Any, ...]], new: dict[str, tuple[Any, ...]]) -> list[str]:
    return [name for name in {**old, **new} if old.get(name) != new.get(name)]


def _by_name(state: tuple[Any, ...]) -> dict[str, tuple[Any, ...]]:
    return {entry[0]: entry[1:] for entry in state[3:]}


def _say(value: Any) -> str:
    if isinstance(value, type):
        return value.__name__
    if isinstance(value, tuple) and len(value) == 3 and isinstance(value[0], torch.Size):
        return f"{value[1]}{tuple(value[0])} on {value[2]}"
    return repr(value[1]) if isinstance(value, tuple) and len(value) == 2 else repr(value)
