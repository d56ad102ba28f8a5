"""Linears that read the same value are one product, of weights that are held once and are still the module's own."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import procs
import pytest
import torch
from splitting import captured
from torch import fx, nn
from zoo.transformers import MODELS

from xdit_compile import Plan, parallelize, restore
from xdit_compile.compiler import compiled
from xdit_compile.distributed.mesh import Mesh
from xdit_compile.ir.program import Input, Program, WeightSlice
from xdit_compile.passes.fuse import join_linears as join_module
from xdit_compile.passes.fuse.join_linears import join_linears
from xdit_compile.runtime.verify.simulated_mesh import run_simulated
from xdit_compile.weights.weights import Weights, cut

aten = torch.ops.aten
CPU = torch.device("cpu")
TOLERANCE = 2e-5
LINEAR = aten.linear.default


def products(program: Program) -> int:
    """Linears of all structures of a program."""
    return sum(len(each.graph.find_nodes(op="call_function", target=LINEAR)) for each in program.structures().values())


def joined(program: Program) -> list[int]:
    """How many parameters each joined tensor has."""
    return [len(spec.members) for spec in program.inputs if spec.members]


DEGREES: tuple[dict[str, int], ...] = ({}, {"ulysses": 3}, {"tensor": 2}, {"ring": 2, "tensor": 3}, {"ulysses": 8})


@pytest.mark.parametrize("name", ["flux", "sd3"])
def test_the_same_is_computed_under_every_split(name: str) -> None:
    model = captured(name)
    for degrees in DEGREES:
        plan = Plan(**degrees)
        analysis = model.analysis(plan)
        programs = [
            compiled(analysis, plan, Mesh.simulated(plan, rank), until="join_linears", device=CPU).programs["call"]
            for rank in range(plan.world_size)
        ]
        found = run_simulated(programs, model.module, model.args, model.kwargs)
        for result in found:
            for one, like in zip(torch.utils._pytree.tree_leaves(result), model.expected, strict=True):
                assert (one - like).abs().max() <= TOLERANCE * like.abs().max()


def test_what_is_joined_of_a_transformer_with_two_kinds_of_blocks() -> None:
    plan, model = Plan(), captured("flux")
    analysis = model.analysis(plan)
    apart, together = (
        compiled(analysis, plan, Mesh.simulated(plan, 0), until=end, device=CPU).programs["call"]
        for end in ("hoist_positions", "join_linears")
    )
    blocks = model.module.config
    double, single = blocks.num_layers, blocks.num_single_layers
    expected = [2] * 2 * double + [3] * 4 * double + [4] * 2 * single
    assert sorted(joined(together)) == expected, "weights and biases of each kind; SiLU of one value is one value"
    assert products(apart) - products(together) == (1 + 2 + 2) + 3 + 3, (
        "in structures that blocks share; the last has its own"
    )
    assert {spec.target for spec in apart.parameters()} == {spec.target for spec in together.parameters()}


Build = Callable[[fx.Graph, list[fx.Node]], list[fx.Node]]
NAMES = ("x", "w", "v", "b", "c")


def program_of(build: Build, kinds: str = "parameter", calls: int = 1, shared: bool = False) -> Program:
    """A root that calls a structure of x [2, 4], weights w [3, 4] and v [5, 4], and biases b [3] and c [5]."""
    inner = fx.Graph()
    inner.output(tuple(build(inner, [inner.placeholder(name) for name in NAMES])))
    shapes = {"x": (2, 4), "w": (3, 4), "v": (5, 4), "b": (3,), "c": (5,)}
    graph, inputs, results = fx.Graph(), [], []
    placeholders: dict[str, fx.Node] = {}
    for call in range(calls):
        for name in NAMES:
            own = name if shared and name == "w" else f"{name}{call}"
            if own not in placeholders:
                node = placeholders[own] = graph.placeholder(own)
                dtype = torch.float64 if kinds == "mixed" and name == "v" else torch.float32
                node.meta["val"] = torch.empty(shapes[name], device="meta", dtype=dtype)
                kind: Any = "user" if name == "x" else "parameter" if kinds == "mixed" else kinds
                inputs.append(Input(node.name, kind, len(inputs) if kind == "user" else own))
    for call in range(calls):
        args = tuple(placeholders["w" if shared and name == "w" else f"{name}{call}"] for name in NAMES)
        made = graph.create_node("call_module", "structure", args)
        results.append(graph.call_function(operator.getitem, (made, 0)))
    graph.output(tuple(results))
    root = fx.GraphModule({"structure": fx.GraphModule({}, inner)}, graph)
    return Program(root, tuple(inputs), {}, None, None)  # type: ignore[arg-type]


def two(graph: fx.Graph, given: list[fx.Node]) -> list[fx.Node]:
    x, w, v, b, c = given
    made = [graph.call_function(LINEAR, (x, w, b)), graph.call_function(LINEAR, (x, v, c))]
    return [graph.call_function(aten.cat.default, (made, -1))]


def without_bias(graph: fx.Graph, given: list[fx.Node]) -> list[fx.Node]:
    x, w, v, b, _ = given
    made = [graph.call_function(LINEAR, (x, w, b)), graph.call_function(LINEAR, (x, v))]
    return [graph.call_function(aten.cat.default, (made, -1))]


def left(graph: fx.Graph, given: list[fx.Node]) -> list[fx.Node]:
    x, w, v, b, c = given
    return [graph.call_function(LINEAR, (x, w, b)), graph.call_function(LINEAR, (x, v, c))]


def used_again(graph: fx.Graph, given: list[fx.Node]) -> list[fx.Node]:
    (made,) = two(graph, given)
    return [graph.call_function(aten.add.Tensor, (made, graph.call_function(aten.sum.default, (given[1],))))]


def of_other_values(graph: fx.Graph, given: list[fx.Node]) -> list[fx.Node]:
    x, w, v, b, c = given
    other = graph.call_function(aten.neg.default, (x,))
    made = [graph.call_function(LINEAR, (x, w, b)), graph.call_function(LINEAR, (other, v, c))]
    return [graph.call_function(aten.cat.default, (made, -1))]


def of_equal_values(graph: fx.Graph, given: list[fx.Node]) -> list[fx.Node]:
    x, w, v, b, c = given
    some, other = (graph.call_function(aten.silu.default, (x,)) for _ in range(2))
    made = [graph.call_function(LINEAR, (some, w, b)), graph.call_function(LINEAR, (other, v, c))]
    return [graph.call_function(aten.cat.default, (made, -1))]


def written_between(graph: fx.Graph, given: list[fx.Node]) -> list[fx.Node]:
    x, w, v, b, c = given
    rows = graph.call_function(aten.slice.Tensor, (x, 0, 0, 2))
    first = graph.call_function(LINEAR, (rows, w, b))
    graph.call_function(aten.mul_.Tensor, (x, 2.0))
    again = graph.call_function(aten.slice.Tensor, (x, 0, 0, 2))
    return [graph.call_function(aten.cat.default, ([first, graph.call_function(LINEAR, (again, v, c))], -1))]


def written_behind_views(graph: fx.Graph, given: list[fx.Node]) -> list[fx.Node]:
    x, w, v, b, c = given
    rows = graph.call_function(operator.getitem, (graph.call_function(aten.split.Tensor, (x, 1)), 0))
    first = graph.call_function(LINEAR, (rows, w, b))
    graph.call_function(aten.mul_.Tensor, (x, 2.0))
    return [graph.call_function(aten.cat.default, ([first, graph.call_function(LINEAR, (rows, v, c))], -1))]


def drawn(graph: fx.Graph, given: list[fx.Node]) -> list[fx.Node]:
    x, w, v, b, c = given
    some, other = (graph.call_function(aten.rand_like.default, (x,)) for _ in range(2))
    made = [graph.call_function(LINEAR, (some, w, b)), graph.call_function(LINEAR, (other, v, c))]
    return [graph.call_function(aten.cat.default, (made, -1))]


def test_linears_of_equal_values_become_one() -> None:
    program = join_linears(program_of(of_equal_values))
    (structure,) = program.structures().values()
    assert products(program) == 1 and len(structure.graph.find_nodes(op="call_function", target=aten.silu.default)) == 1


def test_two_linears_become_one() -> None:
    program = join_linears(program_of(two, calls=2))
    assert joined(program) == [2, 2, 2, 2] and products(program) == 1
    assert [spec.name for spec in program.inputs] == [
        node.name for node in program.root.graph.find_nodes(op="placeholder")
    ]
    values = [torch.randn(2, 4), torch.randn(8, 4), torch.randn(8)]
    x, weight, bias = values
    found = program.root(*[x if spec.kind == "user" else weight if "w" in spec.members[0].name else bias
                           for spec in program.inputs])  # fmt: skip
    for each in found:
        torch.testing.assert_close(each, nn.functional.linear(x, weight, bias))


@pytest.mark.parametrize(
    ("build", "how", "reason"),
    [
        (without_bias, {}, join_module.NO_OTHER), (left, {}, join_module.LEAVES),
        (used_again, {}, join_module.COMPUTED), (of_other_values, {}, None), (written_between, {}, None),
        (written_behind_views, {}, join_module.WRITTEN),
        (drawn, {}, None), (two, {"kinds": "buffer"}, join_module.UNLIKE),
        (two, {"kinds": "mixed"}, join_module.UNLIKE),
        (two, {"calls": 2, "shared": True}, join_module.CONTESTED),
    ],
    ids=[
        "a bias is missing", "results leave", "a weight is used again", "other values", "written between",
        "written behind views",
        "drawn",
        "buffers", "dtypes", "shared",
    ],
)  # fmt: skip
def test_what_stays_apart_and_why(build: Build, how: dict[str, Any], reason: str | None) -> None:
    program = program_of(build, **how)
    after = join_linears(program)
    assert products(after) == products(program) and after.inputs == program.inputs
    said = join_module.told(program)
    assert f"apart, as {reason}" in said if reason else "apart" not in said


def memory_of(module: nn.Module) -> int:
    """Bytes of all that the module's parameters keep alive."""
    storages = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in module.parameters()}
    return sum(storages.values())


