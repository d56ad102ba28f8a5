"""``Plan(compile="background")``: a new size runs at once; all ranks take up compiled graphs at the same step."""

from __future__ import annotations

import time
from pathlib import Path

import diffusers
import procs
import pytest
import torch

import xdit_compile
from xdit_compile import Plan
from xdit_compile.errors import PlanError

MOST_STEPS = 4000


def steps_until_compiled(rank: int, folder: str, degrees: dict[str, int]) -> tuple[int, int, int, float]:
    """At which step compiled graphs took over, how many were compiled here and loaded, and the worst difference."""
    torch.manual_seed(0)
    module = diffusers.FluxTransformer2DModel(
        in_channels=8, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=8,
        joint_attention_dim=24, pooled_projection_dim=24, axes_dims_rope=(4, 6, 6),
    ).eval()  # fmt: skip
    kwargs = {
        "hidden_states": torch.randn(1, 64, 8), "encoder_hidden_states": torch.randn(1, 16, 24),
        "pooled_projections": torch.randn(1, 24), "timestep": torch.tensor([0.5]), "img_ids": torch.zeros(64, 3),
        "txt_ids": torch.zeros(16, 3),
    }  # fmt: skip
    expected = module(**kwargs).sample
    xdit_compile.parallelize(module, Plan(cache=folder, compile="background", backend="inductor", **degrees))
    runner, worst = xdit_compile.api.runner_of(module), 0.0
    assert runner is not None
    for step in range(MOST_STEPS):  # noqa: B007 - returned
        result = module(**kwargs).sample
        worst = max(worst, float((result - expected).abs().max() / expected.abs().max()))
        latest = runner.calls.latest
        if latest is None or latest.pending is None or latest.pending.done:
            break
        time.sleep(0.05)
    counts = runner.backend.codes.counts  # type: ignore[attr-defined]
    return step, counts.compiled, counts.loaded, worst


@pytest.mark.slow
@pytest.mark.parametrize("degrees", [{"ulysses": 2}, {"pipefusion": 2}], ids=str)
def test_ranks_go_on_with_compiled_graphs_at_the_same_step(degrees: dict[str, int], tmp_path: Path) -> None:
    cold = procs.run(steps_until_compiled, 2, str(tmp_path), degrees, timeout=400)
    assert cold[0][0] == cold[1][0] > 0
    assert all(compiled == 0 and loaded > 0 and worst <= 2e-5 for _, compiled, loaded, worst in cold), cold
    warm = procs.run(steps_until_compiled, 2, str(tmp_path), degrees, timeout=200)
    assert [each[:3] for each in warm] == [(0, 0, loaded) for _, _, loaded, _ in cold]


def test_it_takes_a_cache() -> None:
    with pytest.raises(PlanError, match=r"compile='background' hands graphs over by way of the cache, and cache=None"):
        Plan(compile="background", cache=None).check()
    with pytest.raises(PlanError, match="compile='later' is unknown; choose one of now, background"):
        Plan(compile="later").check()
