"""Lowering one recorded graph to functional ATen, with the operators that matter kept whole."""

from __future__ import annotations

import warnings

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor

from .errors import CaptureError
from .simplify import simplify


class DataDependence(CaptureError):
    """A size or number in a graph that depends on the values of tensors."""


def lower(graph: fx.GraphModule) -> fx.GraphModule:
    """Decompose a graph to functional ATen as ``ExportedProgram.run_decompositions({})`` does.

    Args:
        graph: placeholders with static fakes in ``meta["val"]`` and one flat tuple as output.

    Returns:
        A graph with the same placeholders, in the same order, and the same outputs.

    Raises:
        CaptureError: where it writes to a placeholder, or makes a constant of its own.
    """
    examples = tuple(node.meta["val"] for node in graph.graph.nodes if node.op == "placeholder")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(graph, examples, strict=False).run_decompositions({})
    if any(spec.kind.name != "USER_OUTPUT" for spec in program.graph_signature.output_specs):
        raise CaptureError("a part of the graph writes to a tensor that comes from outside it")
    if any(spec.kind.name != "USER_INPUT" for spec in program.graph_signature.input_specs):
        raise CaptureError("a part of the graph holds constants that were not lifted")
    lowered = fx.GraphModule(torch.nn.Module(), program.graph_module.graph)
    clean(lowered)
    return lowered


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
