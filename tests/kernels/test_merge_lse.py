"""The kernel that joins parts of attention, in Triton's interpreter, and compiled for cards that are not there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[2]
IN_INTERPRETER = """
import itertools

import torch

from xdit_compile.kernels.merge_lse import merge_by_kernel, merge_into

for dtype, width, seen in itertools.product((torch.float32, torch.bfloat16), (14, 64, 72), (True, False)):
    torch.manual_seed(0)
    out = torch.randn(2, 37, 3, width).transpose(1, 2)
    part = torch.randn(2, 3, 37, 2 * width)[..., ::2].to(dtype)
    lse, part_lse = 5 * torch.randn(2, 37, 3).transpose(1, 2), 5 * torch.randn(2, 3, 37)
    if not seen:
        nothing = float("-inf")
        lse[:, :, :9], part_lse[:, :, 5:12] = nothing, nothing
        out[:, :, :9], part[:, :, 5:12] = 0.0, 0.0
    (expected, expected_lse), before = merge_into((out.clone(), lse), (part, part_lse)), lse.clone()
    found, found_lse = merge_by_kernel((out, lse), (part, part_lse))
    assert found is out and lse.equal(before)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found_lse, expected_lse, rtol=1e-6, atol=1e-6)
merge_by_kernel((out[:, :, :0], lse[:, :, :0]), (part[:, :, :0], part_lse[:, :, :0]))
"""
ON_CARDS = """
from xdit_compile.backends.target.pretend_card import _resources
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from xdit_compile.kernels.merge_lse import _merge_kernel

names = _merge_kernel.arg_names
pointers = {"out": "*fp32", "lse": "*fp32", "part": "*bf16", "part_lse": "*fp32", "merged": "*fp32"}
constants = {"WIDTH": 128, "LANES": 128, "ROWS": 16, "out_lane": 1, "part_lane": 1}
signature = {name: pointers.get(name, "constexpr" if name in constants else "i64") for name in names}
aligned = {(at,): [["tt.divisibility", 16]] for at, name in enumerate(names) if signature[name] != "constexpr"}
for capability in (80, 90, 100):
    known = {(names.index(name),): value for name, value in constants.items()}
    made = compile(ASTSource(_merge_kernel, signature, known, aligned), target=GPUTarget("cuda", capability, 32))
    registers, stack = _resources(made.asm["cubin"])
    print(capability, stack, registers < 128)
"""


def run(program: str, **variables: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env={**os.environ, **variables}, capture_output=True,
        text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_parts_are_joined() -> None:
    """As PyTorch joins them: strides, ragged rows, and rows that saw no key in one part or in neither."""
    run(IN_INTERPRETER, TRITON_INTERPRET="1")


def test_it_compiles_for_cards_without_spills() -> None:
    assert run(ON_CARDS).splitlines() == [f"{card} 0 True" for card in (80, 90, 100)]
