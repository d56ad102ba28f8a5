"""PipeFusion: patches in flight, stale keys and values as published, nothing more stale than that."""

from __future__ import annotations

import dataclasses
import itertools
import warnings
from collections.abc import Callable, Hashable
from typing import Any

import diffusers
import procs
import pytest
import torch
from conformance import cases
from splitting import captured
from stale_reference import Reference, along, difference, digest_of
from torch._dynamo.utils import counters
from torch.utils import _pytree as pytree
from zoo.pipelines import PIPELINES
from zoo.transformers import MODELS, Draw, randomise

import xdit_compile
from xdit_compile import Plan, XditCompileError
from xdit_compile.api import runner_of
from xdit_compile.compiler import place_stage, separated
from xdit_compile.distributed.mesh import Mesh
from xdit_compile.errors import AgreementError
from xdit_compile.runtime.tensors.patched_tensor import whole_of


def grid(sizes: tuple[int, ...], cut: int, before: int = 0, after: int = 0) -> Any:
    """Positions of the patches of a flattened grid, cut along one of its dims, between tokens of the first patch."""

    def positions(held: list[torch.Tensor], tokens: int) -> list[torch.Tensor] | None:
        count = int(torch.tensor(sizes).prod())
        if tokens != before + count + after:
            return None
        numbers = torch.arange(count).reshape(sizes) + before
        found = [numbers.index_select(cut, each).flatten() for each in held]
        others = torch.cat([torch.arange(before), torch.arange(before + count, tokens)])
        return [torch.cat([others, found[0]]), *found[1:]]

    return positions


# name: patches of the result in pixels a token, tokens of the picture, branch
CASES: dict[str, tuple[int, Any, Callable[[tuple, dict], Hashable]]] = {
    "flux": (1, grid((77,), 0, before=13), lambda args, kwargs: 0),
    "flux_true_cfg": (1, grid((77,), 0, before=13), digest_of("encoder_hidden_states")),
    "sd3": (2, grid((7, 11), 1, after=13), lambda args, kwargs: 0),
    "pixart": (2, grid((7, 11), 1), lambda args, kwargs: 0),
    "hunyuandit": (2, grid((7, 11), 1), lambda args, kwargs: 0),
    "sana": (1, grid((7, 11), 1), lambda args, kwargs: 0),
    "wan": (1, grid((5, 5, 7), 0), digest_of("encoder_hidden_states")),
    "qwenimage": (1, grid((77,), 0, before=13), digest_of("encoder_hidden_states")),
}


def generate(name: str, plan: Plan | None, steps: int, **more: Any) -> tuple[torch.Tensor, Any]:
    case = PIPELINES[name]
    pipe = case.build()
    if plan is not None:
        xdit_compile.parallelize(pipe, plan)
    found = case.call(pipe, steps=steps, **more)
    return found, runner_of(pipe.transformer)


def by_reference(name: str, cuts: Any, steps: int, warmup: int) -> torch.Tensor:
    case = PIPELINES[name]
    scale, tokens, branch = CASES[name]
    pipe = case.build()
    held = [torch.tensor(positions[::scale]) // scale for positions in cuts.positions]
    masks = along(cuts.positions, cuts.size, cuts.back)
    pipe.transformer.forward = Reference(
        pipe.transformer, lambda count: tokens(held, count), masks, warmup, branch, (lambda size: held, 1)
    )
    return case.call(pipe, steps=steps)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name == "flux_true_cfg" else ()) for name in CASES]
)
def test_the_staleness_is_the_published_one(name):
    found, runner = generate(name, Plan(patches=3, backend="eager"), 5)
    (flow,) = runner.calls
    expected = by_reference(name, flow.pipeline.results[0], 5, 1)
    exact, _ = generate(name, None, 5)
    assert difference(found, expected) < 2e-5 < 1e-3 < difference(found, exact)


def rank(index: int, name: str, plan: Plan, steps: int, more: dict[str, Any]) -> tuple[torch.Tensor, int, int]:
    found, runner = generate(name, plan, steps, **more)
    assert runner.pipe.kept <= 2 * 3 * plan.patch_count, "what was sent long ago is let go"
    return found, runner.weights.elements, runner.collected


