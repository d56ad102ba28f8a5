"""What is counted in generated code; in processes of their own, so that nothing stays of a card that is not there."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from xdit_compile.backends.target.cards import CARDS

pytest.importorskip("triton")
pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent
SINGLE = "single_transformer_blocks"
BLOCKS = {"transformer_blocks.0": (17, 14), f"{SINGLE}.0": (5, 6), f"{SINGLE}.1": (5, 6)}
"""Launches and matrix products of each block as its module has them."""
ROWS, INNER, COLUMNS = 64, 32, 48
BY_HAND = f"""
import dataclasses
import json

import torch
from torch import fx
from torch._inductor import config
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._triton import has_triton

from xdit_compile.backends.target.cards import CARDS
from xdit_compile.backends.target.pretend_card import DEVICE, SETTINGS, patches, pretend_card
from xdit_compile.kernels import linears, norm_rope, put_rows
from xdit_compile.reports.counting.count import count

aten, OPS = torch.ops.aten, torch.ops.xdit_compile


def cut(x):
    return [aten.slice(x, 1, 0, 8), aten.slice(x, 1, 8, {INNER})]


def parts_of(x, y):
    x, bias = aten.view(x, [1, {ROWS}, {INNER}]), aten.select(y, 0, 1)
    layers = [(y.t(), bias), (aten.slice(y, 1, 0, 16).t(), aten.slice(bias, 0, 0, 16))]
    return [aten.linear.default(x, *layer) for layer in layers]


def rotated(x, y):
    queries, table = aten.view(x, [1, {ROWS}, 4, 8]), aten.slice(aten.view(y, [1, -1, 8]), 1, 0, {ROWS})
    return (OPS.norm_rope.default([queries], [], [], table, table, [1], "rms", 1e-6, 1, False, [], 0)[0],)


def in_parts(x, y):
    both = aten.mm(x, y)
    return aten.relu(aten.slice(both, 1, 0, 16)), aten.neg(aten.slice(both, 1, 16, {COLUMNS}))


def gated(activation, x, y):
    both = aten.mm(x, y)
    gate = activation(aten.slice(both, 1, 0, 24))
    return (aten.mm(aten.mul(gate, aten.slice(both, 1, 24, {COLUMNS})), aten.slice(y, 0, 0, 24)),)


def rows_put(x, y):
    out = aten.mm(x, y)
    OPS.put_rows.default(out, aten.relu(aten.slice(y, 0, 0, 4)), 0, 0)
    return (out,)


def rows_kept(x, y):
    positions = aten._to_copy(aten.slice(aten.select(y, 1, 0), 0, 0, 4), dtype=torch.int64)
    aten.index_copy_(x, 0, positions, aten.relu(aten.slice(y.t(), 0, 0, 4)))
    return (aten.mm(x, y),)


GRAPHS = dict(
    swiglu=lambda x, y: gated(aten.silu, x, y),
    geglu=lambda x, y: gated(aten.gelu, x, y),
    rows_put=rows_put,
    rows_kept=rows_kept,
    product=lambda x, y: (aten.mm(x, y),),
    one_pass=lambda x, y: (aten.relu(aten.mm(x, y)),),
    two_passes=lambda x, y: (aten.neg(aten.relu(aten.mm(x, y))),),
    parts=in_parts,
    second_pass=lambda x, y: (OPS.linear_of_parts.default(cut(x), y.t(), None),),
    side_by_side=lambda x, y: (aten.linear.default(aten.cat(parts_of(x, y), 2), x.t(), None),),
    part_by_part=lambda x, y: (OPS.linear_of_parts.default(parts_of(x, y), x.t(), None),),
    epilogue=lambda x, y: (OPS.linear_gelu.default(x, y.t(), aten.select(y, 0, 1)),),
    heads=rotated,
    twice=lambda x, y: (aten.relu(aten.mm(x, y)), aten.relu(aten.mm(x.neg(), y))),
)


