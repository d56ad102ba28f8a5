"""PipeFusion with every other way to split: the very staleness of the same patches on one process, exact with none."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import procs
import pytest
import torch
from hybrids import Simulated
from splitting import captured, worst_difference
from stale_reference import difference
from torch.utils import _pytree as pytree
from zoo.pipelines import PIPELINES
from zoo.transformers import MODELS

import xdit_compile
from tests.methods.test_pipefusion import REFUSED, again, generate
from xdit_compile import Plan, XditCompileError
from xdit_compile.api import runner_of
from xdit_compile.distributed.mesh import Mesh
from xdit_compile.ir.axes import Product
from xdit_compile.ir.program import Program
from xdit_compile.passes.local.layout import Layout
from xdit_compile.passes.stages.choose_patches import choose_patches
from xdit_compile.plan.methods import PATCH, SEQUENCE

TURNED = ("data", "cfg", "tensor", "ulysses", "ring", "pipefusion", "distrifusion")


def label(value: Any) -> str:
    """A plan by what is above 1 in it."""
    names = ("cfg", "pipefusion", "patches", "ring", "ulysses", "tensor")
    if isinstance(value, str):
        return value
    return " ".join(f"{name}{getattr(value, name)}" for name in names if (getattr(value, name) or 1) > 1)


def moved(args: tuple, kwargs: dict) -> Any:
    """Inputs of another step: what has tokens is another, masks and labels stay."""
    return pytree.tree_map_only(
        torch.Tensor,
        lambda x: x + 0.3 * torch.sin(7 * x) if x.is_floating_point() and x.ndim > 2 else x,
        (args, kwargs),
    )


def check(name: str, plan: Plan) -> None:
    """Exact at once and patch by patch on what that left; in the next step as stale as on one process."""
    model = captured(name)
    alone, ranks = (Simulated(model, each) for each in (Plan(patches=plan.patch_count), plan))
    for found in (ranks.all_tokens(model.args, model.kwargs), ranks.in_patches(model.args, model.kwargs)):
        assert max(worst_difference(each, model.expected) for each in found) < 2e-5
    alone.all_tokens(model.args, model.kwargs)
    args, kwargs = moved(model.args, model.kwargs)
    (expected,) = alone.in_patches(args, kwargs)
    assert worst_difference(model.expected, expected) > 1e-3
    assert max(worst_difference(each, expected) for each in ranks.in_patches(args, kwargs)) < 2e-5


@pytest.mark.parametrize(
    ("name", "plan"),
    [
        ("pixart", Plan(patches=3, ulysses=2, ring=2)),
        pytest.param("sd3", Plan(patches=3, tensor=2), marks=pytest.mark.slow),
        pytest.param("flux", Plan(patches=3, ulysses=3), marks=pytest.mark.slow),
        pytest.param("sd3", Plan(patches=3, cfg=2), marks=pytest.mark.slow),
        pytest.param("pixart", Plan(patches=3, tensor=2), marks=pytest.mark.slow),
        pytest.param("pixart", Plan(patches=3, cfg=2, ulysses=2, tensor=2), marks=pytest.mark.slow),
        pytest.param("sd3", Plan(patches=5, ulysses=5), marks=pytest.mark.slow),
        pytest.param("sd3", Plan(patches=2, ulysses=2, ring=3, mesh_order=TURNED), marks=pytest.mark.slow),
        pytest.param("sana", Plan(patches=3, ulysses=2), marks=pytest.mark.slow),
        pytest.param("wan_t2v", Plan(patches=2, ulysses=3), marks=pytest.mark.slow),
        pytest.param("hunyuan_video", Plan(patches=2, ring=2), marks=pytest.mark.slow),
    ],
    ids=label,
)
def test_ranks_share_every_patch(name, plan):
    check(name, plan)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in MODELS if name not in REFUSED])
def test_ranks_share_every_patch_of_every_model(name):
    check(name, Plan(patches=2, ulysses=2))
    check(name, Plan(patches=3, ring=3))


def test_every_patch_is_shared_evenly():
    model = captured("flux")
    for plan in (Plan(patches=3, ulysses=2), Plan(patches=4, ulysses=2, ring=2)):
        split = choose_patches(model.inference, plan)
        (unit,) = (unit for unit in split.units if math.prod(axis.size for axis in unit) == 77)
        for patch in range(plan.patch_count):
            layouts = [Layout.of(plan, Mesh.simulated(plan, r), {SEQUENCE: split.units}) for r in range(plan.sequence)]
            names = [PATCH, SEQUENCE]
            counts = [each.keeping(split, patch).sharding.length(Product(unit), names) for each in layouts]
            assert sum(counts) == len(split.positions(Product(unit), patch)) and max(counts) - min(counts) <= 1


def exchanged(program: Program) -> list[str]:
    """The collectives in the structures of a program."""
    nodes = [node for structure in program.structures().values() for node in structure.graph.nodes]
    return [str(node.target) for node in nodes if str(node.target).startswith("xdit_compile.all_")]


def test_ranks_exchange_tokens_for_heads_within_a_patch():
    """What crosses in one patch are its own tokens, and what is kept the heads of one rank; nothing is gathered but
    the result."""
    model, plan = captured("pixart"), Plan(patches=3, ulysses=2)
    alone, ranks = Simulated(model, Plan(patches=3)), Simulated(model, plan)
    sizes = [sum(state.numel() for state in each.values()) for each in (*alone.states, *ranks.states)]
    assert sizes[0] == sizes[1] + sizes[2] and sizes[1] < 0.7 * sizes[0]
    for pipeline in ranks.ranks:
        assert not exchanged(pipeline.common), "what all patches need alike is computed by every rank"
        for patch in pipeline.patches:
            ops = exchanged(patch.program)
            assert set(ops) == {"xdit_compile.all_to_all.default", "xdit_compile.all_gather.default"}
            assert ops.count("xdit_compile.all_gather.default") == 1


def hybrid(rank: int, name: str, plan: Plan, steps: int) -> tuple[torch.Tensor, int, int]:
    found, runner = generate(name, plan, steps)
    return found, runner.weights.elements, runner.collected


@pytest.mark.parametrize(
    ("name", "plan"),
    [
        ("sd3", Plan(pipefusion=2, patches=3, ulysses=2)),
        pytest.param("sd3", Plan(patches=3, ulysses=2), marks=pytest.mark.slow),
        pytest.param("flux", Plan(pipefusion=2, patches=4, ring=2), marks=pytest.mark.slow),
        pytest.param("pixart", Plan(pipefusion=2, patches=3, ulysses=2), marks=pytest.mark.slow),
        pytest.param("pixart", Plan(patches=3, ulysses=3), marks=pytest.mark.slow),
        pytest.param("flux", Plan(patches=3, ulysses=2, ring=2), marks=pytest.mark.slow),
        pytest.param("pixart", Plan(patches=2, ulysses=2, tensor=2), marks=pytest.mark.slow),
        pytest.param("wan", Plan(pipefusion=2, ring=2), marks=pytest.mark.slow),
        pytest.param("flux_true_cfg", Plan(pipefusion=2, ulysses=2), marks=pytest.mark.slow),
        pytest.param("sd3", Plan(pipefusion=2, patches=3, cfg=2), marks=pytest.mark.slow),
        pytest.param("pixart", Plan(patches=3, cfg=2, ulysses=2), marks=pytest.mark.slow),
        pytest.param("flux_true_cfg", Plan(patches=3, cfg=2), marks=pytest.mark.slow),
        pytest.param("flux_true_cfg", Plan(pipefusion=2, patches=3, cfg=2), marks=pytest.mark.slow),
        pytest.param("wan", Plan(pipefusion=2, patches=3, cfg=2), marks=pytest.mark.slow),
        pytest.param("qwenimage", Plan(patches=3, cfg=2, ulysses=2), marks=pytest.mark.slow),
        pytest.param("sana", Plan(patches=3, ulysses=2), marks=pytest.mark.slow),
        pytest.param("sd3", Plan(pipefusion=2, patches=3, tensor=2), marks=pytest.mark.slow),
        pytest.param("flux", Plan(pipefusion=2, patches=3, tensor=2), marks=pytest.mark.slow),
        pytest.param("pixart", Plan(patches=3, tensor=3), marks=pytest.mark.slow),
    ],
    ids=label,
)
def test_processes_compute_what_one_does(name, plan):
    """Both with stale values and, where the warm-up is the whole run, without."""
    plan = dataclasses.replace(plan, backend="eager")
    alone, runner = generate(name, Plan(patches=plan.patch_count, backend="eager"), 4)
    for latents, elements, collected in procs.run(hybrid, plan.world_size, name, plan, 4):
        assert difference(latents, alone) < 2e-5
        assert plan.pipefusion * plan.tensor == 1 or elements < runner.weights.elements
        assert collected == 2 or runner.collected > 2, "once to verify, once for the result"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd3", "flux", "pixart"])
def test_a_warm_up_as_long_as_the_run_is_exact(name):
    expected, _ = generate(name, None, 3)
    plan = Plan(pipefusion=2, patches=3, ulysses=2, warmup_steps=3, backend="eager")
    for latents, _, _ in procs.run(hybrid, 4, name, plan, 3):
        assert difference(latents, expected) < 2e-5


def counted(rank: int, name: str, plan: Plan, steps: int) -> tuple[torch.Tensor, list[int]]:
    """Latents, and how many calls of each branch this rank computed after the warm-up."""
    case, computed = PIPELINES[name], []
    pipe = xdit_compile.parallelize(case.build(), plan)
    runner = runner_of(pipe.transformer)
    plain = runner._in_patches

    def count(flow: Any, leaves: Any, branch: Any, **more: Any) -> Any:
        computed.append(branch.index)
        return plain(flow, leaves, branch, **more)

    runner._in_patches = count
    return case.call(pipe, steps=steps), computed


@pytest.mark.slow
def test_branches_in_calls_of_their_own_are_computed_once():
    """By one half of the mesh each."""
    steps, plan = 5, Plan(cfg=2, patches=2, backend="eager")
    alone, _ = generate("flux_true_cfg", Plan(patches=2, backend="eager"), steps)
    for half, (latents, computed) in enumerate(procs.run(counted, 2, "flux_true_cfg", plan, steps)):
        assert difference(latents, alone) < 2e-5
        assert computed == [0] + [half] * (steps - 1), "once to verify"


@pytest.mark.slow
def test_what_a_rank_does_not_read_does_not_pile_up():
    """The last stage of a half needs the other half's patches at the very end alone."""
    alone, _ = generate("flux_true_cfg", Plan(patches=2, backend="eager"), 200)
    for latents, _, _ in procs.run(hybrid, 4, "flux_true_cfg", Plan(cfg=2, pipefusion=2, backend="eager"), 200):
        assert difference(latents, alone) < 2e-5


@pytest.mark.slow
def test_halves_go_on_after_a_run_that_was_given_up():
    plan = Plan(cfg=2, pipefusion=2, patches=3, backend="eager")
    for first, second in procs.run(again, 4, "flux_true_cfg", plan):
        assert torch.equal(first, second)


def refused(rank: int, name: str, plan: Plan) -> str:
    with pytest.raises(XditCompileError) as error:
        generate(name, plan, 3)
    return str(error.value)


@pytest.mark.slow
def test_a_pipeline_without_guidance_has_no_branches_to_share():
    for said in procs.run(refused, 2, "flux", Plan(cfg=2, patches=2, backend="eager")):
        assert "cfg=2 but this pipeline makes one call of the denoiser" in said
