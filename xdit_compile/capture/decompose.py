"""Lowering one recorded graph to functional ATen, with the operators that matter kept whole."""

from __future__ import annotations

import operator
import warnings
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from xdit_compile.errors import CaptureError
from xdit_compile.ir.arguments import function_of, integer_of

from .mutations import written_arguments
from .simplify import simplify

COMPOSITE = torch._C.DispatchKey.CompositeImplicitAutograd


class DataDependence(CaptureError):
    """A size or number in a graph that depends on the values of tensors."""


def lower(module: fx.GraphModule) -> fx.GraphModule:
    """Decompose a graph to functional ATen, to what ``ExportedProgram.run_decompositions({})`` gives.

    Composite operators that neither alias nor write stay whole (``linear``, ``scaled_dot_product_attention``,
    ``layer_norm``, ...), the others (``reshape``, ``chunk``, ``to``, ...) are taken apart. Where nothing is written in
    place this is done here, several times faster than by exporting the graph once more.

    Args:
        module: placeholders with static fakes in ``meta["val"]`` and one flat tuple as output.

    Returns:
        A graph with the same placeholders, in the same order, and the same outputs.

    Raises:
        CaptureError: where it writes to a placeholder, or makes a constant of its own.
    """
    if any(written_arguments(node) for node in module.graph.nodes):
        lowered = functionalized(module)
    else:
        lowered = _Decomposition(module.graph).run()
    clean(lowered)
    return lowered


def functionalized(module: fx.GraphModule) -> fx.GraphModule:
    """Lower a graph by exporting it, which turns writes in place into new values."""
    examples = tuple(node.meta["val"] for node in module.graph.nodes if node.op == "placeholder")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(module, examples, strict=False).run_decompositions({})
    if any(spec.kind.name != "USER_OUTPUT" for spec in program.graph_signature.output_specs):
        raise CaptureError("a part of the graph writes to a tensor that comes from outside it")
    if any(spec.kind.name != "USER_INPUT" for spec in program.graph_signature.input_specs):
        raise CaptureError("a part of the graph holds constants that were not lifted")
    return fx.GraphModule(torch.nn.Module(), program.graph_module.graph)


def stays_whole(target: Any) -> bool:
    """Whether an operator is part of functional ATen as it is."""
    if not isinstance(target, torch._ops.OpOverload) or not target.has_kernel_for_dispatch_key(COMPOSITE):
        return True
    aliases = any(argument.alias_info is not None for argument in target._schema.arguments)
    pretends = torch.Tag.maybe_aliasing_or_mutating in target.tags
    return not (aliases or pretends or target._schema.is_mutable)


class _Decomposition(TorchDispatchMode):
    """Copies a graph without writes; composite operators run on fakes, and what they call is recorded instead."""

    def __init__(self, source: fx.Graph) -> None:
        super().__init__()
        self.source, self.graph = source, fx.Graph()
        self.nodes: dict[fx.Node, fx.Node] = {}
        self.made: dict[int, tuple[torch.Tensor, fx.Node]] = {}
        self.meta: dict[str, Any] = {}

    def run(self) -> fx.GraphModule:
        for node in self.source.nodes:
            self.meta = {key: node.meta[key] for key in ("stack_trace",) if key in node.meta}
            if node in self.nodes:
                continue
            if node.op == "call_function" and not stays_whole(node.target):
                self._take_apart(node)
            else:
                self.nodes[node] = self.graph.node_copy(node, lambda other: self.nodes[other])
        return fx.GraphModule(torch.nn.Module(), self.graph)

    def _take_apart(self, node: fx.Node) -> None:
        arguments = {source: source.meta["val"] for source in node.all_input_nodes}
        self.made = {id(value): (value, self.nodes[source]) for source, value in arguments.items()}
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda source: arguments[source])
        modes = {value.fake_mode for value in arguments.values() if isinstance(value, FakeTensor)}
        with next(iter(modes)), self:
            result = function_of(node)(*args, **kwargs)
        if isinstance(result, torch.Tensor):
            self.nodes[node] = self.made[id(result)][1]
        else:
            self._hand_out(node, [self.made[id(value)][1] for value in result])

    def _hand_out(self, node: fx.Node, results: list[fx.Node]) -> None:
        """Let those who took an item of a node's result take the node that made the item."""
        for user in list(node.users):
            if user.target is not operator.getitem:
                raise CaptureError(f"{user.name} takes all results of {node.name} at once")
            self.nodes[user] = results[integer_of(user.args[1])]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        refer = lambda value: self.made[id(value)][1] if isinstance(value, torch.Tensor) else value  # noqa: E731
        node = self.graph.call_function(func, *pytree.tree_map(refer, (args, kwargs)))
        node.meta.update(self.meta, val=out)
        if isinstance(out, torch.Tensor):
            self.made[id(out)] = (out, node)
        elif isinstance(out, list | tuple):
            for position, item in enumerate(out):
                taken = self.graph.call_function(operator.getitem, (node, position))
                taken.meta.update(self.meta, val=item)
                self.made[id(item)] = (item, taken)
        return out


def clean(module: fx.GraphModule) -> None:
    """Drop assertions and dead code and see to it that every value is a fake of static shape.

    Raises:
        CaptureError: naming the node whose size depends on data.
    """
    simplify(module)
    module.graph.eliminate_dead_code()
    for node in module.graph.nodes:
        node.meta.pop("nn_module_stack", None)
        if node.op == "get_attr":
            raise CaptureError(f"{node.target} is neither an input nor an operator of the graph")
        check_static(node)
    module.recompile()


def check_static(node: fx.Node) -> None:
    """See to it that a node has a value whose size is known.

    Raises:
        CaptureError: where it does not.
    """
    if node.op not in ("placeholder", "call_function"):
        return
    values = node.meta.get("val")
    for value in values if isinstance(values, list | tuple) else (values,):
        if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool):
            raise DataDependence(f"{node.name} ({node.target}) is a number that depends on data")
        if not isinstance(value, FakeTensor):
            raise CaptureError(f"{node.name} ({node.target}) is no tensor but {type(value).__name__}")
        if not all(type(size) is int for size in value.shape):
            raise DataDependence(f"{node.name} ({node.target}) has shape {tuple(value.shape)}, which depends on data")
