"""One GPU: milliseconds of a denoising step of FLUX at its published size, unsplit, by what runs it.

All contenders have the same weights and inputs. What each computes is compared with the module itself before anything
is timed; then all take turns. ``host ms`` is when a call returns with an empty queue, before the card is done.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import pathlib
import random
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import click
import torch
from denoiser import places
from diffusers import FluxTransformer2DModel
from rich.console import Console
from rich.table import Table
from torch import nn

import xdit_compile
from xdit_compile import Plan

ROOT_MEAN_SQUARE = 5e-2
"""How far bfloat16 results may lie apart, relative to their size."""


@dataclasses.dataclass
class Entry:
    """A contender: its calls, and what was found."""

    name: str
    call: Callable[..., torch.Tensor]
    first_call_s: float = 0.0
    difference: float = 0.0
    peak_gb: float = 0.0
    step_ms: list[float] = dataclasses.field(default_factory=list)
    host_ms: list[float] = dataclasses.field(default_factory=list)


def build(double: int, single: int) -> nn.Module:
    """The denoiser in bfloat16 on the card, random weights."""
    torch.manual_seed(0)
    with torch.device("cuda"):
        dtype = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        try:
            model = FluxTransformer2DModel(num_layers=double, num_single_layers=single, guidance_embeds=True)
        finally:
            torch.set_default_dtype(dtype)
    return model.eval().requires_grad_(False)


def like(model: nn.Module) -> nn.Module:
    """Another module tree over the same weights."""
    with torch.device("meta"):
        other = FluxTransformer2DModel.from_config(model.config)
    other.load_state_dict(model.state_dict(), assign=True)
    return other.eval().requires_grad_(False)


def inputs(tokens: int, text: int) -> dict[str, Any]:
    """Keyword arguments of one call."""
    made = torch.Generator("cuda").manual_seed(1)
    half = {"device": "cuda", "dtype": torch.bfloat16}
    return {
        "hidden_states": torch.randn(1, tokens, 64, generator=made, **half),
        "encoder_hidden_states": torch.randn(1, text, 4096, generator=made, **half),
        "pooled_projections": torch.randn(1, 768, generator=made, **half),
        "timestep": torch.full((1,), 0.7, **half),
        "guidance": torch.full((1,), 3.5, **half),
        "img_ids": places(tokens).to(**half),
        "txt_ids": torch.zeros(text, 3, **half),
        "return_dict": False,
    }


def contenders(
    model: nn.Module, backends: tuple[str, ...], modes: tuple[str, ...], without: tuple[str, ...]
) -> list[Entry]:
    """The module itself first; ours with inductor once more for each of ``without``, with that pass left out."""
    found = [Entry("the module as it is", model)]
    compiled: Any = like(model)
    compiled.compile_repeated_blocks(fullgraph=True)
    found.append(Entry("diffusers compile_repeated_blocks", compiled))
    for backend in backends:
        found.append(Entry(f"xdit_compile, {backend}", xdit_compile.parallelize(like(model), Plan(backend=backend))))
    for mode in modes:
        plan = Plan(backend="inductor", compile_mode=mode)
        found.append(Entry(f"xdit_compile, {mode}", xdit_compile.parallelize(like(model), plan)))
    for name in without:
        plan = Plan(backend="inductor", without=(name,))
        found.append(Entry(f"xdit_compile, inductor without {name}", xdit_compile.parallelize(like(model), plan)))
    return found


def step(entry: Entry, given: dict[str, Any]) -> torch.Tensor:
    """One call with new latents, as a scheduler makes them; notes its times."""
    given = {**given, "hidden_states": given["hidden_states"].clone(), "timestep": given["timestep"].clone()}
    torch.cuda.synchronize()
    begin = time.perf_counter()
    with torch.no_grad():
        result = entry.call(**given)[0]
    entry.host_ms.append(1e3 * (time.perf_counter() - begin))
    torch.cuda.synchronize()
    entry.step_ms.append(1e3 * (time.perf_counter() - begin))
    return result


def prepare(entries: list[Entry], given: dict[str, Any], console: Console) -> None:
    """First calls, results, peaks.

    Raises:
        SystemExit: a contender computes something else.
    """
    expected = step(entries[0], given).float()
    for entry in entries:
        begin = time.perf_counter()
        step(entry, given)
        entry.first_call_s = time.perf_counter() - begin
        for _ in range(2):
            step(entry, given)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = step(entry, given).float()
        entry.peak_gb = (torch.cuda.max_memory_allocated() - before) / 1e9
        entry.difference = ((result - expected).square().mean().sqrt() / expected.square().mean().sqrt()).item()
        console.print(f"prepared in {entry.first_call_s:.1f} s: {entry.name}, {entry.difference:.1e}", highlight=False)
        if not entry.difference <= ROOT_MEAN_SQUARE:
            raise SystemExit(f"{entry.name} is off the module by {entry.difference:.1e}; nothing was timed")
        entry.step_ms, entry.host_ms = [], []


def profiled(entry: Entry, given: dict[str, Any], rows: int) -> str:
    """Where the time of a step goes."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as found:
        step(entry, given)
    return found.key_averages().table(sort_by="self_cuda_time_total", row_limit=rows, max_name_column_width=80)


