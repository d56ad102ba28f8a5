"""Programs run on the meta device: what every node yields, and the memory that it takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

from xdit_compile.ir.arguments import node_of, overload_of
from xdit_compile.ir.inline_calls import flatten
from xdit_compile.ir.peak_memory import peak_bytes
from xdit_compile.ir.program import Program
from xdit_compile.passes.axes.rule import operator_name

Shapes = Mapping[fx.Node, torch.Tensor]
HOST = torch.device("cpu")


def peak_of(program: Program, device: torch.device = HOST) -> int:
    """Bytes of activations that a program holds at one time when its operators run one by one.

    On an accelerator those of a convolution's workspace are among them: its library computes in another layout of
    memory than PyTorch's, and copies what it is given and what it gives.
    """
    kind = _OnMeta if device.type in ("cpu", "meta") else _WithWorkspaces
    with torch.no_grad():
        return peak_bytes(kind(flatten(program.root)).run, *_metas(program))


class _OnMeta(fx.Interpreter):
    """Runs a graph on the meta device, where attention would be taken apart and make scores that no kernel keeps."""

    def run_node(self, node: fx.Node) -> Any:
        if name_of(node) == "scaled_dot_product_attention":
            query, value = (self.env[node_of(node.args[operand])] for operand in (0, 2))
            return _laid_out((*query.shape[:-1], value.shape[-1]), node.meta.get("val", query), query)
        if node.op == "get_attr":
            return super().run_node(node).to("meta")
        if "device" in node.kwargs:
            args, kwargs = self.fetch_args_kwargs_from_env(node)
            return overload_of(node)(*args, **{**kwargs, "device": torch.device("meta")})
        return super().run_node(node)


class _WithWorkspaces(_OnMeta):
    """The same, with the room beside each convolution for its operand and its result once more."""

    def run_node(self, node: fx.Node) -> Any:
        result = super().run_node(node)
        if "conv" in name_of(node):
            count = self.env[node_of(node.args[0])].nbytes + result.nbytes
            torch.empty(count, dtype=torch.uint8, device="meta")
        return result


def _laid_out(shape: Sequence[int], like: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """An empty tensor whose dims lie in memory in the order of another's: graphs have views that count on it."""
    order = sorted(range(like.dim()), key=lambda dim: -like.stride()[dim])
    return torch.empty_permuted(shape, order, dtype=query.dtype, device=query.device)


def _metas(program: Program) -> list[torch.Tensor]:
    values = [node.meta["val"] for node in program.root.graph.find_nodes(op="placeholder")]
    shapes = [spec.sizes(value.shape) for spec, value in zip(program.inputs, values, strict=False)]
    shapes += [list(value.shape) for value in values[len(shapes) :]]
    return [torch.empty(shape, dtype=value.dtype, device="meta") for shape, value in zip(shapes, values, strict=True)]


def shapes_of(program: Program) -> Shapes:
    """What every node of every structure yields, on the meta device; calls of one form are looked at once."""
    yielded: dict[fx.Node, torch.Tensor] = {}
    results: dict[Any, Any] = {}

    class Recorder(_OnMeta):
        def run_node(self, node: fx.Node) -> Any:
            if node.op == "call_module":
                args, _ = self.fetch_args_kwargs_from_env(node)
                form = (str(node.target), *[(each.shape, each.stride(), each.dtype) for each in args])
                if form not in results:
                    results[form] = Recorder(getattr(program.root, str(node.target))).run(*args)
                return results[form]
            yielded[node] = super().run_node(node)
            return yielded[node]

    with torch.no_grad():
        Recorder(program.root).run(*_metas(program))
    return yielded


def name_of(node: fx.Node) -> str:
    """The name of the operator that a node calls; empty where it calls none."""
    return operator_name(node.target) if isinstance(node.target, torch._ops.OpOverload) else ""
