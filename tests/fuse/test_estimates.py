"""What passes estimate of a place is what is counted in the code of that place, generated for a card that is not there.

In a process of its own, so that nothing stays of the card.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")
pytestmark = pytest.mark.slow

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
SCRIPT = """
import json

from gpu_count import denoiser
from xdit_compile import Plan
from xdit_compile.backends.target.pretend_card import CARDS, pretend_card
from xdit_compile.compiler import analyse, compiled
from xdit_compile.distributed.mesh import Mesh
from xdit_compile.passes.fuse.fusions import IN_ORDER
from xdit_compile.passes.fuse.selection import Chooser
from xdit_compile.passes.fuse.timings import Timings
from xdit_compile.reports.counting.count import counted
from xdit_compile.runtime.verify.timed import both, without_views


class Asked(Chooser):
    def choose(self, site, shapes):
        small = site.small(shapes)
        asked.setdefault(small.key(self.name), (small, site.apart, site.fused))
        return super().choose(site, shapes)


def code_of(program):
    (row,) = counted(without_views(program)[0], binaries, CARDS["sm_90"])
    return row.code.moved, row.code.launches + row.code.products


model, call = denoiser("FLUX.1-dev", 2, False)
plan, rows = Plan(ulysses=2), []
analysis = analyse(model, plan, (), call)
state = compiled(analysis, plan, Mesh.simulated(plan, 0), until="hoist_positions")
program = state.programs["call"]
with pretend_card(CARDS["sm_90"]) as binaries:
    for fusion in IN_ORDER:
        asked = {}
        fusion.run(program, Asked(fusion.name))
        for small, *estimated in asked.values():
            rows.append([fusion.name, estimated, list(map(code_of, both(small, fusion, program)))])
        program = fusion.run(program, fusion.chooser(Timings()))
print(json.dumps(rows))
"""


@pytest.fixture(scope="module")
def rows() -> list[Any]:
    """Of every place: the pass, bytes and launches apart and fused as estimated, and as counted."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=BENCHMARKS, capture_output=True, text=True, timeout=500, check=False
    )
    assert done.returncode == 0, done.stderr
    found: list[Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("name", ["fold_activations", "split_concatenations", "join_linears"])
def test_products_move_and_launch_what_is_estimated(rows: list[Any], name: str) -> None:
    some = [(estimated, counted) for each, estimated, counted in rows if each == name]
    assert some and all(estimated == counted for estimated, counted in some), some


def test_packing_saves_what_is_estimated(rows: list[Any]) -> None:
    """The kernel itself loads tables once more for each tile, packed or not."""
    some = [(estimated, counted) for each, estimated, counted in rows if each == "pack_heads"]
    saved = [[apart[0] - fused[0] for apart, fused in pair] for pair in some]
    assert some and all(one == other for one, other in saved), some
    assert all([each[1] for each in estimated] == [each[1] for each in counted] for estimated, counted in some)


def test_norms_and_rotations_of_joined_streams_move_about_what_is_estimated(rows: list[Any]) -> None:
    """Of one stream inductor makes one kernel, which loads turned lanes twice; the counter counts no place twice."""
    some = [(estimated, counted) for each, estimated, counted in rows if each == "norm_rope"]
    joined = [(estimated, counted) for estimated, counted in some if counted[0][1] > 1]
    single = [(estimated, counted) for estimated, counted in some if counted[0][1] == 1]
    assert joined and single
    for (apart, fused), (counted_apart, counted_fused) in joined:
        assert apart[0] == pytest.approx(counted_apart[0], rel=0.02) and 1 < apart[1] <= counted_apart[1]
        assert fused[0] == pytest.approx(counted_fused[0], rel=0.12) and fused[1] == counted_fused[1] == 1
        assert counted_fused[0] < counted_apart[0]
    for (apart, fused), (counted_apart, counted_fused) in single:
        assert apart[1] == fused[1] == counted_fused[1] == 1
        assert counted_apart[0] < apart[0] < 1.5 * counted_apart[0]
