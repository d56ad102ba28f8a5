"""How far small denoisers in bfloat16 are from the same in float32: as modules, and with and without fusion passes.

Weights and inputs are rounded to bfloat16 before, so that nothing but the rounding in between is measured. The passes
are those for GPUs; what they put in runs on the CPU here, and rounds where it does on a card: products sum in float32
and round once, also with another sum or an activation behind them. All run operator by operator, which rounds where
compiled graphs do, too (`emulate_precision_casts`).
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import pathlib
import platform
import statistics
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import click
import diffusers
import torch
from denoiser import Size
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn
from torch.utils import _pytree as pytree

from xdit_compile import Plan
from xdit_compile.capture.capture import capture
from xdit_compile.compiler import PASSES, Compilation, run_passes
from xdit_compile.distributed.mesh import Mesh
from xdit_compile.ir.program import Program
from xdit_compile.plan.plan import OPTIONAL_PASSES
from xdit_compile.runtime.verify.simulated_mesh import run_simulated

MODULE, APART, FUSED = "the module", "no passes", "all passes"
STEP, GUIDANCE = 0.5, 4.0
"""Numbers that bfloat16 holds, also a thousand times as large, as modules want them."""
LARGEST = 0.05
"""No rounding makes a larger error."""
HEADS = {"num_attention_heads": 6, "attention_head_dim": 32}
WIDTH, TEXT, TEXT_WIDTH, POOLED = 192, 32, 96, 64
Draw = Callable[..., torch.Tensor]
Subject = tuple[nn.Module, dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Found:
    """Errors of one call by contender: root of the mean square, relative to that of the result in float32."""

    model: str
    seed: int
    errors: dict[str, float]

    def ratio(self, name: str) -> float:
        """The error of a contender over that of the program without passes."""
        return self.errors[name] / self.errors[APART]


def flux(depth: int, draw: Draw) -> Subject:
    """Blocks of two kinds, of which one joins attention with an activation."""
    size = Size(hidden=WIDTH, blocks=2 * depth, tokens=256, text=TEXT, head_dim=32)
    call = {key: draw(*value.shape) if key.endswith("states") else value for key, value in size.inputs().items()}
    return size.build(), call | {"timestep": torch.tensor([STEP]), "guidance": torch.tensor([GUIDANCE])}


def sd3(depth: int, draw: Draw) -> Subject:
    """Two streams of tokens, and no norms of heads."""
    model = diffusers.SD3Transformer2DModel(
        sample_size=32, num_layers=depth, caption_projection_dim=WIDTH, joint_attention_dim=TEXT_WIDTH,
        pooled_projection_dim=POOLED, pos_embed_max_size=16, **HEADS,
    )  # fmt: skip
    return model, {"hidden_states": draw(1, 16, 32, 32), "pooled_projections": draw(1, POOLED), **text(draw)}


def hunyuan_video(depth: int, draw: Draw) -> Subject:
    """Blocks as those of FLUX."""
    model = diffusers.HunyuanVideoTransformer3DModel(
        num_layers=depth, num_single_layers=depth, num_refiner_layers=2, text_embed_dim=TEXT_WIDTH,
        pooled_projection_dim=POOLED, rope_axes_dim=(8, 12, 12), **HEADS,
    )  # fmt: skip
    given = {"encoder_attention_mask": torch.ones(1, TEXT), "guidance": torch.tensor([GUIDANCE])}
    pooled = draw(1, POOLED)
    return model, {"hidden_states": draw(1, 16, 2, 24, 24), "pooled_projections": pooled, **given, **text(draw)}


def wan(depth: int, draw: Draw) -> Subject:
    """Attention to text apart, and norms of all heads together."""
    model = diffusers.WanTransformer3DModel(
        num_layers=depth, ffn_dim=4 * WIDTH, text_dim=TEXT_WIDTH, freq_dim=64, **HEADS
    )
    return model, {"hidden_states": draw(1, 16, 2, 24, 24), **text(draw)}


def cogvideox(depth: int, draw: Draw) -> Subject:
    """Text and picture in one stream, without a rotation."""
    model = diffusers.CogVideoXTransformer3DModel(
        num_layers=depth, text_embed_dim=TEXT_WIDTH, time_embed_dim=96, max_text_seq_length=TEXT, sample_width=24,
        sample_height=24, sample_frames=5, **HEADS,
    )  # fmt: skip
    return model, {"hidden_states": draw(1, 2, 16, 24, 24), **text(draw)}


def text(draw: Draw) -> dict[str, Any]:
    """What all of them take."""
    step, states = torch.tensor([1000 * STEP]), draw(1, TEXT, TEXT_WIDTH)
    return {"encoder_hidden_states": states, "timestep": step, "return_dict": False}


MODELS: dict[str, Callable[[int, Draw], Subject]] = {
    "FLUX": flux,
    "SD3": sd3,
    "HunyuanVideo": hunyuan_video,
    "Wan": wan,
    "CogVideoX": cogvideox,
}


@torch.no_grad()
def measure(name: str, depth: int, seeds: int) -> list[Found]:
    """All contenders with weights and inputs of several seeds.

    Raises:
        click.ClickException: an error is larger than rounding makes it.
    """
    found, programs = [], {}
    for seed in track(range(seeds), name, transient=True):
        generator = torch.Generator().manual_seed(seed)
        model, call = MODELS[name](depth, lambda *shape, source=generator: torch.randn(shape, generator=source))
        drawn_anew(model, generator)
        half = pytree.tree_map_only(torch.Tensor, lambda each: each.to(torch.bfloat16), call)
        nn.Module.to(model.eval().requires_grad_(False), torch.bfloat16)
        programs = programs or contenders(capture(model, (), half))
        results = {key: run_simulated([each], model, (), half)[0] for key, each in programs.items()}
        results = {MODULE: model(**half), **results}
        wide = pytree.tree_map_only(torch.Tensor, torch.Tensor.float, half)
        exact = nn.Module.to(model, torch.float32)(**wide)
        errors = {key: error(each, exact) for key, each in results.items()}
        wrong = {key: each for key, each in errors.items() if not each < LARGEST}
        if wrong:
            raise click.ClickException(f"{name}, seed {seed}: errors are larger than those of rounding: {wrong}")
        found.append(Found(name, seed, errors))
    return found


def drawn_anew(model: nn.Module, generator: torch.Generator) -> None:
    """Draw every parameter: matrices by what they read, norms about one, biases about zero."""
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() > 1:
            parameter.data = noise / parameter[0].numel() ** 0.5
        else:
            parameter.data = parameter.mean().round() + 0.1 * noise


def contenders(program: Program) -> dict[str, Program]:
    """What one rank runs without passes, with all, with one alone and with all but one, where these differ."""
    found = {APART: fused(program, OPTIONAL_PASSES), FUSED: fused(program, ())}
    for each in OPTIONAL_PASSES:
        alone = fused(program, tuple(name for name in OPTIONAL_PASSES if name != each))
        if code_of(alone) != code_of(found[APART]):
            found[each] = alone
        others = fused(program, (each,))
        if code_of(others) != code_of(found[FUSED]):
            found[f"all but {each}"] = others
    return found


def fused(program: Program, without: tuple[str, ...]) -> Program:
    """What a card would run of a captured call."""
    plan = Plan(without=without)
    state = Compilation(plan, program=program, mesh=Mesh.simulated(plan, 0), device=torch.device("cuda"))
    return run_passes(state, after="capture", until=PASSES[-2].name).programs["call"]


def code_of(program: Program) -> list[str]:
    """The text of all graphs."""
    return [graph.code for graph in (program.root, *program.structures().values())]


def error(result: Any, exact: Any) -> float:
    """Root of the mean squared error, relative to that of what is expected."""
    one, like = (pytree.tree_leaves(each)[0].double() for each in (result, exact))
    return ((one - like).square().mean() / like.square().mean()).sqrt().item()


@click.command()
@click.option("--model", "models", type=click.Choice(list(MODELS)), multiple=True, default=tuple(MODELS))
@click.option("--depth", type=click.IntRange(1), default=4, show_default=True, help="Blocks of each kind.")
@click.option("--seeds", type=click.IntRange(1), default=30, show_default=True)
@click.option("--json", "json_file", type=click.Path(path_type=pathlib.Path), help="Write everything measured here.")
def main(models: tuple[str, ...], depth: int, seeds: int, json_file: pathlib.Path | None) -> None:
    """Compare errors of rounding. Each contender has the weights and inputs of every seed that the others have.

    Beside each median stands the ratio to the program without passes of the same seed: its median, least and greatest,
    and how often it was above one. One seed says nothing: a rounding at one place changes all that comes after it, by a
    percent of the error in either direction.
    """
    torch.set_num_threads(1)
    found = {name: measure(name, depth, seeds) for name in models}
    versions = {name: version(name) for name in ("torch", "diffusers")}
    made = ", ".join(" ".join(each) for each in versions.items())
    title = f"error of bfloat16 against float32, {depth} blocks of each kind, {seeds} seeds, CPU; {made}"
    table = Table("model", "contender", title=title, title_justify="left")
    for column in ("median", "/ no passes", "least", "greatest", "above 1"):
        table.add_column(column, justify="right")
    for name, some in found.items():
        for key in some[0].errors:
            ratios = [each.ratio(key) for each in some]
            numbers = [f"{each:.4f}" for each in (statistics.median(ratios), min(ratios), max(ratios))]
            median = f"{statistics.median(each.errors[key] for each in some):.3e}"
            table.add_row(name, key, median, *numbers, str(sum(ratio > 1 for ratio in ratios)))
        table.add_section()
    console = Console()
    (console if console.is_terminal else Console(width=120)).print(table)
    if json_file:
        about = {
            "date": datetime.date.today().isoformat(),
            "versions": versions | {"python": platform.python_version()},
            "depth": depth,
        }
        listed = {name: [dataclasses.asdict(each) for each in some] for name, some in found.items()}
        json_file.write_text(json.dumps({**about, "found": listed}, indent=1) + "\n")


if __name__ == "__main__":
    main()
