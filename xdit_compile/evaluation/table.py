"""What an evaluation found, as tables for a terminal."""

from __future__ import annotations

import dataclasses
import io
from typing import TYPE_CHECKING

from .fidelity import JUDGED, Fidelity, Following, Frechet
from .intervals import Estimate

if TYPE_CHECKING:
    from rich.table import Table

_FEATURES = {
    "scenes": "of a small network trained on drawn scenes: this is not Inception FID",
    "inception": "of torch-fidelity's Inception network",
}


def render(fidelity: Fidelity, width: int = 110) -> str:
    """The tables as text."""
    from rich.console import Console

    written = io.StringIO()
    console = Console(file=written, width=width, color_system=None, force_jupyter=False)
    console.print(_distance_table(fidelity))
    for name, judged in fidelity.following.items():
        console.print(_following_table(name, fidelity.following_pairs[name], judged))
    if not fidelity.following:
        console.print("what the pictures show: not applicable, no caption is of the grammar of drawn scenes")
    console.print(_frechet_table(fidelity.frechet))
    console.print(f"Frechet distances are in features {_FEATURES[fidelity.frechet.features]}")
    return written.getvalue().rstrip()


def _distance_table(found: Fidelity) -> Table:
    far = found.distances
    table = _table(
        f"{far.pairs} pairs of pictures, {far.identical} of them identical in 8 bits",
        ("plan against one process", "mean", "95 % interval", "note"),
    )
    over = f"over the {far.pairs - far.identical} that differ"
    table.add_row("PSNR, dB", *_figures(far.psnr, 1), f"median {far.psnr_median:.1f}, {over}" if far.psnr else "")
    table.add_row("SSIM", *_figures(far.ssim, 4), "1 for identical pictures")
    table.add_row("perceptual distance", *_figures(far.perceptual, 5), "0 for identical pictures; not LPIPS itself")
    table.add_row("largest difference, of 255", *_figures(far.largest, 1), f"{far.largest_of_all} over all pairs")
    return table


def _following_table(name: str, pairs: int, judged: dict[str, Following]) -> Table:
    columns = ("shows what was asked for", "one process", "plan", "difference", "95 % interval")
    table = _table(f"{pairs} caption{'s' if pairs > 1 else ''} of {name}", columns)
    for what in JUDGED:
        one = judged[what]
        shares = [f"{each.value:.0%} ({each.low:.0%} to {each.high:.0%})" for each in (one.reference, one.plan)]
        value, low, high = (100 * (part or 0.0) for part in dataclasses.astuple(one.difference))
        table.add_row(what, *shares, f"{value:+.0f} points", f"{low:+.0f} to {high:+.0f}")
    return table


def _frechet_table(frechet: Frechet) -> Table:
    table = _table("", ("Frechet distance", "value"))
    table.add_row("plan to one process", _number(frechet.plan_to_reference))
    drawn = f"{frechet.drawn} drawn scenes of the same captions"
    table.add_row(f"one process to {drawn}", _number(frechet.reference_to_drawn))
    table.add_row(f"plan to {drawn}", _number(frechet.plan_to_drawn))
    if frechet.difference is not None:
        value, interval = _figures(frechet.difference, 3)
        table.add_row("the last less the one before (95 % interval)", f"{value} ({interval})")
    return table


def _table(title: str, columns: tuple[str, ...]) -> Table:
    from rich.table import Table

    return Table(*columns, title=title or None, title_justify="left")


def _figures(estimate: Estimate | None, digits: int) -> tuple[str, str]:
    if estimate is None:
        return "-", "-"
    if estimate.low is None or estimate.high is None:
        return f"{estimate.value:.{digits}f}", "-"
    return f"{estimate.value:.{digits}f}", f"{estimate.low:.{digits}f} to {estimate.high:.{digits}f}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