def state():
    known = [vars(patch.owner).get(patch.name, "missing") for patch in patches(CARDS["sm_90"], [])]
    settings = [getattr(config, name) for name in SETTINGS]
    try:
        made = torch.tensor([torch.tensor(5)]).tolist()
    except TypeError:
        made = "a tensor is taken for a sequence"
    return [*map(id, known[:-1]), known[-1], settings, torch.cuda.is_available(), has_triton(), made]


def counted(card):
    with FakeTensorMode(shape_env=ShapeEnv()):
        args = [torch.empty(*shape, device=DEVICE) for shape in (({ROWS}, {INNER}), ({INNER}, {COLUMNS}))]
    with pretend_card(card) as compiled:
        codes = {{name: count(fx.symbolic_trace(f), args, compiled, card) for name, f in GRAPHS.items()}}
    found = {{name: dataclasses.asdict(code) for name, code in codes.items()}}
    return {{**found, "targets": sorted({{binary.target for binary in compiled}})}}


before = state()
found = {{target: counted(card) for target, card in CARDS.items()}}
try:
    with pretend_card(CARDS["sm_90"]):
        during = state()
        raise KeyError
except KeyError:
    pass
print(json.dumps(dict(found, during=during == before, after=state() == before, sound=before[-1] == [5])))
"""


def run(*command: str) -> str:
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT / "benchmarks", capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def by_hand() -> dict[str, Any]:
    """Counts of graphs of which everything is known beforehand."""
    return json.loads(run("-c", BY_HAND).splitlines()[-1])


@pytest.mark.parametrize("target", list(CARDS))
def test_counts_are_those_of_graphs_that_one_can_count(by_hand: dict[str, Any], target: str) -> None:
    found = by_hand[target]
    result = 4 * ROWS * COLUMNS
    operands = 4 * (ROWS * INNER + INNER * COLUMNS)
    flops = 2 * ROWS * INNER * COLUMNS

    def of(name: str) -> dict[str, int]:
        sums = {each: found[name][each] for each in ("launches", "products", "moved", "flops")}
        return {"kernels": len(found[name]["kernels"]), **sums}

    hidden = {"kernels": 0, "launches": 0, "products": 2, "moved": operands + 3 * result, "flops": flops}
    assert of("second_pass") == hidden, "a sum inside an operator goes over its result once more"
    folded = {"kernels": 0, "launches": 0, "products": 1, "moved": operands + result + 4 * COLUMNS, "flops": flops}
    assert of("epilogue") == folded
    half = 4 * ROWS * 24
    between = {"kernels": 1, "launches": 1, "products": 2, "moved": operands + 3 * result + 2 * half + 4 * 24 * COLUMNS}
    for name in ("swiglu", "geglu"):
        counts = of(name)
        del counts["flops"]
        assert counts == between, "activation and gate are one kernel, which writes what the next product reads"
    few = 4 * 4 * COLUMNS
    assert of("rows_put")["moved"] == operands + result + 4 * few, "rows that are put in, and no others"
    put = 2 * 4 * 4 * INNER
    kept = {"kernels": 1, "launches": 1, "products": 1, "moved": operands + result + put, "flops": flops}
    assert of("rows_kept") == kept, "what computes rows writes them to their places, and nothing is copied whole"
    saved = of("side_by_side")["moved"] - of("part_by_part")["moved"]
    assert saved == 2 * 4 * (ROWS * (COLUMNS + 16) - ROWS * INNER), "as the pass estimates from the graph"
    tables = 2 * 4 * ROWS * 8
    own = {"kernels": 1, "launches": 1, "products": 0, "moved": 2 * 4 * ROWS * INNER + tables, "flops": 0}
    assert of("heads") == own, "heads of one token lie in one tile, and have its row of the tables once"
    assert of("product") == {"kernels": 0, "launches": 0, "products": 1, "moved": operands + result, "flops": flops}
    one = {"kernels": 1, "launches": 1, "products": 1, "moved": operands + 3 * result, "flops": flops}
    assert of("one_pass") == one, "a pass over the result reads and writes it once more"
    assert of("two_passes") == one, "passes that are fused read and write it once"
    bandwidth = CARDS[target].bandwidth
    assert found["one_pass"]["seconds"] == pytest.approx(one["moved"] / bandwidth), "so small that memory bounds both"
    assert found["one_pass"]["floor"] == pytest.approx((operands + result) / bandwidth)
    (kernel,) = found["one_pass"]["kernels"]
    assert "relu" in kernel["name"] and 0 < kernel["registers"] < 256 and kernel["stack"] == 0
    assert found["parts"]["moved"] == operands + 3 * result, "of a part that is read the rest does not count"
    assert found["parts"]["products"] == 1
    twice = of("twice")
    assert (twice["kernels"], twice["launches"], twice["products"]) == (2, 3, 2), "one kernel serves both results"
    assert twice["moved"] == 2 * one["moved"] + 2 * 4 * ROWS * INNER
    assert found["targets"] == [target], "Triton compiled for the card"


def test_nothing_stays_of_the_card(by_hand: dict[str, Any]) -> None:
    assert not by_hand["during"] and by_hand["after"] and by_hand["sound"]


def test_a_part_of_the_tokens_takes_the_same_products_and_fewer_bytes(tmp_path: Path) -> None:
    out = tmp_path / "found.json"
    plans = ("--plan", "ulysses=1", "--plan", "ulysses=2")
    printed = run("gpu_count.py", "--small", *plans, "--beside", "--json", str(out))
    assert printed.count("COUNTED, not measured on a card") == 4
    assert printed.count("the module block by block, without optional passes, with them") == 1
    found = json.loads(out.read_text())
    one, two = ({row["path"]: row for row in rows if row["path"]} for rows in found["counted"].values())
    apart = {row["path"]: row["code"] for row in found["apart"]["one rank"]}
    assert one.keys() == two.keys() == {*BLOCKS, "transformer_blocks.1"} <= found["module"].keys()
    for path, (launches, products) in BLOCKS.items():
        module = found["module"][path]
        for each in ("launches", "products", "moved", "flops"):
            assert module[each] == apart[path][each], "the captured graph is what the module's own code says"
        assert (module["launches"], module["products"]) == (launches, products)
        whole, part = one[path]["code"], two[path]["code"]
        assert whole["products"] == part["products"] < products and whole["moved"] < module["moved"]
        assert part["moved"] < whole["moved"] and two[path]["inputs"] < one[path]["inputs"]
        assert all(0 < len(code["kernels"]) <= code["launches"] < launches for code in (whole, part))
    assert [one[path]["calls"] for path in BLOCKS] == [1, 1, 1], "another norm follows the last of each kind"
    assert apart["transformer_blocks.0"] and "transformer_blocks.1" not in apart, "without that they are one"


def test_a_pass_that_is_left_out_is_told(tmp_path: Path) -> None:
    out = tmp_path / "found.json"
    rows = {}
    for name, flags in {"all": (), "apart": ("--without", "join_linears")}.items():
        printed = run("gpu_count.py", "--small", "--plan", "ulysses=1", *flags, "--json", str(out))
        assert ("without join_linears: COUNTED" in printed) == bool(flags)
        rows[name] = {row["path"]: row["code"] for row in json.loads(out.read_text())["counted"]["one rank"]}
    for path in BLOCKS:
        joined, apart = rows["all"][path], rows["apart"][path]
        assert joined["products"] < apart["products"] and joined["moved"] < apart["moved"]


CAPTURED = """
import json

import torch
from torch.utils import _pytree as pytree

from real_sizes import MODELS
from xdit_compile.capture.capture import capture

calls = {}
for name, build in MODELS.items():
    module, call = build(2)
    half = pytree.tree_map_only(torch.Tensor, lambda tensor: tensor.to(torch.bfloat16), call)
    program = capture(torch.nn.Module.to(module, torch.bfloat16), (), half)
    calls[name] = sum(bool(each.meta.get("repeated")) for each in program.calls())
print(json.dumps(calls))
"""


def test_models_of_real_size_have_blocks_that_repeat() -> None:
    calls = json.loads(run("-c", CAPTURED).splitlines()[-1])
    assert len(calls) == 7 and all(repeated >= 2 for repeated in calls.values()), calls
