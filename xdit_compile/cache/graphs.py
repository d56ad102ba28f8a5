"""Graphs as plain data and back: nodes by what they call, their tensors beside them, and a digest of what they compute.

Of what hangs on nodes the keys of `KEPT` stay, which passes, reports and checks read once a program is made. What a
node was seen to make (``val``) comes back as a tensor on the meta device.
"""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.fx.immutable_collections import immutable_dict, immutable_list

from .unportable import Unportable, inside
from .values import device_of_kind, digest_of, from_plain, to_plain

Plain = dict[str, Any]
Tensors = dict[str, torch.Tensor]
FUNCTIONS: dict[str, Callable[..., Any]] = {"getitem": operator.getitem}
"""What nodes may call besides operators of PyTorch's."""
KEPT = ("val", "path", "repeated", "captured", "shape")


class Absent(nn.Module):
    """Stands in the place of a graph that was not kept.

    Args:
        name: what the graph that calls it has it as.
    """

    def __init__(self, name: str):
        super().__init__()
        self.name = name

    def forward(self, *args: Any) -> Any:
        """Raises NotImplementedError: there is nothing to run."""
        raise NotImplementedError(f"the graph of {self.name} was not kept: put what computes it in its place")


def graph_to_plain(module: fx.GraphModule, children: bool = True, prefix: str = "") -> tuple[Plain, Tensors]:
    """A graph and those that it calls as plain data, with the tensors that belong to them.

    Args:
        children: whether graphs that it calls are described, or named alone.
        prefix: what the names of its tensors begin with.

    Raises:
        Unportable: a node that calls neither an operator nor a function of `FUNCTIONS`, an argument that plain data
            cannot say, sizes that are no numbers, or a call of a module that is no graph.
    """
    if type(module.graph._codegen) is not fx.graph.CodeGen:
        raise Unportable("a graph with code of its own for its arguments cannot be described")
    plain: Plain = {"nodes": [], "tensors": {}, "children": {}}
    tensors: Tensors = {}
    for node in module.graph.nodes:
        with inside(node.name):
            plain["nodes"].append(_node_to_plain(node))
            target = str(node.target)
            if node.op == "get_attr":
                plain["tensors"][target], values = stored(_tensor_of(module, target))
                tensors |= {} if values is None else {prefix + target: values}
            elif node.op == "call_module" and target not in plain["children"]:
                child = _child_of(module, target)
                described = graph_to_plain(child, True, f"{prefix}{target}/") if children else (None, {})
                plain["children"][target] = described[0]
                tensors |= described[1]
    return plain, tensors


def graph_from_plain(
    plain: Plain,
    tensors: Mapping[str, torch.Tensor],
    device: torch.device | None = None,
    children: Mapping[str, nn.Module] | None = None,
    prefix: str = "",
) -> fx.GraphModule:
    """The graph that `graph_to_plain` described. What registers the operators that it calls has to be imported.

    Args:
        tensors: those that came with it, by the same names.
        device: what devices of its kind become.
        children: the modules in the place of graphs that were not kept; `Absent` for what is not among them.
        prefix: what the names of its tensors begin with.

    Raises:
        Unportable: an operator that is not registered, or a graph that is not well formed.
    """
    root: dict[str, Any] = {}
    for name, form in plain["tensors"].items():
        root[name] = restored(form, tensors.get(prefix + name), device)
    for name, child in plain["children"].items():
        if child is not None:
            root[name] = graph_from_plain(child, tensors, device, prefix=f"{prefix}{name}/")
        else:
            root[name] = (children or {}).get(name) or Absent(name)
    module = fx.GraphModule(root, _made_graph(plain["nodes"], device))
    try:
        module.graph.lint()
    except (RuntimeError, ValueError) as error:
        raise Unportable(f"a graph that is not well formed: {error}") from error
    return module