@pytest.mark.parametrize(
    ("name", "stages", "patches"),
    [
        ("flux_true_cfg", 2, 3),
        pytest.param("sd3", 2, 5, marks=pytest.mark.slow),
        pytest.param("hunyuandit", 3, 2, marks=pytest.mark.slow),
        pytest.param("wan", 2, 2, marks=pytest.mark.slow),
        pytest.param("flux", 3, 4, marks=pytest.mark.slow),
    ],
)
def test_stages_compute_what_one_process_does(name, stages, patches):
    """Both with stale values and, where the warm-up is the whole run, without."""
    alone, runner = generate(name, Plan(patches=patches, backend="eager"), 4)
    plan = Plan(pipefusion=stages, patches=patches, backend="eager")
    found = procs.run(rank, stages, name, plan, 4, {})
    total = runner.weights.elements
    for latents, elements, collected in found:
        assert difference(latents, alone) < 2e-5
        assert elements < 0.9 * total
        assert collected == 2, "once to verify, once for the result"


def test_a_warm_up_as_long_as_the_run_is_exact():
    expected, _ = generate("sd3", None, 3)
    found, _ = generate("sd3", Plan(patches=3, warmup_steps=3, backend="eager"), 3)
    assert difference(found, expected) < 2e-5


SCHEDULERS = {
    "sd3": ["FlowMatchHeunDiscreteScheduler"],
    "pixart": [
        "DDIMScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "EulerAncestralDiscreteScheduler",
        "PNDMScheduler", "DEISMultistepScheduler", "LMSDiscreteScheduler", "DDPMScheduler", "SASolverScheduler",
    ],
}  # fmt: skip
"""One step after the other, several values of history, fresh noise in every step, two calls a step."""
DRAINS = {"PNDMScheduler": 2, "SASolverScheduler": 12}
"""How often a scheduler adds patches in place to a tensor that is in none, which takes all of them."""


