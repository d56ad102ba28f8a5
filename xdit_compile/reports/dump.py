"""Writes what each pass left as readable Python, with the axes of every line beside it."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path

from torch import fx

from xdit_compile.compiler import PASSES, Compilation, Observer
from xdit_compile.ir.program import Program
from xdit_compile.passes.axes.infer import Inference

from .report import AxisNames

VARIABLE = "XDIT_COMPILE_DUMP"
"""Environment variable that names a folder for the dumps."""
logger = logging.getLogger("xdit_compile")


def observers(name: str, rank: int, folder: str | None = None) -> Sequence[Observer]:
    """What watches the passes over the calls of a module: one line each for the log, and dumps where they are wanted.

    Args:
        name: what the module is called.
        folder: where dumps go; by default what the environment variable ``XDIT_COMPILE_DUMP`` names.
    """

    def tell(passed: str, state: Compilation) -> None:
        logger.debug("%s: %s took %.2f s", name, passed, state.seconds[-1][1])

    folder = folder or os.environ.get(VARIABLE)
    if not folder:
        return [tell]
    target = Path(folder) / f"rank{rank}"
    return [tell, lambda passed, state: dump(passed, state, target)]


def dump(passed: str, state: Compilation, target: Path) -> None:
    """Write every graph that a pass left, those of the same structures once; after ``infer_axes`` with their axes."""
    target.mkdir(parents=True, exist_ok=True)
    number = [each.name for each in PASSES].index(passed) + 1
    if passed == "infer_axes" and state.inference is not None:
        _write_axes(state.inference, target, f"{number}_{passed}")
        return
    for name, program in state.programs.items():
        _write_program(program, target, f"{number}_{passed}_{name}")


def _write_program(program: Program, target: Path, title: str) -> None:
    _write(target / f"{title}_root.py", program.root.code)
    for name, structure in program.structures().items():
        _write(target / f"{title}_{name}.py", structure.code)


def _write_axes(inference: Inference, target: Path, title: str) -> None:
    names = AxisNames()
    seen: set[str] = set()
    for frame in inference.frames:
        if str(frame.call.target) not in seen:
            seen.add(str(frame.call.target))
            _write(target / f"{title}_{frame.call.target}.py", _annotated(frame.graph, frame.axes, names))


def _annotated(graph: fx.Graph, axes: dict, names: AxisNames) -> str:
    lines = []
    for node in graph.nodes:
        results = axes.get(node, [])
        text = "; ".join("[" + ", ".join(names.write(axis) for axis in result) + "]" for result in results)
        lines.append(f"{node.format_node() or node}" + (f"  # {text}" if text else ""))
    return "\n".join(line for line in lines if line)


def _write(path: Path, text: str) -> None:
    path.write_text(text.strip() + "\n")
