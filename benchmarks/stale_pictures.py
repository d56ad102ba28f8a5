"""What methods with stale values cost in pictures: a table of evaluations, and their distance over warm-up steps.

Reads what ``xdit-compile evaluate`` writes; it makes no pictures itself.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import statistics
from collections.abc import Sequence
from typing import Any

import click

ONE = "one thing"
"""Captions that the embedded pipeline was trained to follow."""


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """One report: its plan, and what it found, as ``value``, ``low`` and ``high`` of a 95 % interval."""

    plan: dict[str, Any]
    pairs: int
    psnr: dict[str, float]
    ssim: dict[str, float]
    right: dict[str, dict[str, float]]
    greatest: Sequence[int]

    @classmethod
    def read(cls, folder: pathlib.Path) -> Evaluation:
        """The report in an output folder of ``evaluate``.

        Raises:
            click.UsageError: there is none, or no picture differs.
        """
        try:
            found = json.loads((folder / "report.json").read_text())
        except (OSError, ValueError) as error:
            raise click.UsageError(f"{folder} holds no report of an evaluation: {error}") from error
        distances = found["distances"]
        if distances["psnr"] is None:
            raise click.UsageError(f"{folder}: all pictures are identical; nothing was stale")
        following = found["following"][ONE]["right"]
        greatest = [pair["largest"] for pair in found["pairs"]]
        pairs, psnr, ssim = (distances[name] for name in ("pairs", "psnr", "ssim"))
        return cls(found["settings"]["plan"], pairs, psnr, ssim, following, greatest)

    @property
    def method(self) -> str:
        """The method and its ranks."""
        ranks = self.plan.get("distrifusion", 1)
        if ranks > 1:
            return f"DistriFusion, {ranks} ranks"
        patches = self.plan["patches"] or self.plan["pipefusion"]
        return f"PipeFusion, {self.plan['pipefusion']} stages, {patches} patches"

    def row(self) -> str:
        """A row of the table."""
        one, plan, apart = (self.right[name] for name in ("reference", "plan", "difference"))
        cells = [
            self.method,
            str(self.plan["warmup_steps"]),
            str(self.pairs),
            _interval(self.psnr, 1),
            _interval(self.ssim, 4),
            f"{one['value']:.1%}",
            f"{plan['value']:.1%}",
            _interval({name: 100 * value for name, value in apart.items()}, 1),
        ]
        return f"| {' | '.join(cells)} |"

    def greatest_row(self) -> str:
        """A row of the table of greatest differences."""
        ends = (min(self.greatest), statistics.median(self.greatest), max(self.greatest))
        cells = [self.method, str(self.plan["warmup_steps"]), str(self.pairs), *(f"{each:.0f}" for each in ends)]
        return f"| {' | '.join([*cells, _interval(self.psnr, 1)])} |"


HEADER = """| plan | warm-up steps | pairs | PSNR, dB | SSIM | one process right | plan right | difference, points |
|---|---|---|---|---|---|---|---|"""
GREATEST = """| plan | warm-up steps | pairs | least | median | greatest | PSNR, dB |
|---|---|---|---|---|---|---|"""
"""Of the greatest difference of any pixel in each picture, of 255."""


@click.command()
@click.argument("folders", nargs=-1, required=True, type=click.Path(path_type=pathlib.Path, file_okay=False))
@click.option("--curve", type=click.Path(path_type=pathlib.Path), help="Draw PSNR and SSIM over warm-up steps.")
def main(folders: Sequence[pathlib.Path], curve: pathlib.Path | None) -> None:
    """Print a table of the output FOLDERS of evaluations."""
    found = sorted(map(Evaluation.read, folders), key=lambda each: (each.method, each.pairs, each.plan["warmup_steps"]))
    click.echo("\n".join([HEADER, *(each.row() for each in found), "", GREATEST]))
    click.echo("\n".join(each.greatest_row() for each in found))
    if curve is not None:
        draw(found, curve)


def _interval(estimate: dict[str, float], digits: int) -> str:
    value, low, high = (f"{estimate[name]:.{digits}f}" for name in ("value", "low", "high"))
    return f"{value} ({low} to {high})"


def draw(found: Sequence[Evaluation], file: pathlib.Path) -> None:
    """Means with their 95 % intervals, one line a method."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), constrained_layout=True)
    for method in dict.fromkeys(each.method for each in found):
        own = [each for each in found if each.method == method]
        steps = [each.plan["warmup_steps"] for each in own]
        for axis, name in zip(axes, ("psnr", "ssim"), strict=True):
            values = [getattr(each, name) for each in own]
            below, above = ([abs(value[end] - value["value"]) for value in values] for end in ("low", "high"))
            axis.errorbar(
                steps, [value["value"] for value in values], (below, above), marker="o", capsize=3, label=method
            )
    for axis, label in zip(axes, ("PSNR to one process, dB", "SSIM to one process"), strict=True):
        axis.set_xlabel("warm-up steps")
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.savefig(file, dpi=110)


if __name__ == "__main__":
    main()
