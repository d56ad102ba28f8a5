"""Recording a module of which parts read values that it computes: these parts are kept as they are."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from xdit_compile.capture.state.module_snapshot import preserved
from xdit_compile.ir.kept_modules import Example, kept

from .by_values import by_values
from .known_values import UnknownValue
from .tracing import Flat, Trace


def by_modules(flat: Flat) -> Trace:
    """Trace on fakes, with every module that reads values it computed kept as one operator.

    Raises:
        CaptureError: where the outermost module reads them, or one of those has inputs or results that cannot be kept.
    """
    readers: dict[str, nn.Module] = {}
    examples: dict[str, Example] = {}
    while True:
        inside: list[str] = []
        try:
            parts = {path: (readers[path], examples.get(path)) for path in readers}
            with preserved(flat.module), kept(parts) as made, _entered(flat.module, inside):
                trace = by_values(flat)
            return dataclasses.replace(trace, kept=tuple(made))
        except UnknownValue:
            if not inside or inside[-1] in readers:
                raise
            modules = dict(flat.module.named_modules())
            kind = type(modules[inside[-1]])
            readers |= {path: module for path, module in modules.items() if type(module) is kind}
            if flat.runs:
                examples |= _examples(flat, {path: readers[path] for path in readers if path not in examples})
                readers = {path: module for path, module in readers.items() if path in examples}


@contextmanager
def _entered(module: nn.Module, inside: list[str]) -> Iterator[None]:
    """Keep the paths of the modules whose calls have begun and not ended, outermost first."""
    handles = []
    for path, child in module.named_modules():
        if path:
            handles.append(child.register_forward_pre_hook(lambda *_, path=path: inside.append(path)))
            handles.append(child.register_forward_hook(lambda *_: _nothing(inside.pop())))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _nothing(_: Any) -> None:
    """Nothing: what a hook returns takes the place of a result."""


@torch.no_grad()
def _examples(flat: Flat, modules: dict[str, nn.Module]) -> dict[str, Example]:
    """The last call of each module, while the whole runs once."""
    examples: dict[str, Example] = {}
    handles = [
        module.register_forward_hook(
            lambda _, args, kwargs, result, path=path: _nothing(examples.update({path: Example(args, kwargs, result)})),
            with_kwargs=True,
        )
        for path, module in modules.items()
    ]
    try:
        args, kwargs = flat.own_inputs()
        flat.call(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return examples
