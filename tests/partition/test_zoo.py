"""The zoo itself: its models run, repeat, and react to every token, so that a parallel error cannot hide in them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from zoo.more import MORE
from zoo.pipelines import PIPELINES, PipelineCase
from zoo.real import REAL, RealCase
from zoo.transformers import MODELS, Case, Inputs

CASES = MODELS | MORE
VISIBLE = 1e-4  # five times the tolerance of the exact methods, relative to the greatest value
MASKS = (
    "encoder_attention_mask",
    "encoder_hidden_states_mask",
    "text_embedding_mask",
    "encoder_mask",
    "attention_mask",
)


def run(model: torch.nn.Module, inputs: Inputs) -> list[Tensor]:
    args, kwargs = inputs
    with torch.no_grad():
        output = model(*args, **kwargs)
    output = output.to_tuple() if hasattr(output, "to_tuple") else output
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]


def change(before: list[Tensor], after: list[Tensor]) -> float:
    """Greatest difference relative to the greatest value."""
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(after, before, strict=True))


def tensors(inputs: Inputs) -> Iterator[tuple[str, Tensor]]:
    for path, leaf in pytree.tree_leaves_with_path(inputs):
        if isinstance(leaf, Tensor):
            yield pytree.keystr(path), leaf


def replaced(inputs: Inputs, path: str, value: Tensor) -> Inputs:
    return pytree.tree_map_with_path(lambda p, leaf: value if pytree.keystr(p) == path else leaf, inputs)


def disturbed(value: Tensor) -> Tensor:
    """Other values of the same kind: a flag flipped, a step or a label moved, noise on floats."""
    if value.dtype is torch.bool or (value.dtype is torch.int64 and value.ndim == 2 and value.max() <= 1):
        flipped = value.clone()
        flipped[0, 1] = 1 - int(flipped[0, 1])
        return flipped
    if value.is_complex():
        return value * torch.polar(
            torch.ones(value.shape), torch.arange(value.shape[0])[:, None, None] * 0.1 + value.angle()
        )
    if value.is_floating_point():
        return value + torch.randn(value.shape, generator=torch.Generator().manual_seed(1)) * value.abs().mean().clamp(
            0.1
        )
    return value // 2 + 1


def kept_tokens(case: Case, kwargs: dict[str, Any], path: str, value: Tensor) -> tuple[int, list[int]] | None:
    """The token dimension of a padded stream and its valid lengths, from the mask of the same name or sizes."""
    for stream, lengths in case.lengths:
        if stream in path:
            return 1, list(lengths)
    name = path.split("'")[-2] if "'" in path else ""
    prefix, suffix = ("audio_" if name.startswith("audio_") else ""), name.partition("hidden_states")[2]
    for mask in (kwargs.get(f"{prefix}{mask}{suffix}") for mask in MASKS):
        if (
            isinstance(mask, Tensor)
            and mask.ndim == 2
            and mask.shape[0] == value.shape[0]
            and mask.shape[1] in value.shape[1:]
        ):
            return value.shape.index(mask.shape[1], 1), [int(row.sum()) for row in mask]
    return None


def single_elements(case: Case, draws: int = 4) -> Iterator[tuple[str, Tensor]]:
    """Each stream of tokens with one of its numbers changed: the first, the last and some between; padding left out."""
    skipped = {"ids", "rotary", "size", "mask'", *dict(case.idle)}
    inputs = case.inputs()
    for path, value in tensors(inputs):
        if not value.is_floating_point() or value.ndim < 2 or any(word in path for word in skipped):
            continue
        if set(value.unique().tolist()) <= {0.0, 1.0}:
            continue
        generator = torch.Generator().manual_seed(7)
        kept = kept_tokens(case, inputs[1], path, value)
        for k in range(draws):
            at = [int(torch.randint(size, (), generator=generator)) for size in value.shape]
            at = [[0] * value.ndim, [size - 1 for size in value.shape], at][min(k, 2)]
            if kept is not None:
                at[kept[0]] %= kept[1][at[0]]
            touched = value.clone()
            touched[tuple(at)] += 3
            yield path, touched


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Small convolutions spend seconds on threads that wait for each other where the cores are shared."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=list(CASES.values()), ids=list(CASES), scope="module")
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


@pytest.fixture(scope="module")
def model(case: Case) -> torch.nn.Module:
    return case.build()


def test_runs_and_repeats(case: Case, model: torch.nn.Module) -> None:
    first = run(model, case.inputs())
    assert first and all(output.dtype is torch.float32 and output.isfinite().all() for output in first)
    assert all(0.05 < float(output.std()) < 20 for output in first)
    again = run(case.build(), case.inputs())
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert change(first, run(model, case.inputs(seed=1))) > 0.1


def test_every_input_matters(case: Case, model: torch.nn.Module) -> None:
    before = run(model, case.inputs())
    idle = dict(case.idle)
    seen = {}
    for path, value in tensors(case.inputs()):
        if not any(name in path for name in idle):
            seen[path] = change(before, run(model, replaced(case.inputs(), path, disturbed(value))))
    assert not {path: moved for path, moved in seen.items() if moved < VISIBLE}


def test_every_token_reaches_every_output(case: Case, model: torch.nn.Module) -> None:
    before = run(model, case.inputs())
    scale = max(float(output.abs().max()) for output in before)
    for path, touched in single_elements(case):
        after = run(model, replaced(case.inputs(), path, touched))
        assert change(before, after) > VISIBLE, path
        moved = sum(int(((a - b).abs() > 1e-6 * scale).sum()) for a, b in zip(after, before, strict=True))
        share = moved / sum(output.numel() for output in before)
        assert share > case.reach / case.batch, f"{path}: only {share:.1%} of the output follows one number"


PARAMETERS = {  # of the published checkpoints, in units of 1e9; diffusers' DiT embeds the label anew in every block
    "flux": 11.90, "flux2": 32.2, "sd3": 2.03, "sd3_5_medium": 2.24, "sd3_5_large": 8.06, "pixart": 0.611,
    "hunyuandit": 1.50, "cogvideox_2b": 1.69, "cogvideox_5b": 5.57, "cogvideox_1_5": 5.57, "latte": 1.06,
    "mochi": 10.03,
    "dit": 0.750, "wan_t2v": 14.29, "wan_i2v": 16.4, "qwenimage": 20.43, "sana": 1.60, "lumina2": 2.61, "zimage": 6.15,
}  # fmt: skip


@pytest.mark.parametrize("real", REAL.values(), ids=REAL.keys())
def test_real_sizes(real: RealCase) -> None:
    """The whole model has the published number of parameters, and one block of each kind runs on its real input."""
    whole = sum(parameter.numel() for parameter in real.build().parameters())
    assert whole / 1e9 == pytest.approx(PARAMETERS[real.name], rel=0.01)
    part = real.build(blocks=1)
    assert all(parameter.is_meta for parameter in part.parameters())
    if real.eager_on_meta:
        shapes = [tuple(output.shape) for output in run(part, real.inputs())]
        assert shapes and all(0 not in shape for shape in shapes)


@pytest.mark.parametrize("pipeline", PIPELINES.values(), ids=PIPELINES.keys())
def test_pipeline_repeats(pipeline: PipelineCase) -> None:
    """Same seed, same result; another seed, another one; and the stated number of denoiser calls per step."""
    pipe = pipeline.build()
    calls: list[int] = []
    denoiser = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
    hook = denoiser.register_forward_pre_hook(lambda *_: calls.append(1))
    first = pipeline.call(pipe)
    hook.remove()
    assert len(calls) == 2 * pipeline.calls
    assert first.isfinite().all() and float(first.std()) > 0.05
    assert torch.equal(pipeline.call(pipe), first)
    assert not torch.allclose(pipeline.call(pipe, seed=1), first, rtol=0, atol=0.1)


@pytest.mark.parametrize("name", ["flux", "sana", "wan"])
def test_pipeline_decodes(name: str) -> None:
    pipeline = PIPELINES[name]
    pixels = pipeline.call(pipeline.build(), output="np")
    assert pixels.shape[-1] == 3 and 0 <= float(pixels.min()) < float(pixels.max()) <= 1