@pytest.mark.parametrize(("name", "scheduler"), [(name, each) for name, all_ in SCHEDULERS.items() for each in all_])
def test_schedulers_run_patch_by_patch(name, scheduler):
    """Hardly a scheduler needs all patches between the first step and the last, and none makes another picture."""
    import diffusers

    def change(pipe: Any) -> None:
        pipe.scheduler = getattr(diffusers, scheduler).from_config(pipe.scheduler.config)

    case, (scale, tokens, branch) = PIPELINES[name], CASES[name]
    pipe = case.build()
    change(pipe)
    xdit_compile.parallelize(pipe, Plan(patches=3, backend="eager"))
    found = case.call(pipe, steps=5)
    runner = runner_of(pipe.transformer)
    assert runner.collected == 2 + DRAINS.get(scheduler, 0), "once to verify, once for the result"
    (flow,) = runner.calls
    cuts = flow.pipeline.results[0]
    held = [torch.tensor(positions[::scale]) // scale for positions in cuts.positions]
    plain = case.build()
    change(plain)
    masks = along(cuts.positions, cuts.size, cuts.back)
    plain.transformer.forward = Reference(plain.transformer, lambda count: tokens(held, count), masks, 1, branch)
    assert difference(found, case.call(plain, steps=5)) < 1e-4


def test_a_generation_sees_nothing_of_the_one_before():
    """Another prompt, another size, an exception in the middle, a run that was given up: none leaves a trace."""
    case, plan = PIPELINES["sd3"], Plan(patches=3, backend="eager")
    first, second = ({"seed": seed} for seed in (0, 1))
    size = {"height": 80, "width": 144}
    fresh = {}
    for key, more in (("second", second), ("size", {**first, **size})):
        pipe = case.build()
        xdit_compile.parallelize(pipe, plan)
        fresh[key] = case.call(pipe, steps=4, **more)
    pipe = case.build()
    xdit_compile.parallelize(pipe, plan)
    case.call(pipe, steps=4, **first)
    assert torch.equal(case.call(pipe, steps=4, **second), fresh["second"])
    assert torch.equal(case.call(pipe, steps=4, **first, **size), fresh["size"])

    def fail(pipe: Any, step: int, *rest: Any) -> dict[str, Any]:
        if step == 2:
            raise KeyboardInterrupt
        return {}

    with pytest.raises(KeyboardInterrupt):
        case.call(pipe, steps=4, **first, callback_on_step_end=fail)
    assert torch.equal(case.call(pipe, steps=4, **second), fresh["second"])


def again(index: int, name: str, plan: Plan) -> list[torch.Tensor]:
    case = PIPELINES[name]
    pipe = case.build()
    xdit_compile.parallelize(pipe, plan)
    found = [case.call(pipe, steps=4, seed=1)]

    def fail(pipe: Any, step: int, *rest: Any) -> dict[str, Any]:
        if step == 2:
            raise KeyboardInterrupt
        return {}

    with pytest.raises((KeyboardInterrupt, AgreementError)):
        case.call(pipe, steps=4, callback_on_step_end=fail)
    return [*found, case.call(pipe, steps=4, seed=1)]


def test_stages_go_on_after_a_run_that_was_given_up():
    """What was on its way then is no part of the next run."""
    for first, second in procs.run(again, 2, "sd3", Plan(pipefusion=2, patches=3, backend="eager")):
        assert torch.equal(first, second)


def test_calls_outside_of_a_generation_are_exact():
    case = MODELS["sd3"]
    module = case.build()
    args, kwargs = case.inputs()
    with torch.no_grad():
        expected = [module(*args, **kwargs)[0] for _ in range(2)]
    xdit_compile.parallelize(module, Plan(patches=3, backend="eager"))
    for each in expected:
        assert difference(module(*args, **kwargs)[0], each) < 2e-5
    other = {**kwargs, "hidden_states": kwargs["hidden_states"] + 1}
    with xdit_compile.generation(module):
        module(*args, **kwargs)
        stale = module(*args, **other)[0] + 0
    again = module(*args, **other)[0]
    assert difference(stale, again) > 1e-4


def test_a_callback_reads_and_changes_latents():
    """What it changes counts; all patches are collected for it."""
    case = PIPELINES["sd3"]
    means = []

    def change(pipe: Any, step: int, time: Any, given: dict[str, Any]) -> dict[str, Any]:
        means.append(float(given["latents"].mean()))
        return {"latents": given["latents"] * 0.5}

    expected = case.call(case.build(), steps=3, callback_on_step_end=change)
    wanted, means = means, []
    pipe = case.build()
    xdit_compile.parallelize(pipe, Plan(patches=3, warmup_steps=3, backend="eager"))
    assert difference(case.call(pipe, steps=3, callback_on_step_end=change), expected) < 2e-5
    pipe = case.build()
    xdit_compile.parallelize(pipe, Plan(patches=3, backend="eager"))
    with pytest.warns(UserWarning, match="all patches were read between two steps, which waited"):
        case.call(pipe, steps=3, callback_on_step_end=change)
    assert means[:1] == pytest.approx(wanted[:1], rel=1e-4)


@pytest.mark.parametrize(
    ("plan", "said"),
    [
        ({"pipefusion": 1, "patches": 12}, "cannot cut this denoiser into 12 patches"),
        ({"patches": 2, "stage_layers": (5,)}, r"stage_layers=\(5,\) must be 1 numbers that add up to \d blocks"),
        ({"patches": 2, "warmup_steps": 9}, "warmup_steps=9 but this generation has 3 steps; use warmup_steps=3"),
    ],
)
def test_what_does_not_fit_is_refused(plan, said):
    case = PIPELINES["sd3"]
    pipe = case.build()
    xdit_compile.parallelize(pipe, Plan(**plan, backend="eager"))
    with pytest.raises(XditCompileError, match=said):
        case.call(pipe, steps=3)


@pytest.mark.parametrize(
    ("plan", "said"),
    [
        ({"patches": 0}, "patches=0 must be a whole number of at least 1"),
        ({"warmup_steps": 0}, "warmup_steps=0 must be at least 1"),
        ({"pipefusion": 2, "stage_layers": (1, 2, 3)}, "must have one number for each stage, and pipefusion=2 makes 2"),
        ({"pipefusion": 2, "stage_layers": ("a", 2)}, "must be whole numbers of at least 1"),
    ],
)
def test_plans_that_cannot_run(plan, said):
    with pytest.raises(XditCompileError, match=said):
        Plan(**plan).check()


STAGED = {"flux": (1, 90), "sd3": (2, 90), "pixart": (2, 77), "dit": (2, 49), "wan_t2v": (1, 175)}
"""Batch and tokens of the hidden state that lives between blocks; of the prompt's only where it lives there, too."""


@pytest.mark.parametrize("stages", [2, 3])
@pytest.mark.parametrize("name", STAGED)
def test_what_travels_and_what_a_stage_holds(name, stages):
    model = captured(name)
    layers = sum(call.meta["repeated"] for call in model.inference.program.calls())
    plan = Plan(pipefusion=min(stages, layers), patches=4)
    analysis = separated(model.analysis(plan), plan)
    batch, tokens = STAGED[name]
    found = [place_stage(analysis, plan, Mesh.simulated(plan, rank), {}) for rank in range(plan.pipefusion)]
    for pipeline in found[:-1]:
        sent = [tensor for stage in pipeline.patches for tensor in stage.sent]
        width = max(tensor.shape[-1] for tensor in sent)
        assert sum(tensor.numel() for tensor in sent) == batch * tokens * width
        assert sum(tensor.numel() for tensor in pipeline.full.sent) == batch * tokens * width
    for one, other in itertools.pairwise(found):
        assert [each.shape for each in one.full.sent] == [each.shape for each in other.full.received]
    whole = {given.target for given in analysis.program.inputs if given.kind == "parameter"}
    held = [
        {given.target for stage in (pipeline.full, *pipeline.patches) for given in stage.program.inputs}
        | {given.target for given in pipeline.common.inputs}
        for pipeline in found
    ]
    assert whole <= set().union(*held)
    outside = {
        node.name for call in analysis.program.calls() if not call.meta["repeated"] for node in call.all_input_nodes
    }
    named = {given.target for given in analysis.program.inputs if given.name in outside}
    for one, other in itertools.combinations(held, 2):
        assert one & other & whole <= named, "only what comes before and after the blocks is on several stages"


def test_calls_that_nothing_tells_apart_are_exact():
    """Two branches that differ in a label for each image alone would share what they keep."""
    case = MODELS["dit"]
    module, plain = case.build(), case.build()
    args, kwargs = case.inputs()
    other = {**kwargs, "class_labels": kwargs["class_labels"].flip(0)}
    assert not torch.equal(other["class_labels"], kwargs["class_labels"])
    xdit_compile.parallelize(module, Plan(patches=3, backend="eager"))

    def twice(denoiser: Any) -> torch.Tensor:
        (latents,) = args
        for _ in range(3):
            one, two = (denoiser(latents, **each)[0] for each in (kwargs, other))
            latents = latents - 0.1 * (two + one)[:, : latents.shape[1]]
        return latents + 0

    with torch.no_grad():
        expected = twice(plain)
    with xdit_compile.generation(module), pytest.warns(UserWarning, match="called twice in one step"):
        found = twice(module)
    assert difference(found, expected) < 2e-5


def test_explain_shows_the_stages():
    case = MODELS["flux"]
    args, kwargs = case.inputs()
    found = xdit_compile.explain(case.build(), Plan(pipefusion=2, patches=3), args, kwargs)
    assert found.patches == (26, 26, 25)
    assert [entry.blocks for entry in found.stages] == [2, 3]
    assert sum(entry.parameters for entry in found.stages) - found.shared == found.parameters
    assert found.stages[0].sent == 90 * 90 * 4 and found.stages[1].sent == 0
    assert "2 stages, 3 patches of 26, 26, 25 rows" in str(found)


@pytest.mark.slow
def test_explain_shows_what_one_rank_of_a_stage_has():
    case = MODELS["flux"]
    args, kwargs = case.inputs()
    alone = xdit_compile.explain(case.build(), Plan(pipefusion=2, patches=3), args, kwargs)
    found = xdit_compile.explain(case.build(), Plan(pipefusion=2, patches=3, ulysses=2, tensor=2), args, kwargs)
    assert found.patches == alone.patches and found.parameters == alone.parameters
    for one, other in zip(found.stages, alone.stages, strict=True):
        assert one.blocks == other.blocks and one.parameters < 0.7 * other.parameters
        assert one.states <= other.states / 2 and one.sent <= 0.52 * other.sent


def steps_of(module: Any, args: tuple, kwargs: dict[str, Any], graphs: list[int]) -> torch.Tensor:
    """Latents after some steps; ``graphs`` gets how many had been compiled after each."""
    latents = kwargs["hidden_states"]
    for _ in range(4):
        latents = latents - 0.1 * module(*args, **{**kwargs, "hidden_states": latents})[0]
        graphs.append(counters["aot_autograd"]["total"])
    return whole_of(latents)


def loop(index: int, name: str, plan: Plan) -> tuple[torch.Tensor, list[int]]:
    case = MODELS[name]
    module = xdit_compile.parallelize(case.build(), plan)
    graphs: list[int] = []
    with xdit_compile.generation(module):
        return whole_of(steps_of(module, *case.inputs(), graphs)), graphs


@pytest.mark.slow
def test_compiled_stages_do_not_compile_again():
    """State goes in and out of full graphs, and no step after the first patches makes another."""
    expected, _ = loop(0, "flux", Plan(patches=2, backend="eager"))
    plan = Plan(pipefusion=2, patches=2, backend="inductor")
    for latents, graphs in procs.run(loop, 2, "flux", plan, timeout=900):
        assert difference(latents, expected) < 2e-5
        assert len(set(graphs)) == 1 and graphs[0] > 0


def test_in_float64_it_is_the_published_staleness_to_the_last_digits():
    case = MODELS["sd3"]
    args, kwargs = pytree.tree_map_only(
        torch.Tensor, lambda x: x.double() if x.is_floating_point() else x, case.inputs()
    )
    module = xdit_compile.parallelize(case.build().double(), Plan(patches=3, backend="eager"))
    with xdit_compile.generation(module):
        found = steps_of(module, args, kwargs, [])
    (flow,) = runner_of(module).calls
    cuts = flow.pipeline.results[0]
    held = [torch.tensor(positions[::2]) // 2 for positions in cuts.positions]
    tokens = grid((7, 11), 1, after=13)
    masks = along(cuts.positions, cuts.size, cuts.back)
    plain = Reference(case.build().double(), lambda count: tokens(held, count), masks, 1)
    with torch.no_grad():
        expected = steps_of(plain, args, kwargs, [])
    assert found.dtype == torch.float64 and difference(found, expected) < 1e-8


REFUSED = {"lumina2_ragged", "zimage_ragged"}
"""Images of several sizes in one call."""


ALIKE = {"cogvideox_learned", "cogvideox_1_5", "flux2", "flux_unguided", "lumina2_ragged", "wan_i2v"}
"""Models of which a close relative is in the quick run."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in ALIKE else ()) for name in MODELS]
)
def test_every_model_is_cut_or_refused(name):
    """The first call is verified: all tokens at once, and patch by patch on what that left, both equal the module."""
    case = MODELS[name]
    module = xdit_compile.parallelize(case.build(), Plan(patches=2, backend="eager"))
    args, kwargs = case.inputs()
    if name in REFUSED:
        with pytest.raises(XditCompileError, match="cannot cut this denoiser into 2 patches"):
            module(*args, **kwargs)
        return
    module(*args, **kwargs)
    assert runner_of(module).collected > 0


def a_stage_without_parameters(rank: int) -> tuple[list[float], int]:
    """Blocks skipped by guidance, and another size: kinds of call that one rank could verify and the other not."""

    def build() -> Any:
        pipe = PIPELINES["sd3"].build()
        config = {**pipe.transformer.config, "num_layers": 2}
        pipe.transformer = diffusers.SD3Transformer2DModel.from_config(config)
        randomise(pipe.transformer, 3)
        pipe.transformer.eval().requires_grad_(False)
        return pipe

    skip = {"skip_guidance_layers": [0], "skip_layer_guidance_start": 0.0, "skip_layer_guidance_stop": 0.9}
    calls: list[dict[str, Any]] = [{}, {"height": 80}, skip, {}]
    unsplit, pipe = build(), build()
    xdit_compile.parallelize(pipe, Plan(pipefusion=2, warmup_steps=2, backend="eager", timeout_s=60))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        pairs = [[PIPELINES["sd3"].call(each, steps=2, **call) for each in (pipe, unsplit)] for call in calls]
    return [difference(*pair) for pair in pairs], sum("holds no parameters" in str(each.message) for each in seen)


def test_what_leads_to_a_collective_is_agreed_on():
    found = procs.run(a_stage_without_parameters, 2)
    assert all(max(differences) <= 2e-5 for differences, _ in found)
    assert [warned > 0 for _, warned in found] == [True, False]


def stale_on(rank: int, name: str, plan: Plan) -> list[torch.Tensor]:
    case = cases.CASES[name]
    pipe = case.build()
    xdit_compile.parallelize(pipe, plan)
    found = []
    for request in (0, 1, 0):
        more = {"num_inference_steps": 4, "output_type": "latent", "generator": torch.Generator().manual_seed(request)}
        torch.manual_seed(request)
        images = pipe(**{**case.arguments(Draw(request), request), **more}).images
        found.append(torch.cat([image.flatten() for image in images]))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd3_controlnet", "zimage"])
def test_patches_of_tokens_that_the_input_has_not(name):
    """A control net's results are tokens of a picture; copies of the last token fill up a block with it."""
    plan = Plan(patches=2, warmup_steps=1, backend="eager")
    ((first, *others),) = procs.run(stale_on, 1, name, plan)
    for found in procs.run(stale_on, 2, name, dataclasses.replace(plan, pipefusion=2)):
        assert all(map(torch.equal, found, [first, *others])) and torch.equal(found[0], found[2])
