"""What a card would run for each structure of a model, counted without a card.

Inductor generates code for an H100 (sm_90) or another card as it does with ``backend="inductor"``, and Triton compiles
it; kernels, launches, matrix products and bytes are counted in what came out. Nothing is computed, and nothing timed.
A structure is a graph that equal blocks share, here that of rank 0.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import pathlib
import platform
import re
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

import click
import torch
from by_block import blocks_of, by_block
from denoiser import Size
from real_sizes import MODELS
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.utils import _pytree as pytree

from xdit_compile import Plan
from xdit_compile.backends.target.cards import CARDS, Card
from xdit_compile.backends.target.pretend_card import pretend_card
from xdit_compile.capture.capture import capture
from xdit_compile.compiler import Compilation, run_passes
from xdit_compile.distributed.mesh import Mesh
from xdit_compile.errors import PlanError, one_line
from xdit_compile.ir.program import Program
from xdit_compile.plan.plan import OPTIONAL_PASSES
from xdit_compile.reports.counted_report import on_paper
from xdit_compile.reports.counting.count import counted
from xdit_compile.reports.counting.counts import Code, Counted, Total
from xdit_compile.reports.counting.table import COUNTED, spills, table_of

PLANS = ("ulysses=1", "ulysses=2", "ulysses=8", "ring=8")
ONE_RANK = "one rank"
SMALL = {"hidden": 128, "head_dim": 16, "tokens": 64, "text": 16}


def denoiser(name: str, depth: int, small: bool) -> tuple[nn.Module, dict[str, Any]]:
    """A model in bfloat16 without weights, and one call of it."""
    if small:
        size = Size(blocks=2 * depth, **SMALL)
        with torch.device("meta"):
            model = size.build()
        call = size.inputs()
    else:
        model, call = MODELS[name](depth)
    half = pytree.tree_map_only(torch.Tensor, lambda tensor: tensor.to("meta", torch.bfloat16), call)
    return nn.Module.to(model, torch.bfloat16), half


def measure(program: Program, plans: Sequence[Plan], card: Card) -> list[list[Counted]]:
    """Partition one captured call and count for every plan."""
    states = []
    for plan in plans:
        known = run_passes(Compilation(plan, program=program), after="capture", until="choose_units")
        states.append(on_paper(known.analysis, plan, Mesh.simulated(plan, 0)))
    with pretend_card(card) as binaries:
        return [counted(state.programs["call"], binaries, card) for state in states]


def measure_module(program: Program, model: nn.Module, call: dict[str, Any], card: Card) -> dict[str, Code]:
    """What inductor makes of the module block by block: of the blocks of which a program has calls, by their paths.

    Nothing where TorchDynamo records no whole block; a line says why.
    """
    paths = [node.meta["path"] for node in program.calls() if node.meta.get("repeated")]
    try:
        return by_block(blocks_of(model, call, paths), card)
    except (RuntimeError, ValueError) as error:
        click.echo(f"the module block by block: not counted, as {one_line(error)}", err=True)
        return {}


def _plans(context: click.Context, parameter: click.Parameter, texts: tuple[str, ...]) -> dict[str, Plan]:
    """Plans by their degrees in words."""
    found = {}
    for text in texts:
        if not re.fullmatch(r"\w+=\d+(,\w+=\d+)*", text):
            raise click.BadParameter(f"{text!r} is no list of degrees such as ulysses=4,ring=2")
        try:
            plan = Plan(**{name: int(degree) for name, degree in re.findall(r"(\w+)=(\d+)", text)}).check()
        except (PlanError, TypeError) as error:
            raise click.BadParameter(f"{text!r}: {error}") from None
        if plan.is_stale:
            raise click.BadParameter(f"{text!r} has programs of several kinds; only those of one are counted")
        words = text.replace("=", " ").replace(",", ", ")
        found[ONE_RANK if plan.world_size == 1 else words] = plan
    return found


def beside(apart: list[Counted], fused: list[Counted], module: Mapping[str, Code], title: str) -> Table:
    """Each structure as inductor compiles the module's block, then without and with the passes that can be left out.

    All calls of the module are those of its blocks, and around these the calls without the passes.

    Args:
        module: the code of blocks by their paths; none where only ours are compared.
    """
    table = Table("structure", title=title, title_justify="left", padding=0)
    for column in ("calls", "launches", "products", "MB", "/ apart", "/ module", "roofline us", "floor us"):
        table.add_column(column, justify="right")
    before, after = ({row.structure: row for row in rows} for rows in (apart, fused))
    for name in after | before:
        ours = [rows[name].code if name in rows else None for rows in (before, after)]
        row = after.get(name) or before[name]
        counts = [*([module.get(row.path)] if module else []), *ours]
        table.add_row(row.title, str(row.calls), *_side_by_side(counts))
    table.add_section()
    blocks = [dataclasses.replace(row, code=module.get(row.path, row.code)) for row in apart]
    totals = [*([Total.of(blocks)] if module else []), Total.of(apart), Total.of(fused)]
    table.add_row("all calls", str(totals[-1].calls), *_side_by_side(totals))
    return table


def _side_by_side(counts: Sequence[Code | Total | None]) -> list[str]:
    """Columns of `beside` of one structure; the last two counts are apart and fused, one before them the module's."""

    def each(name: str, scale: float, form: str) -> str:
        return ", ".join("-" if one is None else format(getattr(one, name) * scale, form) for one in counts)

    *module, apart, fused = (None if one is None else one.moved for one in counts)
    against = [apart, *module] if module else [apart, None]
    ratios = [f"{fused / other:.3f}" if fused and other else "" for other in against]
    last = counts[-1] or counts[-2]
    assert last is not None
    times = [each("seconds", 1e6, ",.0f"), f"{last.floor * 1e6:,.0f}"]
    return [each("launches", 1, ",.0f"), each("products", 1, ",.0f"), each("moved", 1e-6, ",.1f"), *ratios, *times]


