"""Counts what inductor and Triton make of graphs for a card: kernels, launches, products, bytes, registers.

Code is generated and compiled as with ``backend="inductor"`` on a card. Attention is the flash operator: it reads
queries, keys and values, no mask, writes its result and nothing in between, and is neither among the launches nor among
the products. Nor are convolutions, of which bytes and arithmetic count, nor what a collective does inside, as with the
keys and values that travel around a ring.
"""

from __future__ import annotations

import ast
import copy
import dataclasses
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any
from unittest import mock

import torch
import torch._inductor
from torch import fx
from torch._inductor.graph import GraphLowering
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils import _pytree as pytree

from xdit_compile.backends.inductor import OPTIONS
from xdit_compile.backends.inductor_order import options_for, pin_order
from xdit_compile.backends.target.cards import Card
from xdit_compile.backends.target.pretend_card import DEVICE, Binary
from xdit_compile.capture.simplify import erase_with_sources
from xdit_compile.ir.program import Program

from .counts import Code, Counted, Kernel
from .roofline import Work

PRODUCTS = ("mm", "addmm", "bmm", "baddbmm")
ATTENTION = torch.ops.aten.scaled_dot_product_attention.default
FLASH = torch.ops.aten._scaled_dot_product_flash_attention.default


def count(
    graph: fx.GraphModule, args: Sequence[Any], binaries: list[Binary], card: Card, options: Mapping[str, Any] = OPTIONS
) -> Code:  # fmt: skip
    """Compile a graph for tensors on the pretended card, and count.

    Args:
        args: fake tensors.
        binaries: what Triton compiles, as `pretend_card` gives it.
        options: inductor's; by default those of our backend.

    Raises:
        RuntimeError: Triton compiled a kernel for something else than the card, or not at all.
    """
    sources, works = list[str](), list[Work]()

    def note(source: str) -> None:
        sources.append(source)
        works.append(Work.of(V.graph.scheduler.nodes, card))

    pin_order()
    with mock.patch.object(GraphLowering, "save_output_code", note):
        chosen = {**options_for(graph.graph, options), "fx_graph_cache": False}
        torch._inductor.compile(graph, list(args), options=chosen)
    calls = [call for source in sources for call in _calls(source)]
    variables = dict(pair for source in sources for pair in _kernels(source))
    kernels = set(variables.values())
    made = {binary.kernel: binary for binary in binaries if binary.target == card.target}
    if missing := kernels - made.keys():
        raise RuntimeError(f"Triton has no code for {card.target} of {', '.join(sorted(missing))}")
    names = [ast.unparse(call.func) for call in calls]
    launches = sum(name.removesuffix(".run") in variables for name in names)
    products = sum(name in [f"extern_kernels.{product}" for product in PRODUCTS] for name in names)
    products += sum(work.products for work in works)
    moved, flops, seconds = (sum(getattr(work, name) for work in works) for name in ("moved", "flops", "seconds"))
    floor = min(seconds, card.seconds(flops, sum(map(size_of, args)) + _results(graph, args)))
    used = tuple(Kernel(name, made[name].registers, made[name].stack) for name in sorted(kernels))
    return Code(used, launches, products, moved, flops, seconds, floor)


def _results(graph: fx.GraphModule, args: Sequence[Any]) -> int:
    """Bytes of what a graph gives."""
    mode = next(each.fake_mode for each in args if isinstance(each, FakeTensor))
    with mode, torch.no_grad():
        return sum(map(size_of, pytree.tree_leaves(graph(*args))))


