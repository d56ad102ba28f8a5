"""Partitions a whole program: one local structure for all calls that are alike, wired as the captured one was."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from xdit_compile.ir.arguments import node_of, sequence_of
from xdit_compile.ir.axes import Axis
from xdit_compile.ir.program import Input, Kind, Program
from xdit_compile.passes.axes.infer import Frame, Inference, results_of
from xdit_compile.passes.local.layout import Layout
from xdit_compile.passes.local.ledger import Ledger
from xdit_compile.passes.local.local_graph import LocalGraph, State, Value
from xdit_compile.plan.methods import PATCH, TENSOR

from .align_windows import follow
from .replicate_masks import wants_whole
from .shard_weights import keep_slices
from .structure import LocalStructure, StructurePartitioner


@dataclasses.dataclass
class Form:
    """A value of the root graph on this rank: whole, split, or both."""

    whole: Value | None = None
    split: Value | None = None

    def best(self, want_whole: bool) -> Value:
        """The whole value or the split one, as wanted; the other one where that is all there is."""
        first, second = (self.whole, self.split) if want_whole else (self.split, self.whole)
        value = first if first is not None else second
        assert value is not None
        return value


@dataclasses.dataclass
class Partitioned:
    """One rank's program and what it does beside arithmetic in one call of the module.

    ``wholes`` are the nodes of the root that hold captured values whole, by the names that these have there. What
    ``outgoing`` names is on its way to the next call, after the results among the outputs of the root.
    """

    program: Program
    layout: Layout
    ledger: Ledger
    wholes: Mapping[str, fx.Node] = dataclasses.field(default_factory=dict)
    outgoing: tuple[str, ...] = ()


def partition(
    inference: Inference,
    layout: Layout,
    gather: bool = True,
    *,
    varying: Collection[str] = (),
    shared: Collection[str] = (),
) -> Partitioned:
    """Rewrite a typed program into what this rank runs; without ``gather`` results stay split.

    The results of a program that computes one patch are that patch, whole in all else.

    Args:
        varying: names of inputs that come patch by patch.
        shared: names of captured calls that keep nothing from call to call; the program of one patch does not make
            them, it is given their results.

    Raises:
        PartitionError: where something cannot be split and may not be gathered.
    """
    return _ProgramPartitioner(inference, follow(inference, layout), gather, varying, shared).run()


class _ProgramPartitioner:
    def __init__(
        self, inference: Inference, layout: Layout, gather: bool, varying: Collection[str], shared: Collection[str]
    ):
        self.inference, self.layout, self.gather = inference, layout, gather
        self.varying, self.shared = varying, shared
        self.one_patch = layout.one_patch
        self.root = inference.program.root
        self.frames = {frame.call: frame for frame in inference.frames}
        self.graph = fx.Graph()
        self.modules: dict[str, torch.nn.Module] = {}
        self.env: dict[fx.Node, Form] = {}
        self.ledger = Ledger()
        self.added: list[Input] = []
        self.outgoing: dict[str, fx.Node] = {}
        self.known: dict[Any, tuple[str, LocalStructure]] = {}
        self.wanted, self.whole, self.split = self._demands()

    def _demands(self) -> tuple[dict[fx.Node, set[fx.Node]], set[fx.Node], set[fx.Node]]:
        """What each frame wants whole, and which values of the root are wanted whole and which split."""
        wanted: dict[fx.Node, set[fx.Node]] = {}
        whole: set[fx.Node] = set()
        split: set[fx.Node] = set()
        for node in reversed(self.root.graph.nodes):
            if node.op == "call_module":
                frame = self.frames[node]
                results = results_of(frame.graph)
                asked = [
                    results[user.args[1]] for user in node.users if user in whole and user.target is operator.getitem
                ]
                wanted[node] = wants_whole(frame, [leaf for leaf in asked if isinstance(leaf, fx.Node)])
                formals = [n for n in frame.graph.nodes if n.op == "placeholder"]
                for formal, actual in zip(formals, node.args, strict=True):
                    if isinstance(actual, fx.Node):
                        (whole if formal in wanted[node] else split).add(actual)
            elif node.op == "output":
                (whole if self.gather and not self.one_patch else split).update(node.all_input_nodes)
        return wanted, whole, split

    def run(self) -> Partitioned:
        self._inputs()
        for node in self.root.graph.nodes:
            if node.op == "call_module" and node.name in self.shared and self.one_patch:
                self._given(node)
            elif node.op == "call_module":
                self._call(node)
            elif node.op == "output":
                self._output(node)
        module = fx.GraphModule(self.modules, self.graph)
        inputs = (*self.inference.program.inputs, *self.added)
        program = keep_slices(dataclasses.replace(self.inference.program, root=module, inputs=inputs), TENSOR)
        wholes = {node.name: form.whole.node for node, form in self.env.items() if form.whole is not None}
        return Partitioned(program, self.layout, self.ledger, wholes, tuple(self.outgoing))

    def _given(self, call: fx.Node) -> None:
        """The results of a call that another program makes."""
        for item in call.users:
            local = self._added(item.name, "shared", item.name)
            local.meta["val"] = item.meta["val"]
            self.env[item] = Form(whole=Value(local, self.inference.axes[item][0], item.meta["val"].dtype))

    def _added(self, name: str, kind: Kind, target: str | int) -> fx.Node:
        """One more input of the root, after all others."""
        with self.graph.inserting_after(self.graph.find_nodes(op="placeholder")[-1]):
            local = self.graph.placeholder(f"{name}_{kind}")
        self.added.append(Input(local.name, kind, target))
        return local

    def _inputs(self) -> None:
        for node in self.root.graph.nodes:
            if node.op == "placeholder":
                local = self.graph.placeholder(node.name)
                local.meta.update(node.meta)
                value = Value(local, self.inference.axes[node][0], node.meta["val"].dtype)
                self.env[node] = Form(whole=value)
        self._given_as_patches()
        self._slice_inputs()

    def _given_as_patches(self) -> None:
        """Inputs that vary come patch by patch, as the last step left them."""
        specs = {spec.name: spec for spec in self.inference.program.inputs}
        for node in [node for node in self.env if node.name in self.varying and self.one_patch]:
            value = self.env[node].whole
            assert value is not None
            dim = self.layout.natural(value.axes)[PATCH]
            local = self._added(node.name, "patch", specs[node.name].target)
            sizes = self.layout.sharding.sizes(value.axes, {PATCH: dim})
            local.meta["val"] = torch.empty(sizes, dtype=value.dtype, device="meta")
            self.env[node] = Form(split=dataclasses.replace(value, node=local, split={PATCH: dim}))

    def _slice_inputs(self) -> None:
        """User inputs that blocks take split are sliced once, before anything runs."""
        kinds = {spec.name: spec.kind for spec in self.inference.program.inputs}
        sliced = [
            node
            for node in self.env
            if kinds[node.name] == "user" and node in self.split and self._to_slice(self.env[node].best(False))
        ]
        alone = self.layout.patches is not None
        for number, nodes in enumerate([[node] for node in sliced] if alone else [sliced]):
            if nodes:
                self._slice(f"slice_inputs_{number}" if number else "slice_inputs", nodes)

    def _slice(self, name: str, sliced: Sequence[fx.Node]) -> None:
        local = LocalGraph(self.layout.sharding, self.layout.groups, self.layout.parts)
        results = []
        for node in sliced:
            value = self.env[node].best(False)
            inner = local.graph.placeholder(node.name)
            split = dict(value.split)
            for mesh_dim, dim in self._to_slice(value).items():
                also = [other for other, split_dim in split.items() if split_dim == dim]
                inner = local.slice(inner, dim, value.axes[dim], mesh_dim, also)
                split[mesh_dim] = dim
            results.append(dataclasses.replace(value, node=inner, split=split))
        module = local.finish([value.node for value in results])
        call = self._add_call(name, module, [self.env[node].best(False).node for node in sliced])
        for position, (node, value) in enumerate(zip(sliced, results, strict=True)):
            self.env[node].split = self._item(call, position, value)

    def _to_slice(self, value: Value) -> dict[str, int]:
        return {name: dim for name, dim in self.layout.natural(value.axes).items() if name not in value.split}

    def _add_call(self, name: str, module: fx.GraphModule, args: Sequence[Any], **meta: Any) -> fx.Node:
        self.modules.setdefault(name, module)
        call = self.graph.create_node("call_module", name, tuple(args))
        call.meta.update({"path": "", "repeated": False, **meta})
        return call

    def _call(self, node: fx.Node) -> None:
        frame = self.frames[node]
        wanted, shared = self.wanted[node], node.name in self.shared
        formals = [n for n in frame.graph.nodes if n.op == "placeholder"]
        arguments = [
            self.env[node_of(actual)].best(formal in wanted or shared)
            for formal, actual in zip(formals, node.args, strict=True)
        ]
        users = {user.args[1]: user for user in node.users}
        results = [leaf if k in users else None for k, leaf in enumerate(results_of(frame.graph))]
        final = {item for item in users.values() if any(user.op == "output" for user in item.users)}
        requests = [self._request(users.get(k), final, shared) for k in range(len(results))]
        name, structure = self._structure(frame, arguments, results, requests)
        self.ledger.add(structure.ledger)
        states = self._states(node, structure)
        call = self._add_call(
            name, structure.module, [*(value.node for value in arguments), *states],
            path=node.meta.get("path", ""), repeated=node.meta.get("repeated", False), captured=node.name,
        )  # fmt: skip
        self._leave(node, structure, states)
        position = 0
        for item in users.values():
            self.env[item] = Form()
        for k in range(len(results)):
            for _ in requests[k]:
                value = structure.results[position]
                if value is not None:
                    placed = self._item(call, position, value)
                    setattr(self.env[users[k]], "whole" if value.replicated else "split", placed)
                position += 1

    def _item(self, call: fx.Node, position: int, value: Value) -> Value:
        """A result of a call as the root has it."""
        local = self.graph.call_function(operator.getitem, (call, position))
        sizes = self.layout.sharding.sizes(value.axes, value.split)
        local.meta["val"] = torch.empty(sizes, dtype=value.dtype, device="meta")
        return dataclasses.replace(value, node=local)

    def _states(self, call: fx.Node, structure: LocalStructure) -> list[fx.Node]:
        """What a call keeps from one call of the program to the next."""
        states = []
        for state in structure.states:
            name = f"{call.name}_{state.name}"
            local = self._added(name, "state", name)
            local.meta["val"] = torch.empty(state.shape, dtype=state.dtype, device="meta")
            states.append(local)
            if self.layout.stale and state.exchange is not None:
                incoming = self._added(name, "incoming", _incoming(call, state))
                incoming.meta["val"] = torch.empty(0, dtype=state.dtype, device="meta")
                state.exchange.finish(self.graph, local, incoming)
        return states

    def _leave(self, call: fx.Node, structure: LocalStructure, states: Sequence[fx.Node]) -> None:
        """Send this rank's rows of what a call kept to the ranks that will want them in the next call."""
        for state, local in zip(structure.states, states, strict=True):
            if self.layout.stale and state.exchange is not None:
                self.outgoing[_incoming(call, state)] = state.exchange.start(self.graph, local)

    def _request(self, item: fx.Node | None, final: set[fx.Node], shared: bool) -> tuple[str, ...]:
        """In which forms a result is needed."""
        if item is None:
            return ()
        if item in final and not self.gather:
            return ("split",)
        if shared or item in final and self.one_patch:
            return ("gathered",)
        if item in final:
            return ("gathered",) + (("split",) if item in self.split else ())
        return (("whole",) if item in self.whole else ()) + (("split",) if item in self.split else ())

    def _structure(
        self, frame: Frame, arguments: list[Value], results: list[Any], requests: list[tuple[str, ...]]
    ) -> tuple[str, LocalStructure]:
        wanted = self.wanted[frame.call]
        key = (
            frame.call.target,
            tuple(tuple(sorted(value.split.items())) for value in arguments),
            tuple(requests),
            tuple(node.name for node in frame.graph.nodes if node in wanted),
            Fingerprint(self.layout).of(frame),
            frame.call.name in self.shared,
        )
        if key not in self.known:
            layout = self.layout.alone() if key[-1] else self.layout
            partitioner = StructurePartitioner(
                frame, layout, arguments, wanted, lambda n: self.inference.place(frame, n)
            )
            structure = partitioner.run(results, requests)
            count = sum(1 for name, _ in self.known.values() if name.startswith(str(frame.call.target)))
            self.known[key] = (f"{frame.call.target}_{count}" if count else str(frame.call.target), structure)
        return self.known[key]

    def _output(self, node: fx.Node) -> None:
        def final(leaf: Any) -> Any:
            if not isinstance(leaf, fx.Node):
                return leaf
            return self.env[leaf].best(self.gather).node

        self.graph.output((*(final(leaf) for leaf in sequence_of(node.args[0])), *self.outgoing.values()))