def test_weights_stay_the_modules_own(tmp_path: Path) -> None:
    module, like = MODELS["flux"].build(), MODELS["flux"].build()
    like.load_state_dict(module.state_dict())
    args, kwargs = MODELS["flux"].inputs()
    kwargs["return_dict"] = True
    before = memory_of(module)
    parallelize(module, Plan(backend="eager", cache=None))

    def assert_same() -> None:
        with torch.no_grad():
            result, expected = module(*args, **kwargs).sample, like(*args, **kwargs).sample
        assert (result - expected).abs().max() <= TOLERANCE * expected.abs().max()

    def key() -> Any:
        return module.transformer_blocks[0].attn.to_k

    assert_same()
    assert memory_of(module) == before and key().weight.storage_offset() > 0, "views of one tensor, held once"
    with torch.no_grad():
        key().weight.mul_(2.0)
        key().bias.data += 1.0
        like.transformer_blocks[0].attn.to_k.weight.mul_(2.0)
        like.transformer_blocks[0].attn.to_k.bias.add_(1.0)
    assert_same()
    new = nn.Parameter(torch.randn_like(key().weight))
    key().weight, like.transformer_blocks[0].attn.to_k.weight = new, nn.Parameter(new.detach().clone())
    assert_same()
    assert memory_of(module) == before and key().weight is new
    module.double().float()
    assert_same()
    assert memory_of(module) == before
    module.save_pretrained(tmp_path)
    read = diffusers.FluxTransformer2DModel.from_pretrained(tmp_path)
    assert all(torch.equal(read.state_dict()[name], value) for name, value in like.state_dict().items())
    assert sum(file.stat().st_size for file in tmp_path.glob("*.safetensors")) < 1.1 * before