def canonical(module: fx.GraphModule) -> tuple[Plain, str]:
    """One structure as plain data that is equal for all that differ in names alone, and the digest of that.

    Nodes are ``n0``, ``n1`` and so on, in order. Tensors of the structure count by their values, operators by all of
    their arguments. What forms its placeholders have is not said, nor where tensors lie, and of devices among arguments
    the kind alone counts.

    Raises:
        Unportable: as in `graph_to_plain`, and a structure that calls another one.
    """
    names = {node: f"n{number}" for number, node in enumerate(module.graph.nodes)}
    attributes = [str(node.target) for node in module.graph.nodes if node.op == "get_attr"]
    renamed = {target: f"t{number}" for number, target in enumerate(dict.fromkeys(attributes))}
    nodes = []
    for node in module.graph.nodes:
        if node.op == "call_module":
            raise Unportable(f"{node.name}: a structure that calls another one is not described by itself")
        plain = _node_to_plain(node, names.__getitem__, ())
        if node.op == "placeholder":
            plain["target"] = names[node]
        elif node.op == "get_attr":
            plain["target"] = renamed[str(node.target)]
        nodes.append(plain)
    tensors = {name: _digested(_tensor_of(module, target)) for target, name in renamed.items()}
    whole = {"nodes": nodes, "tensors": tensors}
    return whole, digest_of(whole)


def tensor_form(tensor: torch.Tensor) -> Plain:
    """Shape, strides, dtype and kind of device of a tensor.

    Raises:
        Unportable: a size that is no number, or a tensor that is not laid out by strides.
    """
    if tensor.layout != torch.strided or tensor.is_quantized:
        raise Unportable(f"a tensor of the layout {tensor.layout}{', quantized,' if tensor.is_quantized else ''}")
    form = {"shape": list(tensor.shape), "stride": list(tensor.stride()), "dtype": tensor.dtype}
    return {name: to_plain(value) for name, value in form.items()} | {"device": tensor.device.type}


def stored(tensor: torch.Tensor) -> tuple[Plain, torch.Tensor | None]:
    """The form of a tensor, and its values in the order of memory, in new memory of the CPU; None on the meta device.

    Raises:
        Unportable: as in `tensor_form`, and a tensor of a class of its own, which may have no values.
    """
    if type(tensor) not in (torch.Tensor, nn.Parameter):
        raise Unportable(f"a {type(tensor).__name__} may be more than its values")
    plain = tensor.detach().resolve_conj().resolve_neg()
    form = tensor_form(plain)
    if plain.is_meta:
        return form, None
    plain = plain.cpu()
    if plain.is_contiguous():
        return form, plain.reshape(-1).clone()
    places = torch.arange(_extent(form)).as_strided(form["shape"], form["stride"]).reshape(-1)
    flat = torch.zeros(_extent(form), dtype=plain.dtype)
    flat[places] = plain.reshape(-1)
    return form, flat


def restored(form: Plain, values: torch.Tensor | None, device: torch.device | None = None) -> torch.Tensor:
    """The tensor of a form and values of `stored`, on ``device`` where that is of its kind.

    Raises:
        Unportable: the values are not there, or do not fill the form.
    """
    if form["device"] == "meta":
        return made_on_meta(form)
    if values is None or values.dtype != from_plain(form["dtype"]) or values.shape != (_extent(form),):
        raise Unportable(f"the values of a tensor of shape {form['shape']} are not all there")
    return values.to(device_of_kind(form["device"], device)).as_strided(form["shape"], form["stride"])


def made_on_meta(form: Plain) -> torch.Tensor:
    """A tensor of a form on the meta device."""
    return torch.empty_strided(form["shape"], form["stride"], dtype=from_plain(form["dtype"]), device="meta")


def _extent(form: Plain) -> int:
    """How many elements there are in memory from the first of a tensor to its last."""
    if 0 in form["shape"]:
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(form["shape"], form["stride"], strict=True))


def _digested(tensor: torch.Tensor) -> Plain:
    """Form and digest of a tensor's values; where it lies changes when the graph is moved to be compiled."""
    form, values = stored(tensor)
    state = hashlib.sha256()
    if values is not None:
        state.update(values.view(torch.uint8).numpy().tobytes())
    return {**{key: value for key, value in form.items() if key != "device"}, "sha256": state.hexdigest()}


