"""Graphs are cut into prologue, blocks and epilogue; each distinct structure is kept and lowered once."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from torch import fx, nn
from zoo.transformers import MODELS

from tests.capture.test_capture import METHODS, assert_same, assert_well_formed
from xdit_compile.capture.by_values import by_values
from xdit_compile.capture.capture import capture
from xdit_compile.capture.decompose import clean, functionalized, lower, stays_whole
from xdit_compile.capture.mutations import written_arguments
from xdit_compile.capture.outline import outline
from xdit_compile.capture.repeated_blocks import external_values, structural_key
from xdit_compile.capture.tracing import Flat
from xdit_compile.ir.program import Program
from xdit_compile.ir.subgraph import subgraph

aten = torch.ops.aten


def layout(program: Program) -> list[tuple[str, int]]:
    """Path of each call that is a block, with the number of its structure in order of appearance."""
    numbers: dict[str, int] = {}
    return [
        (call.meta["path"], numbers.setdefault(str(call.target), len(numbers)))
        for call in program.calls()
        if call.meta["repeated"]
    ]


def blocks(path: str, *structures: int) -> list[tuple[str, int]]:
    return [(f"{path}.{i}", structure) for i, structure in enumerate(structures)]


LAYOUTS = {
    "flux": blocks("transformer_blocks", 0, 0) + blocks("single_transformer_blocks", 1, 1, 1),
    "sd3": blocks("transformer_blocks", 0, 0, 1),
    "pixart": blocks("transformer_blocks", 0, 0, 0),
    "hunyuandit": blocks("blocks", 0, 0, 0, 0, 1, 1),
    "dit": blocks("transformer_blocks", 0, 0, 0),
    "wan_t2v": blocks("blocks", 0, 0, 0),
    "cogvideox": blocks("transformer_blocks", 0, 0, 0),
    "latte": [
        pair for i in range(3) for pair in ((f"transformer_blocks.{i}", 0), (f"temporal_transformer_blocks.{i}", 1))
    ],
    "zimage": blocks("noise_refiner", 0, 0) + blocks("context_refiner", 1, 1) + blocks("layers", 2, 2, 2),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_blocks_of_real_models(name: str) -> None:
    case = MODELS[name]
    program = capture(case.build().to("meta"), *case.inputs(device="meta"))
    assert layout(program) == LAYOUTS[name]
    first, last = program.calls()[0], program.calls()[-1]
    assert (first.meta["path"], last.meta["path"]) == ("", "")
    assert len(program.structures()) < len(program.calls())


def weights_of(program: Program, path: str) -> set[str]:
    """Names of the parameters that the call of a block is given, inside the block."""
    call = next(call for call in program.calls() if call.meta["path"] == path)
    targets = {spec.name: str(spec.target) for spec in program.inputs if spec.kind == "parameter"}
    return {targets[arg.name].removeprefix(path) for arg in call.args if arg.name in targets}


def test_weights_are_arguments_in_the_same_order_for_each_call() -> None:
    case = MODELS["pixart"]
    program = capture(case.build(), *case.inputs())
    targets = {spec.name: str(spec.target) for spec in program.inputs}
    found = []
    for i in range(3):
        call = next(call for call in program.calls() if call.meta["path"] == f"transformer_blocks.{i}")
        found.append([targets[a.name].removeprefix(f"transformer_blocks.{i}.") for a in call.args if a.name in targets])
    assert "attn1.to_q.weight" in found[0]
    assert found[0] == found[1] == found[2]


class Block(nn.Module):
    """Enough operators to be worth a call, and whatever else a test asks for."""

    def __init__(self, width: int = 6, in_place: bool = False, extra: bool = False) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 8), nn.Linear(8, width)
        self.in_place, self.extra = in_place, extra

    def forward(self, x: torch.Tensor, skip: torch.Tensor | None = None) -> torch.Tensor:
        if skip is not None:
            x = x + skip
        y = self.down(torch.nn.functional.gelu(self.up(self.norm(x)))).reshape(2, -1, 6)
        y = torch.tanh(y) * torch.sigmoid(y) if self.extra else y.sin() * y.cos()
        if self.in_place:
            x += y
            return x
        return x + y.reshape(x.shape)


class Stack(nn.Module):
    def __init__(self, *made: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(made)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x * 2
        for layer in self.layers:
            x = layer(x)
        return x + 1


def captured(module: nn.Module, *args: Any, method: str = "values") -> Program:
    """A program by one method alone, so that no other hides its failure, seen to agree with the module."""
    program = capture(module.eval(), args, {}, methods=((method, METHODS[method]),))
    assert_well_formed(program)
    assert_same(program, module, tuple(torch.randn_like(arg) for arg in args), {})
    return program


def test_another_last_block_is_a_block_too() -> None:
    program = captured(Stack(Block(), Block(), Block(extra=True)), torch.randn(2, 3, 6))
    assert layout(program) == blocks("layers", 0, 0, 1)


def test_blocks_that_all_differ_are_not_repeated() -> None:
    program = captured(Stack(Block(), Block(extra=True)), torch.randn(2, 3, 6))
    assert layout(program) == []
    assert len(program.calls()) == 1


def test_a_block_called_again_shares_structure_and_weights() -> None:
    class Loop(Stack):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for _ in range(3):
                x = self.layers[0](x)
            return x

    program = captured(Loop(Block()), torch.randn(2, 3, 6))
    assert layout(program) == [("layers.0", 0)] * 3


def test_a_part_of_a_block_called_from_outside_is_no_block() -> None:
    class Borrows(Stack):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = super().forward(x)
            return self.layers[0].norm(x)

    program = captured(Borrows(Block(), Block()), torch.randn(2, 3, 6))
    assert layout(program) == blocks("layers", 0, 0)
    assert program.calls()[-1].meta["path"] == ""


def test_long_skips_and_two_lists() -> None:
    class Skips(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down, self.up = (nn.ModuleList([Block(), Block()]) for _ in range(2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            kept = []
            for layer in self.down:
                kept.append(x)
                x = layer(x)
            for layer in self.up:
                x = layer(x, kept.pop())
            return x

    program = captured(Skips(), torch.randn(2, 3, 6))
    assert layout(program) == blocks("down", 0, 0) + blocks("up", 1, 1)


def test_blocks_in_a_called_sequence_are_found() -> None:
    class Sequence(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(Block(), Block(), Block())

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.body(x) * 2

    assert layout(captured(Sequence(), torch.randn(2, 3, 6))) == blocks("body", 0, 0, 0)


def test_the_outermost_list_counts() -> None:
    class Outer(Block):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.ModuleList([Block(), Block()])

        def forward(self, x: torch.Tensor, skip: torch.Tensor | None = None) -> torch.Tensor:
            for layer in self.inner:
                x = layer(x)
            return super().forward(x)

    assert layout(captured(Stack(Outer(), Outer()), torch.randn(2, 3, 6))) == blocks("layers", 0, 0)


def test_constants_and_shapes_tell_structures_apart() -> None:
    class Scaled(Block):
        def __init__(self, factor: float) -> None:
            super().__init__()
            self.factor = factor

        def forward(self, x: torch.Tensor, skip: torch.Tensor | None = None) -> torch.Tensor:
            return super().forward(x) * self.factor

    program = captured(Stack(Scaled(2.0), Scaled(2.0), Scaled(2), Scaled(3.0)), torch.randn(2, 3, 6))
    assert layout(program) == blocks("layers", 0, 0, 1, 2)


@pytest.mark.parametrize("method", ["values", "export"])
def test_writes_across_a_cut_are_functionalized_first(method: str) -> None:
    module = Stack(Block(in_place=True), Block(in_place=True), Block(in_place=True))
    program = captured(module, torch.randn(2, 3, 6), method=method)
    assert layout(program) == blocks("layers", 0, 0, 0)


class WritesThroughView(Block):
    """Writes to a part of what it is given, so that no new value can take the place of the old one."""

    def forward(self, x: torch.Tensor, skip: torch.Tensor | None = None) -> torch.Tensor:
        x[:, 0].add_(super().forward(x)[:, 1])
        return x


@pytest.mark.parametrize(("method", "found"), [("values", 0), ("export", 3)])
def test_writes_to_a_view_of_an_earlier_block(method: str, found: int) -> None:
    module = Stack(WritesThroughView(), WritesThroughView(), WritesThroughView())
    assert len(layout(captured(module, torch.randn(2, 3, 6), method=method))) == found


def test_later_readers_do_not_forbid_writes() -> None:
    class Views(Block):
        def forward(self, x: torch.Tensor, skip: torch.Tensor | None = None) -> torch.Tensor:
            assert skip is not None
            return super().forward(x, skip.view(3, 2, 6).view(2, 3, 6))

    class MasksFirst(Stack):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            mask = x * 2
            mask[:, 0] = 1.0
            for layer in self.layers:
                x = layer(x, mask)
            return x

    assert layout(captured(MasksFirst(Views(), Views()), torch.randn(2, 3, 6))) == blocks("layers", 0, 0)


def test_writes_within_a_block_stay_there() -> None:
    class Writes(Block):
        def forward(self, x: torch.Tensor, skip: torch.Tensor | None = None) -> torch.Tensor:
            y = torch.empty_like(x)
            y[..., 0::2] = x[..., 1::2]
            y[..., 1::2] = -x[..., 0::2]
            return super().forward(y)

    module = Stack(Writes(), Writes(), Writes()).eval()
    assert layout(captured(module, torch.randn(2, 3, 6))) == blocks("layers", 0, 0, 0)


def test_an_ignored_result_of_the_last_block_does_not_tell_it_apart() -> None:
    class Two(Block):
        def forward(self, x: torch.Tensor, skip: torch.Tensor | None = None) -> Any:
            return super().forward(x, skip), skip * 2 + x

    class Both(Stack):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = x * 3
            for layer in self.layers:
                x, y = layer(x, y)
            return x

    assert layout(captured(Both(Two(), Two(), Two()), torch.randn(2, 3, 6))) == blocks("layers", 0, 0, 0)


@pytest.mark.parametrize("name", ["sana"])
def test_lowering_gives_what_run_decompositions_gives(name: str) -> None:
    case = MODELS[name]
    module = case.build()
    args, kwargs = case.inputs()
    with torch.no_grad():
        trace = by_values(Flat(module, module.forward, args, kwargs))
        outline(trace)
        nodes = [node for node in trace.graph.graph.nodes if node.op == "call_function"]
        inputs = {node: node.name for node in external_values(nodes)}
        whole = fx.GraphModule(nn.Module(), subgraph(inputs, nodes, list(trace.graph.graph.output_node().args[0])))
        assert not any(written_arguments(node) for node in whole.graph.nodes)
        slow = functionalized(whole)
        clean(slow)
        fast = lower(whole)
    keys = []
    for module in (fast, slow):
        body = [node for node in module.graph.nodes if node.op == "call_function"]
        holders = module.graph.find_nodes(op="placeholder")
        keys.append(structural_key(body, holders, module.graph.output_node().args[0], strides=True))
        assert len(body) > 100
    assert keys[0] == keys[1]


def test_what_stays_whole() -> None:
    assert stays_whole(aten.linear.default) and stays_whole(aten.scaled_dot_product_attention.default)
    assert stays_whole(aten.layer_norm.default) and stays_whole(aten.rms_norm.default)
    assert not stays_whole(aten.reshape.default) and not stays_whole(aten.chunk.default)


def test_full_size_flux_without_weights() -> None:
    with torch.device("meta"):
        module = diffusers.FluxTransformer2DModel(guidance_embeds=True).eval().to(torch.bfloat16)

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.bfloat16, device="meta")

    kwargs = {
        "hidden_states": empty(1, 4096, 64), "encoder_hidden_states": empty(1, 512, 4096), "guidance": empty(1),
        "pooled_projections": empty(1, 768), "timestep": empty(1), "img_ids": empty(4096, 3), "txt_ids": empty(512, 3),
        "return_dict": False,
    }  # fmt: skip
    program = capture(module, (), kwargs)
    assert_well_formed(program)
    assert layout(program) == blocks("transformer_blocks", *[0] * 19) + blocks("single_transformer_blocks", *[1] * 38)
    assert len(program.structures()) == 4