def _kernels(source: str) -> Iterator[tuple[str, str]]:
    """The variables that hold Triton kernels, and the names of these."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Assign) and ast.unparse(node.value).startswith("async_compile.triton("):
            assert isinstance(node.value, ast.Call)
            yield ast.unparse(node.targets[0]), ast.literal_eval(node.value.args[0])


def _calls(source: str) -> Iterator[ast.Call]:
    return (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call))


def on_card(structure: fx.GraphModule) -> fx.GraphModule:
    """The same graph with its new tensors on the card, and attention by the flash operator, which takes no mask.

    Raises:
        ValueError: attention whose heads share keys.
    """
    graph = copy.deepcopy(structure.graph)
    for node in graph.find_nodes(op="call_function", target=ATTENTION):
        by_flash(node, ATTENTION)
    for node in graph.nodes:
        if node.kwargs.get("device") is not None:
            node.update_kwarg("device", DEVICE)
    return fx.GraphModule(structure, graph)


def by_flash(node: fx.Node, like: torch._ops.OpOverload) -> None:
    """Put the flash operator in the place of attention, which is called as ``like`` is; a mask is left out.

    Raises:
        ValueError: heads that share keys.
    """
    graph = node.graph
    taken = dict(zip([argument.name for argument in like._schema.arguments], node.args, strict=False)) | node.kwargs
    if taken.get("enable_gqa"):
        raise ValueError(f"heads of {node.name} share keys, which the flash operator does not count")
    rest: dict[str, fx.node.Argument] = {
        name: taken[name] for name in ("dropout_p", "is_causal", "scale") if name in taken
    }
    with graph.inserting_before(node):
        flash = graph.call_function(FLASH, tuple(taken[name] for name in ("query", "key", "value")), rest)
        node.replace_all_uses_with(graph.call_function(operator.getitem, (flash, 0)))
    graph.erase_node(node)
    mask = taken.get("attn_mask")
    if isinstance(mask, fx.Node) and mask.op == "call_function" and not mask.users:
        erase_with_sources(mask)


class _Walk(fx.Interpreter):
    """Counts every structure, for each form in which its arguments come, on the way through a root graph of fakes."""

    def __init__(self, root: fx.GraphModule, mode: FakeTensorMode, counting: Callable[..., Code]):
        super().__init__(root)
        self.extra_traceback = False
        self.found: dict[Any, Counted] = {}
        self._mode, self._counting = mode, counting

    def run_node(self, n: fx.Node) -> Any:
        if n.op != "call_module":
            return super().run_node(n)
        args, _ = self.fetch_args_kwargs_from_env(n)
        name = str(n.target)
        structure, form = on_card(self.fetch_attr(name)), (name, *map(form_of, args))
        if form not in self.found:
            code = self._counting(fx.GraphModule(structure, copy.deepcopy(structure.graph)), args)
            self.found[form] = Counted(name, n.meta.get("path", ""), 0, sum(map(size_of, args)), code)
        self.found[form] = dataclasses.replace(self.found[form], calls=self.found[form].calls + 1)
        with self._mode:
            return structure(*args)


def form_of(value: Any) -> Any:
    """What code depends on: shape, strides and dtype of a tensor, and anything else itself."""
    return (value.shape, value.stride(), value.dtype) if isinstance(value, torch.Tensor) else value


def size_of(value: Any) -> int:
    """Bytes of a tensor; none of anything else."""
    return value.numel() * value.element_size() if isinstance(value, torch.Tensor) else 0


def counted(
    program: Program, binaries: list[Binary], card: Card, step: Callable[[int], None] = lambda more: None
) -> list[Counted]:  # fmt: skip
    """Every structure of a program, in the order of their first calls.

    Args:
        step: told how many more structures are counted.
    """

    def counting(graph: fx.GraphModule, args: Sequence[Any]) -> Code:
        code = count(graph, args, binaries, card)
        step(1)
        return code

    mode = FakeTensorMode(shape_env=ShapeEnv())
    fakes = [node.meta["val"] for node in program.root.graph.find_nodes(op="placeholder")]
    with mode:
        inputs = [torch.empty_strided(each.shape, each.stride(), dtype=each.dtype, device=DEVICE) for each in fakes]
    walk = _Walk(program.root, mode, counting)
    with torch.no_grad():
        walk.run(*inputs)
    return list(walk.found.values())
