"""The text of what every rank runs, for ten denoisers and two autoencoders under every method: kept to be compared.

``python tests/golden.py [NAME ...]`` writes it anew: where graphs are meant to change, in a commit that says so.
"""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import lzma
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from splitting import captured, partition_rows
from torch import fx
from zoo.autoencoders import AUTOENCODERS

from xdit_compile.capture.capture import capture
from xdit_compile.compiler import compiled
from xdit_compile.distributed.mesh import Mesh
from xdit_compile.errors import XditCompileError
from xdit_compile.ir.program import Program
from xdit_compile.passes.axes.infer import infer
from xdit_compile.passes.memory.tile_rows import in_strips
from xdit_compile.passes.rules.registry import rulebook
from xdit_compile.plan import Plan

FOLDER = Path(__file__).resolve().parent / "golden_graphs"
DENOISERS = (
    "flux", "sd3", "pixart", "hunyuandit", "cogvideox", "wan_t2v", "sana", "ltx", "qwenimage_masked", "unet_sd15",
)  # fmt: skip
CODERS = ("kl", "wan")
METHODS: dict[str, dict[str, int]] = {
    f"{name} {ranks}": {name: ranks}
    for name in ("ulysses", "ring", "tensor", "cfg", "data", "pipefusion", "distrifusion")
    for ranks in (2, 3)
}
NAMES = (*DENOISERS, *CODERS)


def kept(name: str) -> str:
    """What is stored of a case."""
    return lzma.decompress((FOLDER / f"{name}.txt.xz").read_bytes()).decode()


def write(name: str) -> None:
    """Store what a case comes to now."""
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / f"{name}.txt.xz").write_bytes(lzma.compress(text(name).encode(), preset=9 | lzma.PRESET_EXTREME))


def text(name: str) -> str:
    """The graphs of every rank under every method, or why there are none."""
    sections = coder(name) if name in CODERS else denoiser(name)
    return "".join(f"==== {title}\n{written}\n" for title, written in sections)


def changes(name: str, most: int = 40) -> str:
    """The first lines in which a case differs from what is stored; empty where it does not."""
    before, now = kept(name), text(name)
    if before == now:
        return ""
    lines = difflib.unified_diff(before.splitlines(), now.splitlines(), "kept", "now", lineterm="", n=2)
    return "\n".join(itertools.islice(lines, most))


def denoiser(name: str) -> Iterator[tuple[str, str]]:
    model = captured(name)
    yield "captured", program_text(model.inference.program)
    for method, degrees in METHODS.items():
        plan = Plan(**degrees)  # type: ignore[arg-type]
        try:
            analysis = model.analysis(plan)
            for rank in range(plan.world_size):
                state = compiled(analysis, plan, Mesh.simulated(plan, rank), until="assign_stages")
                yield f"{method}, rank {rank}", "\n".join(map(program_text, state.programs.values()))
        except XditCompileError as error:
            yield method, f"{type(error).__name__}: {error}"


def coder(name: str) -> Iterator[tuple[str, str]]:
    case = AUTOENCODERS[name]
    module = case.build()
    for method in ("decode", "encode"):
        inference = infer(capture(module, (case.given(method),), {}, forward=getattr(module, method)), rulebook())
        for ranks in (2, 3):
            for rank, partitioned in enumerate(partition_rows(inference, Plan(ring=ranks), gather=False)):
                yield f"{method}, rows over {ranks}, rank {rank}", program_text(partitioned.program)
        (whole,) = partition_rows(inference, Plan(), gather=False)
        yield f"{method}, strips", program_text(in_strips(whole.program, 1))


RENAMED = ("incoming", "arriving")
"""A word of the code and what it was when the graphs were kept."""


def program_text(program: Program) -> str:
    """A root graph, what is bound to it, and the structures that it calls, under names that tell their order alone."""
    called = [str(node.target) for node in program.root.graph.nodes if node.op == "call_module"]
    order = {target: f"structure_{at}" for at, target in enumerate(dict.fromkeys(called))}
    bound = [
        f"{spec.kind} {spec.target} {[dataclasses.astuple(each) for each in spec.pieces]}".replace(*RENAMED)
        for spec in program.inputs
    ]
    graphs = [graph_text(program.root.graph, order)]
    graphs += [f"{order[target]}\n{graph_text(getattr(program.root, target).graph, {})}" for target in order]
    return "\n".join([*bound, *graphs])


def graph_text(graph: fx.Graph, targets: dict[str, str]) -> str:
    """One line a node: its number, what it calls with which nodes, and the shape and dtype of what it makes."""
    numbers = {node: f"%{at}" for at, node in enumerate(graph.nodes)}
    return "\n".join(_line(node, numbers, targets) for node in graph.nodes)


def _line(node: fx.Node, numbers: dict[fx.Node, str], targets: dict[str, str]) -> str:
    args = fx.node.map_arg((node.args, node.kwargs), lambda other: _Written(numbers[other]))
    target = "" if node.op == "placeholder" else targets.get(str(node.target), _plain(node.target))
    return f"{numbers[node]} {node.op} {target} {args} {_form(node.meta.get('val'))}"


class _Written(str):
    __repr__ = str.__str__


def _plain(target: Any) -> str:
    return target if isinstance(target, str) else re.sub(r" at 0x\w+", "", str(target))


def _form(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    return f"({', '.join(map(_form, value))})" if isinstance(value, tuple | list) else ""


if __name__ == "__main__":
    for each in sys.argv[1:] or NAMES:
        write(each)
        print(each, (FOLDER / f"{each}.txt.xz").stat().st_size, flush=True)