def test_a_weight_that_shares_its_memory_stays_where_it_is() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = nn.Linear(4, 3), nn.Linear(4, 3)
            both = torch.randn(7, 4)
            self.one.weight, self.other.weight = nn.Parameter(both[4:]), nn.Parameter(both[1:4])
            self.both = both

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cat([self.one(x), self.other(x)], -1)

    module, x = Tied(), torch.randn(5, 4)
    places = [module.one.weight.data_ptr(), module.other.weight.data_ptr()]
    expected = module(x)
    parallelize(module, Plan(backend="eager", cache=None))
    torch.testing.assert_close(module(x), expected)
    assert [module.one.weight.data_ptr(), module.other.weight.data_ptr()] == places
    module.both.zero_()
    torch.testing.assert_close(module(x), torch.cat([module.one.bias, module.other.bias]).expand(5, 6))


class Dictionary:
    """Weights that are not in memory, as those of a file."""

    def __init__(self, values: dict[str, torch.Tensor]):
        self.values = values

    def read(self, name: str, pieces: tuple[WeightSlice, ...]) -> torch.Tensor:
        return cut(self.values[name], pieces)

    def reopen(self) -> None:
        pass


@pytest.mark.parametrize("pieces", [(), (WeightSlice(0, ((1, 3),)),)], ids=["whole", "slices"])
def test_what_was_read_and_joined_is_read_again(pieces: tuple[WeightSlice, ...]) -> None:
    with torch.device("meta"):
        module = nn.Sequential(nn.Linear(4, 2), nn.Linear(4, 3), nn.Linear(4, 5))
    source = Dictionary({name: torch.randn(each.shape) for name, each in module.named_parameters()})
    weights = Weights(module, source)
    names = ("1.weight", "2.weight")
    spec = Input("joined", "joined", "joined", members=tuple(Input(n, "parameter", n, pieces) for n in names))
    program = Program(fx.GraphModule({}, fx.Graph()), (spec,), {}, None, None)  # type: ignore[arg-type]
    for _ in range(2):
        weights.load(program)
        expected = torch.cat([cut(source.values[name], pieces) for name in names])
        assert torch.equal(weights.find(spec), expected) and torch.equal(weights.find(spec), expected)
        source.values = {name: value + 1 for name, value in source.values.items()}
        weights.refresh()