def _node_to_plain(
    node: fx.Node, name: Callable[[fx.Node], str] = lambda node: node.name, kept: Sequence[str] = KEPT
) -> Plain:  # fmt: skip
    """A node as plain data.

    Args:
        name: what nodes are called.
        kept: keys of what hangs on it.
    """

    def describe(value: Any) -> Any:
        if isinstance(value, fx.Node):
            return {"node": name(value)}
        if isinstance(value, immutable_list):
            return [to_plain(part, describe) for part in value]
        return to_plain(dict(value), describe) if isinstance(value, immutable_dict) else None

    return {
        "op": node.op,
        "name": name(node),
        "target": _target_to_plain(node),
        "args": [to_plain(value, describe) for value in node.args],
        "kwargs": {key: to_plain(value, describe) for key, value in node.kwargs.items()},
        "meta": {key: to_plain(node.meta[key], _on_meta) for key in kept if key in node.meta},
    }


def _on_meta(value: Any) -> Any:
    return {"tensor": tensor_form(value)} if isinstance(value, torch.Tensor) else None


def _target_to_plain(node: fx.Node) -> Any:
    """What a node calls: an operator by its name, a function by that in `FUNCTIONS`, anything else as it is."""
    target = node.target
    if node.op == "call_method":
        raise Unportable(f"it calls the method {target!r}")
    if node.op != "call_function":
        return target
    if isinstance(target, torch._ops.OpOverload):
        if _operator(target.name()) is not target:
            raise Unportable(f"it calls {target}, which is not found by its name")
        return {"operator": target.name()}
    function = next((name for name, known in FUNCTIONS.items() if known is target), None)
    if function is None:
        raise Unportable(f"it calls {getattr(target, '__qualname__', target)}, which is no operator of PyTorch's")
    return {"function": function}


def _operator(name: str) -> torch._ops.OpOverload | None:
    """An operator by a name such as ``aten::add.Tensor``; None where none is registered as that."""
    namespace, _, rest = name.partition("::")
    packet, _, overload = rest.partition(".")
    space = getattr(torch.ops, namespace)
    try:
        operator_found = getattr(getattr(space, packet), overload or "default")
    except AttributeError:
        return None
    return operator_found if isinstance(operator_found, torch._ops.OpOverload) else None


def _target_from_plain(target: Any) -> Any:
    if not isinstance(target, dict):
        return target
    if "function" in target:
        if target["function"] not in FUNCTIONS:
            raise Unportable(f"there is no function {target['function']} that graphs may call")
        return FUNCTIONS[target["function"]]
    overload = _operator(target["operator"])
    if overload is None:
        raise Unportable(f"no operator {target['operator']} is registered: import what registers it first")
    return overload


def _made_graph(plain_nodes: Sequence[Plain], device: torch.device | None) -> fx.Graph:
    graph = fx.Graph()
    nodes: dict[str, fx.Node] = {}
    makers = {"node": lambda name: _node_named(nodes, name)}
    for each in plain_nodes:
        with inside(each["name"]):
            args = tuple(from_plain(each["args"], device, makers))
            kwargs = {key: from_plain(value, device, makers) for key, value in each["kwargs"].items()}
            node = graph.create_node(each["op"], _target_from_plain(each["target"]), args, kwargs, each["name"])
            if node.name != each["name"]:
                raise Unportable(f"no node of a graph can have this name, but {node.name}")
            for key, value in each["meta"].items():
                node.meta[key] = from_plain(value, device, {"tensor": made_on_meta})
            nodes[node.name] = node
    return graph


def _node_named(nodes: Mapping[str, fx.Node], name: str) -> fx.Node:
    if name not in nodes:
        raise Unportable(f"it takes what {name} makes, which does not come before it")
    return nodes[name]


def _tensor_of(module: fx.GraphModule, target: str) -> torch.Tensor:
    tensor = getattr(module, target, None)
    if not isinstance(tensor, torch.Tensor):
        raise Unportable(f"it takes {target}, which is no tensor of the graph")
    return tensor


def _child_of(module: fx.GraphModule, target: str) -> fx.GraphModule:
    child = getattr(module, target, None)
    if not isinstance(child, fx.GraphModule):
        raise Unportable(f"it calls {target}, which is a {type(child).__name__} and no graph")
    return child
