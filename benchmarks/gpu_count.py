"""What a card would run for each structure of FLUX, counted without a card.

Inductor generates code for an H100 (sm_90) or an A100 (sm_80) as it does with ``backend="inductor"``, and Triton
compiles it; kernels, launches, matrix products and bytes are counted in what came out. Nothing is computed, and nothing
is timed. A structure is a graph that equal blocks share, here that of rank 0.
"""

from __future__ import annotations

import ast
import copy
import dataclasses
import datetime
import json
import operator
import pathlib
import platform
import re
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from typing import Any
from unittest import mock

import click
import torch
import torch._inductor
from denoiser import Size
from peaks import PEAKS
from real_sizes import MODELS
from rich.console import Console
from rich.table import Table
from roofline import Work
from torch import fx, nn
from torch._inductor.graph import GraphLowering
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils import _pytree as pytree

from xdit_compile import Plan
from xdit_compile.backends.inductor import OPTIONS
from xdit_compile.backends.inductor_order import pin_order
from xdit_compile.backends.target.pretend_card import CARDS, DEVICE, Binary, Card, pretend_card
from xdit_compile.capture.capture import capture
from xdit_compile.capture.simplify import erase_with_sources
from xdit_compile.compiler import Analysis, Compilation, compiled, run_passes
from xdit_compile.distributed.mesh import Mesh
from xdit_compile.errors import PlanError
from xdit_compile.ir.program import Program
from xdit_compile.passes.axes.infer import infer
from xdit_compile.passes.choose.units import choose_units
from xdit_compile.passes.rules.registry import rulebook
from xdit_compile.plan.plan import OPTIONAL_PASSES

PLANS = ("ulysses=1", "ulysses=2", "ulysses=8", "ring=8")
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm")
SMALL = {"hidden": 128, "head_dim": 16, "tokens": 64, "text": 16}
ATTENTION = torch.ops.aten.scaled_dot_product_attention.default
FLASH = torch.ops.aten._scaled_dot_product_flash_attention.default


@dataclasses.dataclass(frozen=True)
class Code:
    """What was generated for a graph: Triton kernels, their launches, products of matrices, bytes read and written.

    Args:
        flops: of products and attention.
        seconds: that kernels take at best, and ``floor`` those of one that did all of it and read every input whole.
        registers: of the kernel that has most.
        stack: bytes of memory that threads have beside them, where spills go, of all kernels.
    """

    kernels: int
    launches: int
    products: int
    moved: int
    flops: int
    seconds: float
    floor: float
    registers: int
    stack: int


@dataclasses.dataclass(frozen=True)
class Counted:
    """A structure: the module of its first call, how often it is called, bytes of its inputs, and its code."""

    structure: str
    path: str
    calls: int
    inputs: int
    code: Code


def count(graph: fx.GraphModule, args: Sequence[Any], binaries: list[Binary], target: str) -> Code:
    """Compile a graph for tensors on the pretended card, and count.

    Args:
        args: fake tensors.
        binaries: what Triton compiles, as `pretend_card` gives it.

    Raises:
        RuntimeError: Triton compiled a kernel for something else than ``target``, or not at all.
    """
    sources, works = list[str](), list[Work]()
    peak = PEAKS[target]

    def note(source: str) -> None:
        sources.append(source)
        works.append(Work.of(V.graph.scheduler.nodes, peak))

    pin_order()
    with mock.patch.object(GraphLowering, "save_output_code", note):
        torch._inductor.compile(graph, list(args), options={**OPTIONS, "fx_graph_cache": False})
    calls = [call for source in sources for call in _calls(source)]
    variables = dict(pair for source in sources for pair in _kernels(source))
    kernels = set(variables.values())
    made = {binary.kernel: binary for binary in binaries if binary.target == target}
    if missing := kernels - made.keys():
        raise RuntimeError(f"Triton has no code for {target} of {', '.join(sorted(missing))}")
    names = [ast.unparse(call.func) for call in calls]
    launches = sum(name.removesuffix(".run") in variables for name in names)
    products = sum(name in [f"extern_kernels.{product}" for product in PRODUCTS] for name in names)
    products += sum(work.products for work in works)
    moved, flops, seconds = (sum(getattr(work, name) for work in works) for name in ("moved", "flops", "seconds"))
    floor = min(seconds, peak.seconds(flops, sum(map(_bytes, args)) + _results(graph, args)))
    used = [made[kernel] for kernel in kernels]
    registers = max((binary.registers for binary in used), default=0)
    stack = sum(binary.stack for binary in used)
    return Code(len(kernels), launches, products, moved, flops, seconds, floor, registers, stack)


def _results(graph: fx.GraphModule, args: Sequence[Any]) -> int:
    """Bytes of what a graph gives."""
    mode = next(each.fake_mode for each in args if isinstance(each, FakeTensor))
    with mode, torch.no_grad():
        return sum(map(_bytes, pytree.tree_leaves(graph(*args))))