def shares(rank: int, keeps: bool) -> tuple[float, float, float]:
    """How far results are off: at first, after a write to what this rank holds, and of the module given back."""
    module, like = MODELS["flux"].build(), MODELS["flux"].build()
    like.load_state_dict(module.state_dict())
    args, kwargs = MODELS["flux"].inputs()
    kwargs["return_dict"] = True

    def off() -> float:
        with torch.no_grad():
            result, expected = module(*args, **kwargs).sample, like(*args, **kwargs).sample
        return float((result - expected).abs().max() / expected.abs().max())

    parallelize(module, Plan(tensor=2, backend="eager", cache=None, keep_weights=keeps))
    first = off()
    if keeps:
        with torch.no_grad():
            for each in (module, like):
                each.transformer_blocks[0].attn.to_v.weight.mul_(1.5)
    second = off()
    restore(module)
    return first, second, off()


@pytest.mark.parametrize("keeps", [True, False])
def test_slices_are_joined_where_ranks_share_weights(keeps: bool) -> None:
    for found in procs.run(shares, 2, keeps):
        assert max(found) <= TOLERANCE and not any(map(math.isnan, found))


def test_it_can_be_left_out() -> None:
    module = MODELS["flux"].build()
    args, kwargs = MODELS["flux"].inputs()
    parallelize(module, Plan(backend="eager", cache=None, without=("join_linears",)))
    with torch.no_grad():
        module(*args, **kwargs)
    assert module.transformer_blocks[0].attn.to_k.weight.storage_offset() == 0
