"""One GPU: microseconds of the operators that passes put into graphs, beside inductor's code for the same without.

Each is compared with the same in float64 first, and timed by CUDA events over inputs that take turns, so that none lies
in the cache because the one before left it there. Sizes are those of published denoisers.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import pathlib
import random
import statistics
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Any

import click
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch.nn import functional as F

import xdit_compile.kernels.linears  # noqa: F401 - registers its ops
from xdit_compile.backends.inductor import OPTIONS
from xdit_compile.kernels.norm_rope import norm_rope_reference

OPS = torch.ops.xdit_compile
TURNS = 4
"""So many sets of inputs take turns."""
Function = Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class Case:
    """A computation in two ways.

    Args:
        name: what, and of which size.
        make: a set of inputs.
        ours: with the operator.
        plain: without, as inductor is given it.
        slack: how often the error of ``plain`` is allowed; sums of products are rounded once for each.
    """

    name: str
    make: Callable[[], tuple[Any, ...]]
    ours: Function
    plain: Function
    slack: float = 1.05


def drawn(*shape: int, scale: float = 1.0) -> torch.Tensor:
    """Random numbers on the card."""
    return scale * torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def heads(tokens: Sequence[int], count: int, width: int, norm: str) -> Callable[[], tuple[Any, ...]]:
    """Streams of queries, keys and values as one product leaves them, weights and tables for norms and rotations."""

    def make() -> tuple[Any, ...]:
        features = count * width
        products = [drawn(1, each, 3 * features) for each in tokens]
        parts = [
            each[..., at * features : (at + 1) * features].unflatten(-1, (count, width))
            for at in (0, 1) for each in products
        ]  # fmt: skip
        weights = [drawn(features if norm.endswith("all") else width) for _ in parts]
        angles = torch.rand(1, sum(tokens), width // 2, device="cuda").repeat_interleave(2, -1)
        return parts, weights, angles.cos(), angles.sin()

    return make


def rotated(norm: str, run: Function) -> Function:
    """Queries and keys normalized, rotated and joined by a function like the operator."""

    def call(parts: Any, weights: Any, cos: Any, sin: Any) -> Any:
        return run(parts, weights, [], cos, sin, [1] * (len(parts) // 2), norm, 1e-6, 2, False, [], 0)

    return call


def activated(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """A linear layer and its activation."""
    return F.gelu(F.linear(x, weight, bias), approximate="tanh")


def side_by_side(parts: list[torch.Tensor], weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """A linear layer of joined values."""
    return F.linear(torch.cat(parts, -1), weight, bias)


def layer(tokens: int, inside: int, outside: int) -> Callable[[], tuple[Any, ...]]:
    """Input, weight and bias."""
    return lambda: (drawn(tokens, inside), drawn(outside, inside, scale=inside**-0.5), drawn(outside, scale=0.1))


def layer_of(tokens: int, widths: Sequence[int], outside: int) -> Callable[[], tuple[Any, ...]]:
    """Parts of an input, weight and bias."""
    make = layer(tokens, sum(widths), outside)

    def cut() -> tuple[Any, ...]:
        x, weight, bias = make()
        return [part.contiguous() for part in x.split(list(widths), -1)], weight, bias

    return cut


def cases() -> list[Case]:
    """All that is timed."""
    found = []
    for name, tokens, count, width, norm in (
        ("norm_rope, 4,608 tokens, 24 heads of 128", (4608,), 24, 128, "rms"),
        ("norm_rope, 512 and 4,096 tokens, 24 heads of 128", (512, 4096), 24, 128, "rms"),
        ("norm_rope, 576 tokens, 24 heads of 128", (576,), 24, 128, "rms"),
        ("norm_rope over all heads, 32,760 tokens, 40 of 128", (32760,), 40, 128, "rms_all"),
    ):
        make = heads(tokens, count, width, norm)
        found.append(Case(name, make, rotated(norm, OPS.norm_rope), rotated(norm, norm_rope_reference)))
    for tokens in (4608, 512, 576):
        make = layer(tokens, 3072, 12288)
        found.append(Case(f"linear_gelu, {tokens:,} x 3,072 x 12,288", make, OPS.linear_gelu, activated))
    for tokens in (4608, 576):
        make, name = layer_of(tokens, (3072, 12288), 3072), f"linear_of_parts, {tokens:,} x (3,072 + 12,288) x 3,072"
        found.append(Case(name, make, OPS.linear_of_parts, side_by_side, 1.6))
    return found


def flat(results: Any) -> list[torch.Tensor]:
    """The tensors that a call gives."""
    return [results] if isinstance(results, torch.Tensor) else list(results)


def exact(value: Any) -> Any:
    """Inputs in float64."""
    if isinstance(value, list | tuple):
        return [exact(each) for each in value]
    return value.double() if isinstance(value, torch.Tensor) else value


def error(results: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """Root of the mean squared error, relative to the size of what is expected."""
    pairs = zip(results, expected, strict=True)
    squares = [((one.double() - like).square().mean() / like.square().mean()).item() for one, like in pairs]
    return max(squares) ** 0.5


def timed(run: Function, inputs: Sequence[Any], turn: int) -> float:
    """Microseconds of one call."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run(*inputs[turn % TURNS])
    end.record()
    end.synchronize()
    return 1e3 * begin.elapsed_time(end)