def _incoming(call: fx.Node, state: State) -> str:
    """Name of what is on its way for a state of a call."""
    return f"{call.name}_{state.name}_incoming"


class Fingerprint:
    """Tells apart frames of one structure whose axes lie differently on the mesh."""

    def __init__(self, layout: Layout):
        self._layout = layout
        self._names: dict[int, int] = {}
        self._seen: list[Axis] = []

    def of(self, frame: Frame) -> tuple:
        """A key that two frames of one structure share only if one local structure does for both: which dims have one
        axis, how large it is, how it lies on the ranks, and the loops."""
        shapes: list[tuple] = []
        for node in frame.graph.find_nodes(op="placeholder"):
            shapes.append(tuple(self._describe(axis) for axis in frame.axes[node][0]))
        for op_axes in frame.op_axes.values():
            for axes in (*op_axes.operand_axes, *op_axes.result_axes, op_axes.kept):
                shapes.append(tuple(self._describe(axis) for axis in axes))
            shapes.append((*op_axes.loops, op_axes.cut))
        return tuple(shapes)

    def _describe(self, axis: Axis) -> tuple:
        number = self._names.get(id(axis))
        if number is None:
            number = self._names[id(axis)] = len(self._names)
            self._seen.append(axis)
        lies = tuple(split.places(axis) for split in self._layout.sharding.splits.values())
        return number, axis.size, lies
