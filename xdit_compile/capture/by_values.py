"""Recording a module whose code reads values: known ones are baked in, and the inputs they came from guarded."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import get_proxy_mode, get_proxy_slot, make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils import _pytree as pytree

from xdit_compile.errors import CaptureError
from xdit_compile.ir.program import Guard, Input

from .known_values import KnownValues, ReadValues, on_host
from .plainly import stated_plainly
from .simplify import erase_with_sources
from .tracing import Flat, Trace, own_name

aten = torch.ops.aten
READERS = {aten._local_scalar_dense.default, aten.equal.default, aten.is_nonzero.default, aten.item.default}


def by_values(flat: Flat) -> Trace:
    """Trace on fakes that know their values where these follow from the inputs alone.

    Numbers and sizes that the module's code reads are baked into the graph. Each input that they follow from becomes a
    guard.

    Raises:
        CaptureError: where the code reads a value that depends on weights.
    """
    mode = FakeTensorMode(shape_env=ShapeEnv(), static_shapes=True, allow_non_fake_inputs=True)
    weights = {**dict(flat.named_parameters()), **dict(flat.named_buffers())}
    known = KnownValues(mode, weights.values())
    device = next((tensor.device for tensor in flat.tensors() if not tensor.is_meta), torch.device("cpu"))
    fakes = [_fake(mode, tensor, device) for tensor in flat.tensors()]
    for position, fake, tensor in zip(flat.positions, fakes, flat.tensors(), strict=True):
        if not tensor.is_meta:
            known.learn(fake, on_host(tensor).clone(), frozenset([position]))

    nodes: dict[int, fx.Node] = {}

    def run(parameters: list[torch.Tensor], tensors: list[torch.Tensor]) -> Any:
        recording = get_proxy_mode()
        assert recording is not None
        recorder = recording.tracer
        with mode, known, ReadValues(known), stated_plainly(mode, known), recorded_calls(flat, recorder.graph):
            result = functional_call(flat, dict(zip(weights, parameters, strict=True)), tuple(tensors))
        for fake in [*(one.fake for one in known.sized), *(mask for mask, _ in known.masks)]:
            if (slot := get_proxy_slot(fake, recorder, None)) is not None:
                nodes[id(fake)] = slot.proxy.node
        return result

    tracer = make_fx(
        run, tracing_mode="real", pre_dispatch=True, _allow_non_fake_inputs=True, _error_on_data_dependent_ops=False
    )
    module = tracer([_fake(mode, tensor, device) for tensor in weights.values()], fakes)
    inputs, constants = _describe(module, flat, weights, mode)
    bake(module, known, nodes, lambda value: add_constant(module.graph, value, inputs, constants, mode))
    guards = tuple(Guard(p, flat.leaves[p].detach().clone()) for p in sorted(known.read))
    return Trace(module, tuple(inputs), constants, guards=guards)


def _fake(mode: FakeTensorMode, tensor: torch.Tensor, device: torch.device) -> FakeTensor:
    """A fake of a tensor; one on the meta device stands for one beside the inputs."""
    fake = mode.from_tensor(tensor.detach(), static_shapes=True)
    return FakeTensor(mode, fake, device) if tensor.is_meta else fake


@contextmanager
def recorded_calls(flat: Flat, graph: fx.Graph) -> Iterator[None]:
    """Write into each node recorded meanwhile the nest of module calls it was made in, as ``meta["calls"]``."""
    handles, starts, count = [], [], [0]

    def enter(module: nn.Module, args: Any) -> None:
        starts.append(graph._root.prev)

    def leave(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, result: Any) -> None:
            count[0] += 1
            node = starts.pop().next
            while node.op != "root":
                node.meta["calls"] = ((path, f"{path}@{count[0]}"), *node.meta.get("calls", ()))
                node = node.next

        return hook

    try:
        for name, module in flat.module.named_modules():
            if name:
                handles.append(module.register_forward_pre_hook(enter))
                handles.append(module.register_forward_hook(leave(name)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _describe(
    module: fx.GraphModule, flat: Flat, weights: Mapping[str, torch.Tensor], mode: FakeTensorMode
) -> tuple[list[Input], dict[str, torch.Tensor]]:
    """Say what each placeholder is, and turn tensors that the graph holds into placeholders."""
    inputs: list[Input] = []
    constants: dict[str, torch.Tensor] = {}
    parameters = dict(flat.named_parameters())
    holders = module.graph.find_nodes(op="placeholder")
    for node, target in zip(holders, [*weights, *flat.positions], strict=True):
        if isinstance(target, int):
            inputs.append(Input(node.name, "user", target))
        else:
            inputs.append(Input(node.name, "parameter" if target in parameters else "buffer", own_name(str(target))))
    names = {id(tensor): holder for tensor, holder in zip(weights.values(), holders, strict=False)}
    for node in list(module.graph.nodes):
        node.meta.setdefault("calls", ())
        if node.op == "get_attr":
            value = getattr(module, str(node.target))
            if id(value) not in names:
                names[id(value)] = add_constant(module.graph, value, inputs, constants, mode)
            node.replace_all_uses_with(names[id(value)])
            module.graph.erase_node(node)
    result = module.graph.output_node()
    result.args = (tuple(pytree.tree_leaves(result.args[0])),)
    return inputs, constants


def add_constant(
    graph: fx.Graph, value: torch.Tensor, inputs: list[Input], constants: dict[str, torch.Tensor], mode: FakeTensorMode
) -> fx.Node:
    """A new placeholder, after the others, for a tensor that the program keeps."""
    last = graph.find_nodes(op="placeholder")[-1]
    with graph.inserting_after(last):
        node = graph.placeholder(f"constant_{len(constants)}")
    node.meta.update(val=mode.from_tensor(value.detach(), static_shapes=True), calls=())
    constants[node.name] = value.detach()
    inputs.append(Input(node.name, "constant", node.name))
    return node


def bake(
    module: fx.GraphModule, known: KnownValues, nodes: dict[int, fx.Node], constant: Callable[[torch.Tensor], fx.Node]
) -> None:
    """Replace in a recorded graph what has a size that depends on data by the constants it was.

    Args:
        known: what was seen while the graph was recorded; inputs that constants follow from are added to what was read.
        nodes: the node of each tensor in ``known.sized`` and ``known.masks``, by identity; those inside an operator
            that was recorded whole have none.
        constant: adds a placeholder for a tensor.
    """
    graph = module.graph
    known.read |= {source for one in known.sized if not one.parents for source in one.sources}
    for one in known.sized:
        if id(one.fake) not in nodes or any(id(parent) in nodes for parent in one.parents):
            continue
        if not one.sources <= known.read:
            continue
        node = nodes[id(one.fake)]
        node.replace_all_uses_with(constant(one.value.to(one.fake.device)))
        erase_with_sources(node)
    places = {nodes[id(mask)]: positions for mask, positions in known.masks if id(mask) in nodes}
    for node in graph.find_nodes(op="call_function", target=aten.index.Tensor):
        parts: list[fx.Node | None] = []
        for index in node.args[1]:
            if isinstance(index, fx.Node) and index.meta["val"].dtype in (torch.bool, torch.uint8):
                if index not in places:
                    raise CaptureError(f"{node.name} selects by a mask that was not seen")
                parts += [constant(place.to(index.meta["val"].device)) for place in places[index]]
            else:
                parts.append(index)
        node.args = (node.args[0], parts)
    for node in reversed(graph.nodes):
        if node.op == "call_function" and node.target in READERS and not node.users:
            erase_with_sources(node)