@torch.no_grad()
def measure(case: Case, rounds: int) -> dict[str, Any]:
    """Errors of both ways, and their times, taken in turn.

    Raises:
        SystemExit: the operator is further from float64 than inductor's code, or than sums in parts may be.
    """
    inputs = [case.make() for _ in range(TURNS)]
    runs = {
        "ours": torch.compile(case.ours, dynamic=False, options=OPTIONS),
        "inductor's": torch.compile(case.plain, dynamic=False, options=OPTIONS),
    }
    expected = flat(case.plain(*exact(inputs[0])))
    errors = {name: error(flat(run(*inputs[0])), expected) for name, run in runs.items()}
    if not errors["ours"] <= case.slack * errors["inductor's"]:
        raise SystemExit(f"{case.name} is off by {errors}; nothing was timed")
    del expected
    times: dict[str, list[float]] = {name: [] for name in runs}
    order, turns = random.Random(0), list(runs)
    for turn in range(-10, rounds):
        order.shuffle(turns)
        for name in turns:
            took = timed(runs[name], inputs, turn)
            times[name] += [took] if turn >= 0 else []
    return {"case": case.name, "errors": errors, "us": {name: statistics.median(each) for name, each in times.items()}}


@click.command()
@click.option("--rounds", default=60, show_default=True, help="Calls of each way.")
@click.option("--only", default="", help="Cases whose names begin so.")
@click.option("--json", "json_file", type=click.Path(path_type=pathlib.Path), help="Write everything measured here.")
def main(rounds: int, only: str, json_file: pathlib.Path | None) -> None:
    """Compare the operators of fusion passes with what inductor makes of the same, on one card."""
    if not torch.cuda.is_available():
        raise click.UsageError("needs a GPU that torch.cuda sees")
    chosen = [case for case in cases() if case.name.startswith(only)]
    found = [measure(case, rounds) for case in track(chosen, "checking and timing", transient=True)]
    card = torch.cuda.get_device_name()
    table = Table(
        "operator", "ours us", "inductor's us", "ratio", "ours off", "inductor's off", title=f"bfloat16, {card}"
    )
    for each in found:
        ours, others = each["us"].values()
        errors = [f"{value:.1e}" for value in each["errors"].values()]
        table.add_row(each["case"], f"{ours:.1f}", f"{others:.1f}", f"{ours / others:.3f}", *errors)
    Console(width=140).print(table)
    if json_file is not None:
        versions = {name: version(name) for name in ("torch", "triton")}
        about = {"date": datetime.date.today().isoformat(), "card": card, "versions": versions, "rounds": rounds}
        json_file.write_text(json.dumps({**about, "cases": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
