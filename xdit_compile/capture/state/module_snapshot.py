"""Keeping a module unharmed: whatever a trace puts in its attributes and caches is taken out again."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any

import torch
from torch import nn

from xdit_compile.distributed.devices import current_generators
from xdit_compile.ir.versions import version_of


def same_random_numbers() -> AbstractContextManager[None]:
    """Give the random generators back as they were."""
    kinds = [kind for kind in current_generators() if kind != "cpu"]
    if not kinds:
        return torch.random.fork_rng([])
    return torch.random.fork_rng([torch.accelerator.current_device_index()], device_type=kinds[0])


@contextmanager
def preserved(module: nn.Module) -> Iterator[None]:
    """Restore every attribute of a module tree, of the plain objects that hang on it and of their containers.

    A trace runs the module on fakes; a table that the module caches meanwhile would be one and break the next real
    call. Memoised functions of the classes involved are emptied for the same reason.
    """
    saved = _snapshot(module)
    try:
        yield
    finally:
        for owner, content in saved:
            _restore(owner, content)
        _empty_memoised(module)


@contextmanager
def given_back(module: nn.Module, *others: Any, always: bool = False) -> Iterator[None]:
    """Where something fails inside, restore a module tree, its weights and what hangs on it to what it was before.

    Args:
        others: objects that are restored with it.
        always: restore it where nothing fails, too.
    """
    saved = _snapshot(module, *others)
    tensors = [_Kept(item) for item in _reachable(module, *others) if isinstance(item, torch.Tensor)]
    done = False
    try:
        yield
        done = not always
    finally:
        if not done:
            for owner, content in saved:
                _restore(owner, content)
            for tensor in tensors:
                tensor.give_back()


class _Kept:
    """A tensor with its memory and, unless it is a parameter, its values: only what counts steps is written to."""

    def __init__(self, tensor: torch.Tensor):
        self.tensor, self._data = tensor, tensor.data
        self._version = version_of(tensor)
        self._values = None if isinstance(tensor, nn.Parameter) or tensor.is_meta else tensor.detach().clone()

    def give_back(self) -> None:
        """Undo what was done to the tensor."""
        if self.tensor.device != self._data.device or self.tensor.data_ptr() != self._data.data_ptr():
            self.tensor.data = self._data
        if self._values is not None and version_of(self.tensor) != self._version:
            with torch.no_grad():
                self.tensor.copy_(self._values)


def _empty_memoised(module: nn.Module) -> None:
    kinds = {kind for child in module.modules() for kind in type(child).__mro__ if _is_foreign(kind)}
    sources = {sys.modules[kind.__module__] for kind in kinds if kind.__module__ in sys.modules}
    for value in [value for holder in [*kinds, *sources] for value in list(vars(holder).values())]:
        for each in _with_enclosed(value):
            if not isinstance(each, type) and callable(clear := getattr(each, "cache_clear", None)):
                clear()


def _with_enclosed(value: Any) -> Iterator[Any]:
    """A value and, of a function, what it encloses: a wrapper may hide the memoised function in itself."""
    yield value
    for cell in getattr(value, "__closure__", None) or ():
        with suppress(ValueError):
            yield cell.cell_contents


def _is_foreign(kind: type) -> bool:
    return kind.__module__.partition(".")[0] not in ("torch", "builtins")


def _snapshot(*roots: Any) -> list[tuple[Any, Any]]:
    """Shallow copies of all mutable holders reachable from modules or objects, without looking inside tensors."""
    holders = (item for item in _reachable(*roots) if isinstance(item, dict | list))
    return [(item, dict(item) if isinstance(item, dict) else list(item)) for item in list(holders)]


def _reachable(*roots: Any) -> Iterator[Any]:
    """All that hangs on modules or objects: holders, objects and tensors, each once."""
    seen: set[int] = set()
    pending: list[Any] = list(roots)
    while pending:
        item = pending.pop()
        if id(item) in seen or isinstance(item, type):
            continue
        seen.add(id(item))
        yield item
        if isinstance(item, dict):
            pending.extend(item.values())
        elif isinstance(item, list | tuple):
            pending.extend(item)
        elif not isinstance(item, torch.Tensor) and (isinstance(item, nn.Module) or _is_plain(item)):
            pending.append(vars(item))


def _is_plain(item: Any) -> bool:
    """An object of a class written in Python, whose attributes stand in its ``__dict__``."""
    return hasattr(item, "__dict__") and not callable(getattr(item, "__get__", None)) and not hasattr(item, "__spec__")


def _restore(owner: Any, content: Any) -> None:
    if isinstance(owner, dict):
        if len(owner) != len(content) or any(owner.get(key, owner) is not value for key, value in content.items()):
            owner.clear()
            owner.update(content)
    elif len(owner) != len(content) or any(a is not b for a, b in zip(owner, content, strict=True)):
        owner[:] = content
