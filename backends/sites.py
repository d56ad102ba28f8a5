"""Runs a root graph by functions, one for each of its calls, that were compiled for the tensors which come there."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import fx

from xdit_compile.ir.inline_calls import flatten
from xdit_compile.ir.precision import products

from .forms import Forms, form_of, forms_inside

Run = Callable[..., Any]
Compile = Callable[[fx.GraphModule, Forms], Run]


@dataclasses.dataclass(frozen=True)
class Job:
    """One thing that is compiled.

    Args:
        target: the structure's name.
        forms: of the arguments of its calls.
        sites: the names of these calls.
    """

    target: str
    forms: Forms
    sites: tuple[str, ...]


class Sites:
    """A root graph whose structures are compiled for the tensors of its calls, before the first of these or at it.

    A structure that is called in several forms is compiled once for each. The form of a root's inputs decides that of
    every value inside, and all of it but the strides belongs to the signature that a program is made for: so strides
    are all that is looked at from run to run, and calls go to compiled code at once. Compilers also go by whether
    products of float32 may be TF32, which is not allowed while results are compared with the module's.

    Args:
        root: wires calls of structures together.
        compile_structure: from a structure, which it leaves as it is, and the forms of a call's arguments to what
            computes it.
    """

    def __init__(self, root: fx.GraphModule, compile_structure: Compile):
        self._root, self._compile = root, compile_structure
        self._calls = {f"site_{at}": str(node.target) for at, node in enumerate(_called(root.graph))}
        self._graph = copy.deepcopy(root.graph)
        for name, node in zip(self._calls, _called(self._graph), strict=True):
            node.target = name
        self._compiled: dict[tuple[str, Forms], Run] = {}
        self._runs: dict[Forms, Run] = {}
        self._form: tuple[Any, ...] = ()
        self._latest: Run | None = None
        self.meanwhile: Run | None = None
        """What computes the root while its structures are compiled elsewhere."""

    def __call__(self, *tensors: torch.Tensor) -> Any:
        """What the root computes."""
        if self.meanwhile is not None:
            return self.meanwhile(*tensors)
        form = (*products(), *[tensor.stride() for tensor in tensors])
        if self._latest is None or form != self._form:
            known = self._runs.get(form)
            if known is None:
                return self._first(form, tensors)
            self._form, self._latest = form, known
        return self._latest(*tensors)

    def run_meanwhile(self) -> None:
        """Run the root op by op from now on, until ``meanwhile`` is nothing again."""
        self.meanwhile = flatten(self._root).forward

    def jobs(self, inputs: Forms) -> list[Job]:
        """What has to be compiled for inputs of these forms, in the order of the calls."""
        sites: dict[tuple[str, Forms], list[str]] = {}
        for (name, target), forms in zip(self._calls.items(), forms_inside(self._root, inputs), strict=True):
            sites.setdefault((target, forms), []).append(name)
        return [Job(*key, tuple(names)) for key, names in sites.items()]

    def structure(self, target: str) -> fx.GraphModule:
        """The graph of a structure by its name."""
        structure = self._root.get_submodule(target)
        assert isinstance(structure, fx.GraphModule)
        return structure

    def supply(self, inputs: Forms, made: Iterable[tuple[Job, Run]]) -> None:
        """Take what was compiled of all `jobs` for inputs of these forms."""
        runs: dict[str, Run] = {}
        for job, run in made:
            self._compiled[job.target, (*products(), *job.forms)] = run
            runs.update(dict.fromkeys(job.sites, run))
        self._runs[(*products(), *[form.stride for form in inputs])] = fx.GraphModule(runs, self._graph).forward

    def _first(self, form: Forms, tensors: Sequence[torch.Tensor]) -> Any:
        """Compile what is met on the way through a first run."""
        sites = {name: _Site(self._found, target) for name, target in self._calls.items()}
        result = fx.GraphModule(sites, self._graph).forward(*tensors)
        runs = {name: site.run for name, site in sites.items()}
        self._form, self._latest = form, fx.GraphModule(runs, self._graph).forward
        self._runs[form] = self._latest
        return result

    def _found(self, target: str, args: Sequence[Any]) -> Run:
        forms = tuple(map(form_of, args))
        key = (target, (*products(), *forms))
        if key not in self._compiled:
            self._compiled[key] = self._compile(self.structure(target), forms)
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
