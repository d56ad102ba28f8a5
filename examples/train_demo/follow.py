"""Does the pipeline show what it is asked for? Pictures of held-out captions, read back by the checker.

    python examples/train_demo/follow.py --output docs/demo_follow.json

Captions of one thing say colour, shape, place and background; captions of two say how one stands to the other.
Training saw none of their combinations (`xdit_compile/evaluation/scenes.py`).
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import click
import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from rich.console import Console
from rich.table import Table
from tqdm import tqdm
from train import DEFAULT_PIPELINE

from xdit_compile.evaluation.checker import Verdict, judge
from xdit_compile.evaluation.intervals import share
from xdit_compile.evaluation.scenes import Request, held_out_requests

JUDGED = ("right", "count", "colour", "shape", "place", "size", "background")
SHEET = (8, 16)


@click.command(help=(__doc__ or "").splitlines()[0])
@click.option("--pipeline", type=click.Path(exists=True, file_okay=False, path_type=Path), default=DEFAULT_PIPELINE)
@click.option("--ones", default=500, show_default=True, help="Captions of one thing.")
@click.option("--twos", default=200, show_default=True, help="Captions of two things.")
@click.option("--side", type=int, help="Pixels.  [default: the pipeline's]")
@click.option("--steps", default=20, show_default=True)
@click.option("--guidance", default=4.5, show_default=True)
@click.option("--seed", default=1000, show_default=True, help="Of the captions and of the first picture.")
@click.option("--batch", default=10, show_default=True)
@click.option("--threads", type=int, help="[default: all]")
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), help="JSON with every figure.")
@click.option("--sheet", type=click.Path(dir_okay=False, path_type=Path), help="A picture of the first pictures.")
def main(
    pipeline: Path, ones: int, twos: int, side: int | None, steps: int, guidance: float, seed: int, batch: int,
    threads: int | None, output: Path | None, sheet: Path | None,
) -> None:  # fmt: skip
    """Make the pictures, judge them, print the shares."""
    if threads:
        torch.set_num_threads(threads)
    pipe = DiffusionPipeline.from_pretrained(pipeline)
    pipe.set_progress_bar_config(disable=True)
    size = {"height": side, "width": side, "use_resolution_binning": False} if side else {}
    settings = {"num_inference_steps": steps, "guidance_scale": guidance, **size}
    found, pictures = {}, []
    start = time.monotonic()
    for name, count, things in (("one thing", ones, 1), ("two things", twos, 2)):
        asked = held_out_requests(seed, count, things)
        made = _pictures(pipe, [caption for _, caption in asked], settings, seed, batch, name)
        found[name] = _shares(asked, made)
        pictures += made
    _print(found)
    seconds = time.monotonic() - start
    if sheet:
        _write_sheet(pictures, sheet)
    if output:
        report = {"settings": {**settings, "seed": seed, "ones": ones, "twos": twos}, "seconds": seconds, **found}
        output.write_text(json.dumps(report, indent=1) + "\n")


def _pictures(
    pipe: DiffusionPipeline, captions: list[str], settings: dict, seed: int, batch: int, name: str
) -> list[np.ndarray]:
    made: list[np.ndarray] = []
    for start in tqdm(range(0, len(captions), batch), desc=name):
        part = captions[start : start + batch]
        generators = [torch.Generator().manual_seed(seed + start + at) for at in range(len(part))]
        images = pipe(part, generator=generators, output_type="np", **settings).images
        made += list((images * 255).round().astype(np.uint8))
    return made


def _shares(asked: list[tuple[Request, str]], made: list[np.ndarray]) -> dict:
    verdicts: list[Verdict] = [judge(request, image) for (request, _), image in zip(asked, made, strict=True)]
    shares = {}
    for what in JUDGED if verdicts else ():
        one = share([bool(getattr(verdict, what)) for verdict in verdicts])
        shares[what] = {"share": one.value, "low": one.low, "high": one.high}
    wrong = [caption for (_, caption), verdict in zip(asked, verdicts, strict=True) if not verdict.right]
    return {"captions": len(asked), "shares": shares, "not right": wrong}


def _print(found: dict) -> None:
    table = Table("captions of", "number", *JUDGED, title="shares with their 95 % interval")
    for name, group in found.items():
        cells = [f"{s['share']:.1%} ({s['low']:.1%}-{s['high']:.1%})" for s in group["shares"].values()]
        table.add_row(name, str(group["captions"]), *cells)
    Console(width=160).print(table)


def _write_sheet(pictures: list[np.ndarray], path: Path) -> None:
    rows, columns = SHEET
    shown = [pictures[at] for at in np.linspace(0, len(pictures) - 1, min(rows * columns, len(pictures))).astype(int)]
    small = [np.asarray(Image.fromarray(picture).resize((96, 96))) for picture in shown]
    small += [np.zeros_like(small[0])] * (-len(small) % columns)
    lines = [np.concatenate(small[at : at + columns], 1) for at in range(0, len(small), columns)]
    Image.fromarray(np.concatenate(lines)).save(path)


if __name__ == "__main__":
    main()
