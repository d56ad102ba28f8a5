"""The first step of new processes with nothing kept: seconds beside torch's own ways, and processor time of teams.

The model is FLUX-shaped, with as many blocks as FLUX has, and narrow. Every start is a team of new processes with an
empty cache, and a folder of inductor's that is empty, too; what torch compiles of its own headers once for all is there
before the first of them. Results are compared with the module's before anything is reported.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import resource
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import click
import torch
import torch.distributed as dist
from comparison import TOLERANCE
from fresh import in_new_processes
from processes import ENVIRONMENT
from rich.console import Console
from rich.table import Table
from startup import about, processor

from xdit_compile import Plan, parallelize

OURS, BLOCKS, WHOLE = "parallelize", "compile_repeated_blocks", "torch.compile"
MOST = {WHOLE: 1 / 5, BLOCKS: 1.5}
"""Of the seconds that torch's ways take, capture and check not counted, which those do not do."""
MOST_PROCESSOR_TIME = {2: 1.15, 4: 1.3}
"""Of that of rank 0 when it compiles all that it runs: what all ranks of a team may take."""
TEXT, SIDE, WIDTH = 64, 16, 128


def model(blocks: int, single_blocks: int) -> Any:
    """A narrow transformer with seeded weights of few zeros."""
    import diffusers

    torch.manual_seed(0)
    made = diffusers.FluxTransformer2DModel(
        in_channels=16, num_layers=blocks, num_single_layers=single_blocks, attention_head_dim=WIDTH // 4,
        num_attention_heads=4, joint_attention_dim=64, pooled_projection_dim=64, axes_dims_rope=(8, 12, 12),
        guidance_embeds=True,
    ).eval()  # fmt: skip
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    return made


def inputs() -> dict[str, Any]:
    """Of one call, the same in every process."""
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    rows = torch.cartesian_prod(torch.zeros(1), torch.arange(float(SIDE)), torch.arange(float(SIDE)))
    return {
        "hidden_states": draw(1, SIDE * SIDE, 16), "encoder_hidden_states": draw(1, TEXT, 64),
        "pooled_projections": draw(1, 64), "timestep": torch.tensor([0.5]), "guidance": torch.tensor([3.5]),
        "img_ids": rows, "txt_ids": torch.zeros(TEXT, 3),
    }  # fmt: skip


@torch.no_grad()
def started(scratch: str, way: str, shape: tuple[int, int]) -> dict[str, float]:
    """Seconds of the first step of this process, and how far its result is off."""
    module, call = _prepared(scratch, shape)
    expected = module(**call).sample
    spent = {"capture_s": 0.0}
    begin = time.perf_counter()
    with _timing(spent):
        if way == OURS:
            run = parallelize(module, Plan(cache=f"{scratch}/cache"))
        elif way == BLOCKS:
            module.compile_repeated_blocks(fullgraph=True)
            run = module
        else:
            run = torch.compile(module)
        made = run(**call).sample
    total = time.perf_counter() - begin
    return {"total_s": total, **spent, "compile_s": total - spent["capture_s"], "difference": _off(made, expected)}


@torch.no_grad()
def compiled(scratch: str, shape: tuple[int, int], together: bool) -> dict[str, float]:
    """Seconds of processor time in which this rank compiles what it runs, alone or as one of a team.

    Of this process those count in which structures are compiled and loaded; of its children, all.
    """
    import xdit_compile.runtime.stored.keeper as keeper
    from xdit_compile.runtime.stored.compile_together import Company
    from xdit_compile.runtime.stored.shelf import Shelf

    module, call = _prepared(scratch, shape)
    expected = module(**call).sample
    spent, original = [], keeper.compile_together

    def timed(*args: Any) -> None:
        begin = time.process_time()
        original(*args)
        spent.append(time.process_time() - begin)

    alone = contextlib.nullcontext() if together else mock.patch.object(Shelf, "company", lambda _: Company())
    folder = pathlib.Path(scratch).parent / "cache" if together else f"{scratch}/cache"
    if together:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(pathlib.Path(scratch).parent / "inductor")
    before = _of_children()
    with alone, mock.patch.object(keeper, "compile_together", timed):
        made = parallelize(module, Plan(ulysses=dist.get_world_size(), cache=folder))(**call).sample
    return {"cpu_s": sum(spent) + _of_children() - before, "difference": _off(made, expected)}


def _prepared(scratch: str, shape: tuple[int, int]) -> tuple[Any, dict[str, Any]]:
    """The model and its inputs; what inductor is imported of is no part of what is timed."""
    import torch._inductor.select_algorithm
    import torch._inductor.standalone_compile  # noqa: F401

    os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{scratch}/inductor"
    return model(*shape), inputs()


@contextlib.contextmanager
def _timing(spent: dict[str, float]) -> Iterator[None]:
    """Note seconds in which a module is captured, and what was recorded compared with what it does."""
    from xdit_compile.runtime.runner import Runner

    def timed(function: Callable[..., Any]) -> Callable[..., Any]:
        def called(*args: Any, **kwargs: Any) -> Any:
            begin = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                spent["capture_s"] += time.perf_counter() - begin

        return called

    with mock.patch.object(Runner, "_analysed", timed(Runner._analysed)):
        yield