@click.command()
@click.option("--double", default=19, show_default=True, help="Double blocks.")
@click.option("--single", default=38, show_default=True, help="Single blocks.")
@click.option("--tokens", default=4096, show_default=True, help="Image tokens; a square number.")
@click.option("--text", default=512, show_default=True, help="Text tokens.")
@click.option("--rounds", default=15, show_default=True, help="Steps of each contender; all take one in each round.")
@click.option("--backend", "backends", multiple=True, default=["eager", "inductor"], show_default=True)
@click.option("--mode", "modes", multiple=True, help="Inductor in this Plan.compile_mode, too; may be repeated.")
@click.option("--without", multiple=True, help="Inductor once more without this optional pass; may be repeated.")
@click.option("--profile", default=0, help="Also print this many rows of a profile of each contender.")
@click.option("--json", "json_file", type=click.Path(path_type=pathlib.Path), help="Write everything measured here.")
def main(
    double: int,
    single: int,
    tokens: int,
    text: int,
    rounds: int,
    backends: tuple[str, ...],
    modes: tuple[str, ...],
    without: tuple[str, ...],
    profile: int,
    json_file: pathlib.Path | None,
) -> None:
    """Compare what one card needs for a step, whoever runs the denoiser."""
    if not torch.cuda.is_available():
        raise click.UsageError("needs a GPU that torch.cuda sees")
    console = Console(width=140)
    given = inputs(tokens, text)
    entries = contenders(build(double, single), backends, modes, without)
    prepare(entries, given, console)
    order = random.Random(0)
    turns = list(entries)
    for _ in range(rounds):
        order.shuffle(turns)
        for entry in turns:
            step(entry, given)
    about = {
        "date": datetime.date.today().isoformat(),
        "card": torch.cuda.get_device_name(),
        "versions": {name: version(name) for name in ("torch", "triton", "diffusers")},
        "size": {"double": double, "single": single, "tokens": tokens, "text": text, "dtype": "bfloat16"},
    }
    title = f"FLUX, {double} + {single} blocks, {tokens} + {text} tokens, bfloat16, {about['card']}, {rounds} rounds"
    table = Table("contender", title=title)
    for column in ("step ms", "ratio", "host ms", "peak GB above weights", "difference", "first call s"):
        table.add_column(column, justify="right")
    for entry in entries:
        pairs = zip(entry.step_ms, entries[0].step_ms, strict=True)
        cells = [
            f"{statistics.median(entry.step_ms):.1f}", f"{statistics.median(a / b for a, b in pairs):.3f}",
            f"{statistics.median(entry.host_ms):.1f}", f"{entry.peak_gb:.2f}", f"{entry.difference:.1e}",
            f"{entry.first_call_s:.1f}",
        ]  # fmt: skip
        table.add_row(entry.name, *cells)
    console.print(table)
    for entry in entries if profile else ():
        print(entry.name, profiled(entry, given, profile), sep="\n")
    if json_file is not None:
        found = [{key: value for key, value in vars(entry).items() if key != "call"} for entry in entries]
        json_file.write_text(json.dumps({**about, "contenders": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
