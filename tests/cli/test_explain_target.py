"""``explain`` for a card that is not there: what is counted, and what is refused before anything is."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from commands import TINY_PIPELINE, one_error, run

import xdit_compile
from xdit_compile.backends.target.cards import CARDS
from xdit_compile.errors import UsageError

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[2]
BY_HAND = """
import dataclasses
import json

import torch
from torch import nn

import xdit_compile


class SharedKeys(nn.Module):
    def forward(self, queries, keys):
        return nn.functional.scaled_dot_product_attention(queries, keys, keys, enable_gqa=True)


with torch.device("meta"):
    layers = nn.Sequential(nn.Linear(32, 48), nn.Sigmoid()).eval()
    rows, queries, keys = torch.empty(64, 32), torch.empty(1, 4, 8, 16), torch.empty(1, 2, 8, 16)
found = xdit_compile.explain(layers, xdit_compile.Plan(), (rows,), target="sm_90")
shared = xdit_compile.explain(SharedKeys().eval(), xdit_compile.Plan(), (queries, keys), target="sm_90")
said = {"text": str(found), "shared": str(shared)}
print(json.dumps({**said, "counted": dataclasses.asdict(found.counted)}))
"""
BOTH_WAYS = """
import sys

sys.path[:0] = ["benchmarks", "tests"]

import gpu_count
import xdit_compile
from xdit_compile import Plan
from xdit_compile.backends.target.cards import CARDS
from xdit_compile.capture.capture import capture
from zoo.transformers import MODELS

case = MODELS["flux"]
module, (args, kwargs), plan = case.build(2), case.inputs(), Plan(ulysses=2)
found = xdit_compile.explain(module, plan, args, kwargs, target="sm_80").counted
(program,) = found.programs
(counted,) = gpu_count.measure(capture(module, args, kwargs), [plan], CARDS["sm_80"])
print(len(counted), list(program.rows) == counted)
"""


def in_a_process(program: str) -> str:
    """What a program prints last; nothing of a card stays in this process."""
    command = [sys.executable, "-W", "ignore", "-c", program]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


def test_a_linear_layer_is_counted_as_one_can_by_hand() -> None:
    found = json.loads(in_a_process(BY_HAND))
    (program,) = found["counted"]["programs"]
    (row,) = program["rows"]
    code = row["code"]
    operands, result = 4 * (64 * 32 + 32 * 48 + 48), 4 * 64 * 48
    assert (program["name"], row["calls"], row["inputs"]) == ("call", 1, operands)
    assert (code["launches"], code["products"], code["flops"]) == (1, 1, 2 * 64 * 32 * 48)
    assert code["moved"] == operands + 3 * result
    (kernel,) = code["kernels"]
    assert "sigmoid" in kernel["name"] and kernel["registers"] > 0 and kernel["stack"] == 0
    assert "COUNTED, not measured on a card" in found["text"] and "sm_90" in found["text"]
    assert "norm_rope: 0 values" in found["text"], "passes that are for GPUs are told"
    assert "no kernel has a stack" in found["text"] and "all calls" in found["text"]
    *_, last = found["shared"].splitlines()
    assert last.startswith("call: not counted, as heads of scaled_dot_product_attention") and "share keys" in last


def test_a_target_that_cannot_be_compiled_for_is_refused_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = f"--target sm_70 is unknown; choose one of {', '.join(CARDS)}"
    assert one_error(run("explain", "--target", "sm_70", cwd=tmp_path), exit_code=2) == said
    with pytest.raises(UsageError, match="choose one of sm_80"):
        xdit_compile.explain(None, target="sm_70")
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(UsageError, match="install the triton package"):
        xdit_compile.explain(None, target="sm_90")


@pytest.mark.slow
def test_it_counts_what_the_benchmark_counts() -> None:
    count, same = in_a_process(BOTH_WAYS).split()
    assert int(count) >= 4 and same == "True"


@pytest.mark.slow
def test_every_program_of_a_plan_is_counted(tmp_path: Path) -> None:
    flags = ("--model", str(TINY_PIPELINE), "--pipefusion_parallel_degree", "2", "--target", "sm_90")
    done = run("explain", *flags, cwd=tmp_path)
    said = [line for line in done.stderr.splitlines() if not line.endswith(" s so far)")]
    assert done.returncode == 0 and said == [], done.stderr
    for name in ("full", "common", "patch_0", "patch_1"):
        assert f"{name}: counted on this rank" in done.stdout
    assert done.stdout.count("all calls") == 4 and "not counted" not in done.stdout
    assert "bfloat16" in done.stdout, "where no dtype is asked for, as on a card"