def _of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _off(made: torch.Tensor, expected: torch.Tensor) -> float:
    return float((made - expected).abs().max() / expected.abs().max())


def _checked(name: str, found: list[dict[str, float]]) -> list[dict[str, float]]:
    """What processes found, where their results are the module's.

    Raises:
        SystemExit: one is not.
    """
    for each in found:
        if not each["difference"] <= TOLERANCE:
            raise SystemExit(f"{name}: a result is off by {each['difference']:.1e} of its largest; nothing told")
    return found


@click.command()
@click.option("--blocks", type=click.IntRange(1), default=19, show_default=True, help="Of two streams.")
@click.option("--single_blocks", type=click.IntRange(1), default=38, show_default=True, help="Of one stream.")
@click.option("--repeats", type=click.IntRange(1), default=3, show_default=True, help="Starts of each kind.")
@click.option(
    "--degrees", type=click.Choice([*map(str, MOST_PROCESSOR_TIME)]), multiple=True, help="Of Ulysses; all by default."
)
@click.option("--ways/--no-ways", default=True, help="Whether seconds of single processes are measured, too.")
@click.option("--json", "json_file", type=click.Path(path_type=pathlib.Path), help="Write everything measured here.")
def main(
    blocks: int, single_blocks: int, repeats: int, degrees: tuple[str, ...], ways: bool, json_file: pathlib.Path | None
) -> None:  # fmt: skip
    """Compare first steps of new processes when nothing is kept of what was compiled."""
    console = Console()
    console = console if console.is_terminal else Console(width=140)
    shape, teams = (blocks, single_blocks), tuple(map(int, degrees)) or tuple(MOST_PROCESSOR_TIME)
    starts: dict[str, list[dict[str, float]]] = {way: [] for way in ((OURS, BLOCKS, WHOLE) if ways else ())}
    together: dict[int, list[float]] = {count: [] for count in teams}
    alone: dict[int, list[float]] = {count: [] for count in teams}
    os.environ.update(ENVIRONMENT)
    in_new_processes(started, 1, BLOCKS, (1, 1))
    for _ in range(repeats):
        for way in starts:
            starts[way] += _checked(way, in_new_processes(started, 1, way, shape))
        for count in teams:
            name = f"ulysses {count}"
            alone[count].append(_checked(name, in_new_processes(compiled, count, shape, False))[0]["cpu_s"])
            ranks = _checked(name, in_new_processes(compiled, count, shape, True))
            together[count].append(sum(rank["cpu_s"] for rank in ranks))
    load = os.getloadavg()[0]
    if starts:
        console.print(_seconds(starts, shape, load))
    console.print(_processor_time(alone, together))
    if json_file:
        found = {"starts": starts, "alone_cpu_s": alone, "together_cpu_s": together}
        json_file.write_text(json.dumps({**about(), "load_average": load, **found}, indent=1) + "\n")


def _seconds(starts: dict[str, list[dict[str, float]]], shape: tuple[int, int], load: float) -> Table:
    versions = ", ".join(f"{name} {value}" for name, value in about()["versions"].items())
    title = (
        f"measured: seconds to the first step of a new process with an empty cache, medians of {len(starts[OURS])};\n"
        f"{shape[0]} + {shape[1]} blocks, width {WIDTH}; {versions}; {processor()}, {os.cpu_count()} cores, "
        f"one thread, load average {load:.1f}"
    )
    table = Table("way", title=title, title_justify="left")
    for column in ("total s", "capture and check s", "the rest s", "ours / it", "ours in all / it", "difference"):
        table.add_column(column, justify="right")
    table.add_column("ours may take")
    ours = _medians(starts[OURS])
    for way, found in starts.items():
        times = _medians(found)
        row = [f"{times[name]:.2f}" for name in ("total_s", "capture_s", "compile_s")]
        ratio, most = ours["compile_s"] / times["total_s"], MOST.get(way)
        compared = ["", ""] if most is None else [f"{ratio:.3f}", f"{ours['total_s'] / times['total_s']:.3f}"]
        met = "" if most is None else f"{most:g}: {'met' if ratio <= most else 'NOT MET'}"
        table.add_row(way, *row, *compared, f"{times['difference']:.1e}", met)
    return table


def _processor_time(alone: dict[int, list[float]], together: dict[int, list[float]]) -> Table:
    title = (
        "measured: seconds of processor time in which structures are compiled and loaded, children included, medians"
    )
    table = Table("plan", title=title, title_justify="left")
    for column in ("rank 0 alone s", "all ranks together s", "ratio"):
        table.add_column(column, justify="right")
    table.add_column("they may take")
    for count in alone:
        most = MOST_PROCESSOR_TIME[count]
        one, all_ranks = statistics.median(alone[count]), statistics.median(together[count])
        met = "met" if all_ranks <= most * one else "NOT MET"
        table.add_row(f"ulysses {count}", f"{one:.2f}", f"{all_ranks:.2f}", f"{all_ranks / one:.3f}", f"{most}: {met}")
    return table


def _medians(found: list[dict[str, float]]) -> dict[str, float]:
    return {name: statistics.median(each[name] for each in found) for name in found[0]}


if __name__ == "__main__":
    main()
