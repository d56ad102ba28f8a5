"""Writes what each pass saw and made as readable Python, with the axes of every line beside it."""

from __future__ import annotations

import os
from pathlib import Path

from torch import fx

from xdit_compile.compiler import Analysis
from xdit_compile.passes.partition.program import Partitioned

from .report import AxisNames

VARIABLE = "XDIT_COMPILE_DUMP"
"""Environment variable that names a folder for the dumps."""


def dump(analysis: Analysis, partitioned: Partitioned, rank: int, folder: str | None = None) -> None:
    """Write the captured graphs, the same with their axes, and this rank's graphs; does nothing without a folder.

    Args:
        folder: where to write; by default what the environment variable ``XDIT_COMPILE_DUMP`` names.
    """
    folder = folder or os.environ.get(VARIABLE)
    if not folder:
        return
    target = Path(folder) / f"rank{rank}"
    target.mkdir(parents=True, exist_ok=True)
    for stage, program in (("1_captured", analysis.program), ("3_partitioned", partitioned.program)):
        _write(target / f"{stage}_root.py", program.root.code)
        for name, structure in program.structures().items():
            _write(target / f"{stage}_{name}.py", structure.code)
    names = AxisNames()
    seen: set[str] = set()
    for frame in analysis.inference.frames:
        if str(frame.call.target) not in seen:
            seen.add(str(frame.call.target))
            _write(target / f"2_axes_{frame.call.target}.py", _annotated(frame.graph, frame.axes, names))


def _annotated(graph: fx.Graph, axes: dict, names: AxisNames) -> str:
    lines = []
    for node in graph.nodes:
        results = axes.get(node, [])
        text = "; ".join("[" + ", ".join(names.write(axis) for axis in result) + "]" for result in results)
        lines.append(f"{node.format_node() or node}" + (f"  # {text}" if text else ""))
    return "\n".join(line for line in lines if line)


def _write(path: Path, text: str) -> None:
    path.write_text(text.strip() + "\n")
