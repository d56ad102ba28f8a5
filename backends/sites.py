"""Runs a root graph by functions, one for each of its calls, that were compiled for the tensors which come there."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

Run = Callable[..., Any]
Compile = Callable[[fx.GraphModule, Sequence[Any]], Run]
Form = tuple[Any, ...]


class Sites:
    """A root graph whose structures are compiled for the tensors of its calls, when the first of these are there.

    A structure that is called in several forms is compiled once for each. The form of a root's inputs decides that of
    every value inside, and all of it but the strides belongs to the signature that a program is made for: so strides
    are all that is looked at from run to run, and calls go to compiled code at once. Compilers also go by whether
    products of float32 may be TF32, which is not allowed while results are compared with the module's.

    Args:
        root: wires calls of structures together.
        compile_structure: from a structure, which it may change, and the arguments of a call to what computes it.
    """

    def __init__(self, root: fx.GraphModule, compile_structure: Compile):
        self._root, self._compile = root, compile_structure
        self._calls = {f"site_{at}": str(node.target) for at, node in enumerate(_called(root.graph))}
        self._graph = copy.deepcopy(root.graph)
        for name, node in zip(self._calls, _called(self._graph), strict=True):
            node.target = name
        self._compiled: dict[tuple[str, Form], Run] = {}
        self._runs: dict[Form, Run] = {}
        self._form: tuple[Any, ...] = ()
        self._latest: Run | None = None

    def __call__(self, *tensors: torch.Tensor) -> Any:
        """What the root computes."""
        form = (*_precisions(), *[tensor.stride() for tensor in tensors])
        if self._latest is None or form != self._form:
            known = self._runs.get(form)
            if known is None:
                return self._first(form, tensors)
            self._form, self._latest = form, known
        return self._latest(*tensors)

    def _first(self, form: Form, tensors: Sequence[torch.Tensor]) -> Any:
        """Compile what is met on the way through a first run."""
        sites = {name: _Site(self._found, target) for name, target in self._calls.items()}
        result = fx.GraphModule(sites, self._graph).forward(*tensors)
        runs = {name: site.run for name, site in sites.items()}
        self._form, self._latest = form, fx.GraphModule(runs, self._graph).forward
        self._runs[form] = self._latest
        return result

    def _found(self, target: str, args: Sequence[Any]) -> Run:
        key = (target, (*_precisions(), *map(_form, args)))
        if key not in self._compiled:
            structure = self._root.get_submodule(target)
            assert isinstance(structure, fx.GraphModule)
            own = fx.GraphModule(structure, copy.deepcopy(structure.graph))
            self._compiled[key] = self._compile(own, args)
        return self._compiled[key]


class _Site:
    """One call of a structure, before it is known what computes it."""

    def __init__(self, find: Callable[[str, Sequence[Any]], Run], target: str):
        self._find, self._target = find, target
        self.run: Run | None = None

    def __call__(self, *args: Any) -> Any:
        self.run = self._find(self._target, args)
        return self.run(*args)


def _called(graph: fx.Graph) -> list[fx.Node]:
    return [node for node in graph.nodes if node.op == "call_module"]


def _precisions() -> tuple[str, ...]:
    return tuple(torch._C._get_fp32_precision_getter(kind, "matmul") for kind in ("cuda", "mkldnn"))


def _form(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    return (value.shape, value.stride(), value.dtype, value.device)
