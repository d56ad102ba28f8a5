"""The forms of tensors inside a root graph, found without any values: what a compiler has to know ahead of time."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from xdit_compile.cache.values import device_of_kind, from_plain, to_plain
from xdit_compile.ir.arguments import sequence_of


class TensorForm(NamedTuple):
    """What compiled code depends on of a tensor."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def empty(self) -> torch.Tensor:
        """A tensor of this form; a fake one where fake tensors are made."""
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=self.device)


Forms = tuple[Any, ...]
"""Of each argument its `TensorForm`, or the value itself."""


def form_of(value: Any) -> Any:
    """What compiled code depends on of one argument: a tensor's form, or the value itself."""
    if not isinstance(value, torch.Tensor):
        return value
    return TensorForm(tuple(value.shape), value.stride(), value.dtype, value.device)


def form_to_plain(form: Any) -> Any:
    """The form of an argument as plain data; of its device the kind."""
    if not isinstance(form, TensorForm):
        return {"value": to_plain(form)}
    return [list(form.shape), list(form.stride), to_plain(form.dtype), form.device.type]


def form_from_plain(plain: Any, device: torch.device) -> Any:
    """The form that `form_to_plain` described, on a device of its kind."""
    if isinstance(plain, dict):
        return from_plain(plain["value"])
    shape, stride, dtype, kind = plain
    return TensorForm(tuple(shape), tuple(stride), from_plain(dtype), device_of_kind(kind, device))


def contiguous(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> TensorForm:
    """The form of a tensor whose strides follow from its shape."""
    return TensorForm(tuple(shape), torch.empty(shape, device="meta").stride(), dtype, device)


def fakes_of(mode: FakeTensorMode, forms: Forms) -> list[Any]:
    """Arguments of these forms without values."""
    with mode:
        return [form.empty() if isinstance(form, TensorForm) else form for form in forms]


@torch.no_grad()
def forms_inside(root: fx.GraphModule, inputs: Forms) -> list[Forms]:
    """The forms of the arguments of every call of a structure, in order, from those of the root's inputs."""
    walk = _Walk(root, inputs)
    called = [node for node in root.graph.nodes if node.op == "call_module"]
    return [tuple(map(form_of, walk.arguments(node))) for node in called]


class _Walk:
    """Values of a root graph, each worked out when it is asked for: what no structure takes is never looked at."""

    def __init__(self, root: fx.GraphModule, inputs: Forms):
        self._root, self._mode = root, FakeTensorMode()
        placeholders = root.graph.find_nodes(op="placeholder")
        self._values: dict[fx.Node, Any] = dict(zip(placeholders, fakes_of(self._mode, inputs), strict=True))
        self._known: dict[Any, Any] = {}

    def arguments(self, call: fx.Node) -> tuple[Any, ...]:
        """The arguments of a call."""
        return fx.map_arg(call.args, self._value)

    def _value(self, node: fx.Node) -> Any:
        if node not in self._values:
            args = self.arguments(node)
            if node.target is operator.getitem:
                self._values[node] = args[0][args[1]]
            elif node.op == "call_module":
                self._values[node] = self._called(str(node.target), args)
            else:
                function: Any = node.target
                with self._mode:
                    self._values[node] = function(*args, **node.kwargs)
        return self._values[node]

    def _called(self, target: str, args: tuple[Any, ...]) -> Any:
        """The results of a structure, worked out once for all calls of one form."""
        key = (target, *map(form_of, args))
        if key not in self._known:
            structure = self._root.get_submodule(target)
            assert isinstance(structure, fx.GraphModule)
            with self._mode:
                results = _Fakes(structure, self._mode).run(*args)
                self._known[key] = pytree.tree_map_only(torch.Tensor, _dense, results)
        return self._known[key]


def layout_of(result: torch.Tensor) -> torch.memory_format:
    """The order of the dims in memory in which a structure gives a result: as it comes by itself where channels are
    last, else dim by dim, so that all calls of what takes it are of one form."""
    if result.ndim == 4 and result.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    if result.ndim == 5 and result.is_contiguous(memory_format=torch.channels_last_3d):
        return torch.channels_last_3d
    return torch.contiguous_format


def _dense(result: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(result, memory_format=layout_of(result))


@torch.no_grad()
def give_dense(structure: fx.GraphModule, forms: Forms) -> None:
    """Change a structure so that every result is laid out as `layout_of` says."""
    mode = FakeTensorMode()
    with mode:
        results = _Fakes(structure, mode).run(*fakes_of(mode, forms))
    output = structure.graph.output_node()
    leaves = list(sequence_of(output.args[0]))
    with structure.graph.inserting_before(output):
        for position, (leaf, result) in enumerate(zip(leaves, results, strict=True)):
            layout = layout_of(result) if isinstance(result, torch.Tensor) else None
            if layout is not None and not result.is_contiguous(memory_format=layout):
                arguments: dict[str, Any] = {"memory_format": layout}
                leaves[position] = structure.graph.call_function(torch.ops.aten.clone.default, (leaf,), arguments)
    output.args = (tuple(leaves),)
    structure.recompile()


class _Fakes(fx.Interpreter):
    """Runs a graph on fake tensors; those that it holds itself are made fake, too."""

    def __init__(self, structure: fx.GraphModule, mode: FakeTensorMode):
        super().__init__(structure)
        self._mode = mode

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        return pytree.tree_map_only(torch.Tensor, self._mode.from_tensor, super().get_attr(target, args, kwargs))