@click.command()
@click.option(
    "--plan", "plans", multiple=True, default=PLANS, show_default=True, callback=_plans,
    help="Degrees of a plan, such as ulysses=4,ring=2; ulysses=1 is one rank. May be repeated.",
)  # fmt: skip
@click.option("--model", type=click.Choice(list(MODELS)), default="FLUX.1-dev", show_default=True)
@click.option("--depth", type=click.IntRange(2), default=2, show_default=True, help="Blocks of each kind.")
@click.option("--small", is_flag=True, help="128 hidden and 64 + 16 tokens in place of 3,072 and 4,096 + 512.")
@click.option("--target", type=click.Choice(list(CARDS)), default="sm_90", show_default=True)
@click.option("--without", type=click.Choice(OPTIONAL_PASSES), multiple=True, help="Passes to leave out.")
@click.option(
    "--beside",
    "both",
    is_flag=True,
    help="Compare with counts without these passes, and of the module block by block.",
)
@click.option("--json", "json_file", type=click.Path(path_type=pathlib.Path), help="Write everything counted here.")
def main(
    plans: dict[str, Plan], model: str, depth: int, small: bool, target: str, without: tuple[str, ...],
    both: bool, json_file: pathlib.Path | None,
) -> None:  # fmt: skip
    """Count what a card would run of a model under each plan. No card is needed, and nothing is timed.

    Matrix products are those that cuBLAS computes. Bytes are what all operators read and write of the card's memory if
    each touches what it takes of a tensor once, from what inductor's scheduler knows. Attention is counted as the flash
    operator: it reads queries, keys and values, no mask, writes its result and nothing in between, and is neither among
    the launches nor among the products. Nor is what a collective does inside, as with the keys and values that travel
    around a ring.
    """
    card, console = CARDS[target], Console()
    console = console if console.is_terminal else Console(width=170)
    module, call = denoiser(model, depth, small)
    program = capture(module, (), call)
    chosen = [dataclasses.replace(plan, without=without) for plan in plans.values()]
    bare = [dataclasses.replace(plan, without=OPTIONAL_PASSES) for plan in plans.values()] if both else []
    counted_all = measure(program, [*chosen, *bare], card)
    found = dict(zip(plans, counted_all, strict=False))
    blocks = measure_module(program, module, call, card) if both else {}
    versions = {name: version(name) for name in ("torch", "triton", "diffusers")}
    shapes = {name: list(value.shape) for name, value in call.items() if isinstance(value, torch.Tensor)}
    size = f"{depth} blocks of each kind, {'small, ' if small else ''}{_named(shapes)}, bfloat16"
    made = ", ".join(f"{name} {versions[name]}" for name in ("torch", "triton"))
    for plan, rows in found.items():
        left_out = f", without {', '.join(without)}" if without else ""
        title = f"{plan}{left_out}: {COUNTED}\n{model}, {size}; {target} ({card.name}); {made}"
        console.print(table_of(rows, title), *spills(rows), sep="\n")
    for plan, rows in zip(plans, counted_all[len(plans) :], strict=False):
        beside_these = blocks if plan == ONE_RANK else {}
        contenders = f"{'the module block by block, ' if beside_these else ''}without optional passes, with them"
        title = f"{plan}: {contenders}; {COUNTED}\n{model}, {size}; {target}; {made}"
        console.print(beside(rows, found[plan], beside_these, title))
    if json_file:
        about = {
            "date": datetime.date.today().isoformat(),
            "versions": versions | {"python": platform.python_version()},
            "card": {"target": target, **dataclasses.asdict(card)},
            "without": list(without),
            "size": {"model": model, "depth": depth, "shapes": shapes},
        }
        counts = {"counted": found, "apart": dict(zip(plans, counted_all[len(plans) :], strict=False))}
        written = {
            kind: {plan: [dataclasses.asdict(row) for row in rows] for plan, rows in each.items()}
            for kind, each in counts.items()
        }
        by_path = {path: dataclasses.asdict(code) for path, code in blocks.items()}
        json_file.write_text(json.dumps({**about, **written, "module": by_path}, indent=1) + "\n")


def _named(shapes: dict[str, list[int]]) -> str:
    """The shape of what is denoised, which comes first, in words."""
    name, shape = next(iter(shapes.items()))
    return f"{name} of {'x'.join(map(str, shape))}"


if __name__ == "__main__":
    main()
