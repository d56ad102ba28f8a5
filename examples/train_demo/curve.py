"""The loss curves of a training run as one picture."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot


def draw_curves(work: Path, output: Path) -> None:
    """One panel for each log in ``work``, the loss against minutes, coloured by the side of the images."""
    logs = sorted(work.glob("*.csv"))
    figure, panels = pyplot.subplots(1, len(logs), figsize=(5 * len(logs), 3.5), squeeze=False)
    for panel, log in zip(panels[0], logs, strict=True):
        rows = [
            (int(step), int(side), float(loss), float(seconds)) for step, side, loss, seconds in csv.reader(log.open())
        ]
        for side in sorted({row[1] for row in rows}):
            losses = [row[2] if row[1] == side else math.nan for row in rows]
            panel.plot([row[3] / 60 for row in rows], losses, ".-", ms=2, lw=0.8, label=f"{side} px")
        panel.set(title=log.stem, xlabel="minutes", ylabel="loss", yscale="log")
        panel.grid(alpha=0.3)
        panel.legend()
    figure.tight_layout()
    figure.savefig(output, dpi=110)
    pyplot.close(figure)