def _kernels(source: str) -> Iterator[tuple[str, str]]:
    """The variables that hold Triton kernels, and the names of these."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Assign) and ast.unparse(node.value).startswith("async_compile.triton("):
            assert isinstance(node.value, ast.Call)
            yield ast.unparse(node.targets[0]), ast.literal_eval(node.value.args[0])


def _calls(source: str) -> Iterator[ast.Call]:
    return (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call))


def on_card(structure: fx.GraphModule) -> fx.GraphModule:
    """The same graph with its new tensors on the card, and attention by the flash operator, which takes no mask.

    Raises:
        ValueError: attention whose heads share keys.
    """
    graph = copy.deepcopy(structure.graph)
    for node in graph.find_nodes(op="call_function", target=ATTENTION):
        names = [argument.name for argument in ATTENTION._schema.arguments]
        given = dict(zip(names, node.args, strict=False)) | node.kwargs
        if given.get("enable_gqa"):
            raise ValueError(f"heads of {node.name} share keys, which the flash operator does not count")
        rest = {name: given[name] for name in ("dropout_p", "is_causal", "scale") if name in given}
        with graph.inserting_before(node):
            found = graph.call_function(FLASH, tuple(given[name] for name in ("query", "key", "value")), rest)
            node.replace_all_uses_with(graph.call_function(operator.getitem, (found, 0)))
        graph.erase_node(node)
        mask = given.get("attn_mask")
        if mask is not None and mask.op == "call_function" and not mask.users:
            erase_with_sources(mask)
    for node in graph.nodes:
        if node.kwargs.get("device") is not None:
            node.update_kwarg("device", DEVICE)
    return fx.GraphModule(structure, graph)


class _Walk(fx.Interpreter):
    """Counts every structure, for each form in which its arguments come, on the way through a root graph of fakes."""

    def __init__(self, root: fx.GraphModule, mode: FakeTensorMode, binaries: list[Binary], target: str):
        super().__init__(root)
        self.found: dict[Any, Counted] = {}
        self._mode, self._binaries, self._target = mode, binaries, target

    def run_node(self, n: fx.Node) -> Any:
        if n.op != "call_module":
            return super().run_node(n)
        args, _ = self.fetch_args_kwargs_from_env(n)
        name = str(n.target)
        structure, form = on_card(self.fetch_attr(name)), (name, *map(_form, args))
        if form not in self.found:
            code = count(fx.GraphModule(structure, copy.deepcopy(structure.graph)), args, self._binaries, self._target)
            self.found[form] = Counted(name, n.meta.get("path", ""), 0, sum(map(_bytes, args)), code)
        self.found[form] = dataclasses.replace(self.found[form], calls=self.found[form].calls + 1)
        with self._mode:
            return structure(*args)


def _form(value: Any) -> Any:
    return (value.shape, value.stride(), value.dtype) if isinstance(value, torch.Tensor) else value


def _bytes(value: Any) -> int:
    return value.numel() * value.element_size() if isinstance(value, torch.Tensor) else 0


def counted(program: Program, binaries: list[Binary], target: str) -> list[Counted]:
    """Every structure of a program, in the order of their first calls."""
    mode = FakeTensorMode(shape_env=ShapeEnv())
    fakes = [node.meta["val"] for node in program.root.graph.find_nodes(op="placeholder")]
    with mode:
        inputs = [torch.empty_strided(each.shape, each.stride(), dtype=each.dtype, device=DEVICE) for each in fakes]
    walk = _Walk(program.root, mode, binaries, target)
    with torch.no_grad():
        walk.run(*inputs)
    return list(walk.found.values())


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


def measure(model: nn.Module, call: dict[str, Any], plans: Sequence[Plan], card: Card) -> list[list[Counted]]:
    """Capture once, then partition and count for every plan."""
    program = capture(model, (), call)
    inference = infer(program, rulebook())
    analyses = [Analysis(program, inference, choose_units(inference, plan)) for plan in plans]
    states = [_fused(each, plan) for each, plan in zip(analyses, plans, strict=True)]
    with pretend_card(card) as binaries:
        return [counted(state.programs["call"], binaries, card.target) for state in states]


def _fused(analysis: Analysis, plan: Plan) -> Compilation:
    """What rank 0 has of a plan before it is compiled, on the card."""
    state = compiled(analysis, plan, Mesh.simulated(plan, 0), until="hoist_positions")
    return run_passes(dataclasses.replace(state, device=DEVICE), after="hoist_positions", until="join_linears")


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
        found["one rank" if plan.world_size == 1 else words] = plan
    return found


def table_of(rows: list[Counted], title: str) -> Table:
    """A row for each structure, and one for all calls together."""
    table = Table("structure", title=title, title_justify="left")
    for column in (
        "calls", "Triton kernels", "launches", "matrix products", "MB moved", "MB of inputs", "GFLOP", "roofline us",
        "floor us", "registers", "stack B",
    ):  # fmt: skip
        table.add_column(column, justify="right")
    for at, row in enumerate(rows):
        name = f"{row.structure}, {row.path}" if row.path else row.structure
        numbers = [str(number) for number in (row.calls, row.code.kernels, row.code.launches, row.code.products)]
        end = at == len(rows) - 1
        numbers += [f"{size / 1e6:,.2f}" for size in (row.code.moved, row.inputs)]
        numbers += [f"{row.code.flops / 1e9:,.1f}", *(f"{s * 1e6:,.1f}" for s in (row.code.seconds, row.code.floor))]
        table.add_row(name, *numbers, str(row.code.registers), str(row.code.stack), end_section=end)
    calls = sum(row.calls for row in rows)
    names = ("launches", "products", "moved", "flops", "seconds", "floor")
    launches, products, moved, flops, seconds, floor = (
        sum(row.calls * getattr(row.code, name) for row in rows) for name in names
    )
    times = [f"{each * 1e6:,.1f}" for each in (seconds, floor)]
    counts = [str(calls), "", str(launches), str(products), f"{moved / 1e6:,.2f}", "", f"{flops / 1e9:,.1f}", *times]
    table.add_row("all calls", *counts, "", "")
    return table


def beside(apart: list[Counted], fused: list[Counted], title: str) -> Table:
    """Each structure without and with the passes that can be left out, and all calls of all structures."""
    table = Table("structure", title=title, title_justify="left")
    for column in ("calls", "launches", "products", "MB moved", "ratio", "roofline us", "floor us"):
        table.add_column(column, justify="right")
    totals = [0] * 4
    known = {row.structure: row for row in apart}
    for row in fused:
        before, after = known[row.structure].code, row.code
        pairs = [f"{getattr(before, name)}, {getattr(after, name)}" for name in ("launches", "products")]
        moved = f"{before.moved / 1e6:,.1f}, {after.moved / 1e6:,.1f}", f"{after.moved / before.moved:.3f}"
        times = f"{before.seconds * 1e6:,.0f}, {after.seconds * 1e6:,.0f}", f"{after.floor * 1e6:,.0f}"
        table.add_row(f"{row.structure}, {row.path}", str(row.calls), *pairs, *moved, *times)
        counts = (before.launches, after.launches, before.moved, after.moved)
        totals = [total + row.calls * count for total, count in zip(totals, counts, strict=True)]
    launches, moved_ratio = totals[1] / totals[0], f"{totals[3] / totals[2]:.3f}"
    sums = f"{totals[0]}, {totals[1]} ({launches:.3f})", "", f"{totals[2] / 1e6:,.1f}, {totals[3] / 1e6:,.1f}"
    table.add_row("all calls", str(sum(row.calls for row in fused)), *sums, moved_ratio, "", "")
    return table


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
@click.option("--beside", "both", is_flag=True, help="Count without all these passes, too, and compare.")
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
    chosen = [dataclasses.replace(plan, without=without) for plan in plans.values()]
    bare = [dataclasses.replace(plan, without=OPTIONAL_PASSES) for plan in plans.values()] if both else []
    counted_all = measure(module, call, [*chosen, *bare], card)
    found = dict(zip(plans, counted_all, strict=False))
    versions = {name: version(name) for name in ("torch", "triton", "diffusers")}
    shapes = {name: list(value.shape) for name, value in call.items() if isinstance(value, torch.Tensor)}
    size = f"{depth} blocks of each kind, {'small, ' if small else ''}{_named(shapes)}, bfloat16"
    made = ", ".join(f"{name} {versions[name]}" for name in ("torch", "triton"))
    for plan, rows in found.items():
        left_out = f", without {', '.join(without)}" if without else ""
        title = f"{plan}{left_out}: COUNTED, not measured on a card\n{model}, {size}; {target} ({card.name}); {made}"
        console.print(table_of(rows, title))
    for plan, rows in zip(plans, counted_all[len(plans) :], strict=False):
        console.print(
            beside(rows, found[plan], f"{plan}: without optional passes, with them; COUNTED\n{model}, {size}")
        )
    if json_file:
        about = {
            "date": datetime.date.today().isoformat(),
            "versions": versions | {"python": platform.python_version()},
            "card": {"target": target, **dataclasses.asdict(card)},
            "without": list(without),
            "size": {"model": model, "depth": depth, "shapes": shapes},
        }
        counts = {plan: [dataclasses.asdict(row) for row in rows] for plan, rows in found.items()}
        json_file.write_text(json.dumps({**about, "counted": counts}, indent=1) + "\n")


def _named(shapes: dict[str, list[int]]) -> str:
    """The shape of what is denoised, which comes first, in words."""
    name, shape = next(iter(shapes.items()))
    return f"{name} of {'x'.join(map(str, shape))}"


if __name__ == "__main__":
    main()
