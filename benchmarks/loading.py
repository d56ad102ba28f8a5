"""Resident memory and seconds while every rank loads its part of a checkpoint of a gigabyte or more.

A pipeline of real classes with a large denoiser of random weights is written as sharded safetensors files. Each rank,
a process of its own, loads it with ``xdit_compile.from_pretrained`` and makes one picture; beside it one process loads
all of it as diffusers does. The pictures are compared before anything is reported.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import multiprocessing
import pathlib
import shutil
import tempfile
import time
from multiprocessing.connection import Connection
from typing import Any

import click
import torch
import torch.distributed as dist
from resident import count_anew, greatest_resident, resident
from rich.console import Console
from rich.table import Table

import xdit_compile
from xdit_compile import Plan

HEAD = 64
LIMIT_S = 900.0
TOLERANCE = 2e-5
BOUND = 1.25
BYTES = 4
GIGABYTE = 1e9


@dataclasses.dataclass(frozen=True)
class Loaded:
    """One rank: bytes before, at the peak of loading and first call and at rest, its share, and seconds of each."""

    who: str
    before: int
    peak: int
    after: int
    share: int
    load_s: float
    call_s: float

    @property
    def ratio(self) -> float:
        """What loading added at its peak, over this rank's share of the denoiser."""
        return (self.peak - self.before) / self.share


def make_pipeline(template: pathlib.Path, folder: pathlib.Path, gigabytes: float, shard: str) -> int:
    """A copy of a small pipeline with a large denoiser; its parameters' bytes."""
    from diffusers import SD3Transformer2DModel

    shutil.copytree(template, folder, ignore=shutil.ignore_patterns("transformer"))
    config = json.loads((template / "transformer" / "config.json").read_text())
    heads, layers = 24, 1
    width = heads * HEAD
    while 36 * width**2 * layers * BYTES < gigabytes * GIGABYTE:
        layers += 1
    config.update(num_attention_heads=heads, attention_head_dim=HEAD, num_layers=layers, caption_projection_dim=width)
    torch.manual_seed(0)
    model = SD3Transformer2DModel(**{key: value for key, value in config.items() if not key.startswith("_")}).eval()
    model.save_pretrained(folder / "transformer", max_shard_size=shard)
    return sum(value.numel() * value.element_size() for value in model.parameters())


def _serve(end: Connection, rank: int, count: int, rendezvous: str, folder: str) -> None:
    torch.set_num_threads(1)
    if count > 1:
        limit = datetime.timedelta(seconds=LIMIT_S)
        dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=count, timeout=limit)
    import diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3  # noqa: F401  (not part of loading)

    count_anew()
    before, start = resident(), time.perf_counter()
    pipe = _load(folder, count)
    loaded = time.perf_counter()
    image = pipe(
        "a lighthouse", num_inference_steps=1, height=64, width=64, generator=torch.Generator().manual_seed(0),
        output_type="pt",
    ).images  # fmt: skip
    done, peak = time.perf_counter(), greatest_resident()
    weights = getattr(pipe.transformer.forward, "weights", None)
    elements = weights.elements if weights is not None else sum(p.numel() for p in pipe.transformer.parameters())
    who = f"rank {rank} of tensor={count}" if count > 1 else "one process, diffusers"
    found = Loaded(who, before, peak, resident(), elements * BYTES, loaded - start, done - loaded)
    end.send((found, image.numpy()))
    if count > 1:
        dist.barrier()
        dist.destroy_process_group()


def _load(folder: str, count: int) -> Any:
    if count == 1:
        from diffusers import DiffusionPipeline

        pipe = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    else:
        pipe = xdit_compile.from_pretrained(folder, Plan(tensor=count, backend="eager"), dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def measure(count: int, folder: pathlib.Path) -> list[tuple[Loaded, Any]]:
    """Load in ``count`` processes at once."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="benchmark-") as scratch:
        pairs = [context.Pipe() for _ in range(count)]
        members = [
            context.Process(target=_serve, args=(theirs, rank, count, f"{scratch}/rendezvous", str(folder)))
            for rank, (_, theirs) in enumerate(pairs)
        ]
        for member in members:
            member.start()
        found = []
        for rank, (mine, _) in enumerate(pairs):
            if not mine.poll(LIMIT_S):
                raise TimeoutError(f"rank {rank} did not answer within {LIMIT_S:g} s")
            found.append(mine.recv())
        for member in members:
            member.join(LIMIT_S)
    return found


@click.command()
@click.option("--gigabytes", default=2.0, show_default=True, help="Size of the denoiser in float32.")
@click.option("--degree", "degrees", type=click.IntRange(2), multiple=True, default=(2, 4), show_default=True)
@click.option("--shard", default="500MB", show_default=True, help="Largest file of the checkpoint.")
@click.option(
    "--template",
    type=click.Path(exists=True, path_type=pathlib.Path),
    default=pathlib.Path(__file__).parent.parent / "tests" / "data" / "tiny_pipeline",
    help="The pipeline whose other components are used.",
)
@click.option("--json", "json_file", type=click.Path(path_type=pathlib.Path), help="Write everything measured here.")
def main(
    gigabytes: float, degrees: tuple[int, ...], shard: str, template: pathlib.Path, json_file: pathlib.Path | None
) -> None:
    """Measure loading."""
    console = Console()
    with tempfile.TemporaryDirectory(prefix="benchmark-") as scratch:
        folder = pathlib.Path(scratch) / "pipeline"
        context = multiprocessing.get_context("spawn")
        with context.Pool(1) as pool:
            size = pool.apply(make_pipeline, (template, folder, gigabytes, shard))
        ((alone, expected),) = measure(1, folder)
        found = [alone]
        for degree in degrees:
            for one, image in measure(degree, folder):
                worst = float(abs(image - expected).max() / abs(expected).max())
                if worst > TOLERANCE:
                    raise click.ClickException(f"{one.who} made another picture: {worst:.1e}")
                found.append(one)
    title = f"loading a denoiser of {size / GIGABYTE:.2f} GB, torch {torch.__version__}; GB resident"
    table = Table("", title=title, title_justify="left")
    for column in ("share", "before", "peak", "at rest", "added / share", "bound", "load s", "first call s"):
        table.add_column(column, justify="right")
    for one in found:
        split = one is not alone
        table.add_row(
            one.who,
            *(f"{value / GIGABYTE:.2f}" for value in (one.share, one.before, one.peak, one.after)),
            f"{one.ratio:.3f}",
            f"{BOUND} {'met' if one.ratio <= BOUND else 'NOT MET'}" if split else "",
            f"{one.load_s:.1f}",
            f"{one.call_s:.1f}",
        )
    console.print(table)
    if json_file is not None:
        content = {"torch": torch.__version__, "bytes": size, "loaded": [dataclasses.asdict(one) for one in found]}
        json_file.write_text(json.dumps(content, indent=1))


if __name__ == "__main__":
    main()
