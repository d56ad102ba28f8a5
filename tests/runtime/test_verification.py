"""What verification lets pass: rounding, also where a module rounds to half the digits inside, and nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from splitting import CASES, partition_all, partition_rows
from torch import nn
from torch.utils import _pytree as pytree

import xdit_compile
from xdit_compile import Plan
from xdit_compile.backends.eager import Eager
from xdit_compile.capture.capture import capture
from xdit_compile.errors import VerificationError
from xdit_compile.ir.precision import precision_for
from xdit_compile.passes.axes.infer import infer
from xdit_compile.passes.rules.registry import rulebook
from xdit_compile.runtime.verify import simulated_mesh as simulated
from xdit_compile.runtime.verify.simulated_mesh import run_simulated
from xdit_compile.runtime.verify.verification import ROWS, TOLERANCE, Difference, narrow_rounding, verify


class Narrow(nn.Module):
    """Attention in a dtype of its own, as some models of float32 have it."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype
        self.qkv, self.out = nn.Linear(12, 36), nn.Linear(12, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = (part.unflatten(-1, (3, 4)).transpose(1, 2).to(self.dtype) for part in self.qkv(x).chunk(3, -1))
        found = nn.functional.scaled_dot_product_attention(*parts)
        return x + self.out(found.transpose(1, 2).flatten(2).float())


@pytest.mark.parametrize(("dtype", "least", "most"), [(torch.bfloat16, 1e-4, 2e-2), (torch.float32, 0.0, 0.0)])
def test_a_module_that_rounds_inside_may_round_otherwise(dtype, least, most):
    torch.manual_seed(0)
    module, x = Narrow(dtype).eval(), torch.randn(1, 9, 12)
    program = capture(module, (x,), {})
    expected = module(x).detach()
    asked = []

    def slack() -> Difference:
        asked.append(narrow_rounding(program, module, (x,), {}))
        return asked[-1]

    verify(expected * (1 + 1e-6), expected, slack)
    assert not asked
    scale = expected.abs().max()
    if most:
        verify(expected + least / 2 * scale, expected, slack)
        assert least <= asked[-1].greatest <= most
    else:
        with pytest.raises(VerificationError):
            verify(expected + 1e-4 * scale, expected, slack)
        assert asked == [Difference()]
    with pytest.raises(VerificationError, match="differs from the unsplit one by 5.0e-02"):
        verify(expected + 0.05 * scale, expected, slack)


class Rotated(nn.Module):
    """Casts in the middle of a module, as of rotated queries."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.to(torch.bfloat16).float()


def test_a_cast_rounds_the_other_way_only_next_to_the_middle():
    """Of 1 and its neighbour 1 + 2 ** -7 the middle is 1 + 2 ** -8."""
    for beside, most in ((0.0, 2**-7), (1e-7, 2**-7), (-1e-7, 2**-7), (1e-5, 0.0), (-1e-5, 0.0)):
        x = torch.full((2, 3), 1 + 2**-8 + beside)
        program = capture(Rotated(), (x,), {})
        assert narrow_rounding(program, Rotated(), (x,), {}).greatest == pytest.approx(most, rel=0.01)


class Blended(nn.Module):
    """A picture and what its neighbours add to it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 2 * self.second(self.first(x).tanh())


def test_a_wrong_row_at_a_seam_is_found_in_bfloat16(monkeypatch):
    """Below 8 % of the greatest value, where one value is greater than others by much."""
    torch.manual_seed(0)
    module, x = Blended().eval().bfloat16(), torch.randn(1, 4, 12, 10, dtype=torch.bfloat16)
    x[0, 0, 2, 5] = 20
    expected = module(x).detach()
    ranks = partition_rows(infer(capture(module, (x,), {}), rulebook()), Plan(ring=2))
    programs = [rank.program for rank in ranks]
    for found in run_simulated(programs, module, (x,), {}):
        verify(found, expected)
    own = simulated.simulate
    lost = lambda op, given: [made * 0 if op is simulated.ALL_TO_ALL else made for made in own(op, given)]  # noqa: E731
    monkeypatch.setattr(simulated, "simulate", lost)
    (found, _) = run_simulated(programs, module, (x,), {})
    difference = Difference.of(found, expected)
    assert 0 < difference.greatest < TOLERANCE[torch.bfloat16] and difference.row > 2 * ROWS[torch.bfloat16]
    assert difference.where == (2, 6) or difference.where == (2, 5)
    with pytest.raises(VerificationError, match=r"root mean square at position [56] of dim 2 \(allowed 5e-02\)"):
        verify(found, expected)


HONEST = [
    pytest.param(name, dtype, marks=[] if (name, dtype) == ("sd3", torch.bfloat16) else [pytest.mark.slow])
    for name in ("sd3", "flux", "chroma", "wan_t2v", "unet_sdxl", "ltx")
    for dtype in (torch.bfloat16, torch.float16, torch.float32)
]


@pytest.mark.parametrize(("name", "dtype"), HONEST)
def test_honest_splits_stay_far_below_the_bounds(name, dtype):
    """At less than half of what is allowed, and of what all sums rounded otherwise would do."""
    case = CASES[name]
    module = case.build().to(dtype)
    args, kwargs = pytree.tree_map_only(
        torch.Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, case.inputs()
    )
    with torch.no_grad():
        expected = pytree.tree_leaves(module(*args, **kwargs))
    inference = infer(capture(module, args, kwargs), rulebook())
    most = Difference(TOLERANCE[dtype] / 2, ROWS[dtype] / 2)
    if dtype != torch.float32:
        moved = narrow_rounding(inference.program, module, args, kwargs)
        assert moved.within(Difference(TOLERANCE[dtype], ROWS[dtype]))
    for plan in (Plan(ulysses=2), Plan(ring=3), Plan(tensor=2), Plan(ulysses=2, ring=2)):
        ranks = partition_all(inference, plan)
        for found in run_simulated([rank.program for rank in ranks], module, args, kwargs):
            verify(found, expected)
            for one, other in zip(pytree.tree_leaves(found), expected, strict=True):
                assert Difference.of(one, other).within(most)


def test_equal_infinities_and_short_rows():
    x = torch.randn(3, 20)
    x[1, 4] = float("inf")
    assert Difference.of(x, x.clone()) == Difference()
    y = x.clone()
    y[2, 7] = float("nan")
    assert not Difference.of(y, x).within(Difference(1.0, 1.0))
    short = torch.ones(4, 3)
    assert Difference.of(short * 2, short) == Difference(1.0, 0.0)
    assert Difference.of(torch.zeros(0, 3), torch.zeros(0, 3)) == Difference()
    with pytest.raises(VerificationError, match=r"by its form, float32\(4, 3\) and not float32\(3, 20\)"):
        verify(short, x)


# ---- TF32


def said() -> dict[str, object]:
    """What PyTorch says of TF32 and its like, in its older and newer way; it refuses to say what they say otherwise."""
    asked = {
        "products": lambda: torch.backends.cuda.matmul.allow_tf32,
        "convolutions": lambda: torch.backends.cudnn.allow_tf32,
        "precision": torch.get_float32_matmul_precision,
    }
    found: dict[str, object] = {
        "new products": torch.backends.cuda.matmul.fp32_precision,
        "new convolutions": torch.backends.cudnn.conv.fp32_precision,
        "products on CPUs": torch.backends.mkldnn.matmul.fp32_precision,
        "all": torch.backends.fp32_precision,
    }
    for name, ask in asked.items():
        try:
            found[name] = ask()
        except RuntimeError:
            found[name] = "mixed"
    return found


def older() -> None:
    torch.backends.cuda.matmul.allow_tf32 = True


def newer() -> None:
    torch.backends.cuda.matmul.fp32_precision = "tf32"


WAYS = {
    "default": lambda: None,
    "older": older,
    "newer": newer,
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
}


class Told(nn.Linear):
    """A linear that notes what holds while it runs, and so does what runs in its place."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if type(x) is torch.Tensor:
            INSIDE.append(said())
        return super().forward(x)


INSIDE: list[dict[str, object]] = []
"""What held in each run of the module and of programs."""


def told(self: Eager, root: Any) -> Any:
    """A program that notes what holds while it runs."""

    def run(*given: torch.Tensor) -> Any:
        INSIDE.append(said())
        return root(*given)

    return run


@pytest.mark.parametrize("way", WAYS)
def test_no_tf32_while_results_are_compared(way, monkeypatch):
    """In the module's runs and in the split program's; afterwards what the user said holds, in the next call too."""
    with torch.backends.flags(fp32_precision="none"):
        before = said()
        WAYS[way]()
        try:
            users = said()
            INSIDE.clear()
            module, x = Narrow(torch.float32).eval().requires_grad_(False), torch.randn(1, 9, 12)
            module.out = Told(12, 12).eval().requires_grad_(False)
            monkeypatch.setattr(Eager, "compile", told)
            xdit_compile.parallelize(module, Plan(backend="eager", patches=2))
            module(x)
            compared, last = INSIDE[:-1], INSIDE[-1]
            assert len(compared) > 3 and all(each["new products"] in ("ieee", "none") for each in compared)
            assert all(each["new convolutions"] in ("ieee", "none") for each in compared)
            assert all(each["products on CPUs"] in ("ieee", "none") for each in compared)
            assert all([each["products"], each["convolutions"]] == [False, False] for each in compared)
            assert last == users == said() and (way == "default") == (users == before)
            xdit_compile.restore(module)
        finally:
            torch.set_float32_matmul_precision("highest")
            torch.backends.cuda.matmul.fp32_precision = torch.backends.mkldnn.matmul.fp32_precision = "none"
    assert said() == before


def test_results_of_half_the_digits_are_compared_as_they_are():
    for dtype, free in ((torch.float32, False), (torch.int64, False), (torch.bfloat16, True)):
        with precision_for([torch.zeros(1, dtype=dtype)]):
            assert torch.backends.cudnn.allow_tf32 is free
