"""Milliseconds that one known call keeps the host busy, by part, beside the module itself and diffusers' parallelism.

The modules have all blocks of published models and layers so narrow that kernels take microseconds, in fp32 on the CPU:
what is left is what the host does, wherever the kernels run. Counted is the processor time of the calling thread, so
that neither what else the machine does nor waiting for a peer is in it; kernels of the CPU are. Two processes have a
gloo group and really exchange. Latents and time are new tensors in every call, as a scheduler makes them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import gc
import json
import multiprocessing
import os
import pathlib
import random
import socket
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from importlib.metadata import version
from multiprocessing.connection import Connection
from typing import Any
from unittest import mock

import click
import torch
import torch.distributed as dist
from contenders import native
from rich.console import Console
from rich.table import Table
from topologies import TOPOLOGIES, Inputs, Topology
from torch._inductor.output_code import CompiledFxGraph
from torch.utils._python_dispatch import TorchDispatchMode

from xdit_compile import Plan, generation, parallelize
from xdit_compile.api import runner_of
from xdit_compile.kernels.collectives import all_gather, all_reduce, all_to_all, halo
from xdit_compile.runtime import runner as runtime
from xdit_compile.runtime.session import Session
from xdit_compile.runtime.shared_inputs import SharedInputs

LIMIT_S = 900
TOLERANCE = 2e-5
REFERENCE = "the module as it is"
PARTS: dict[str, list[tuple[Any, str]]] = {
    "signature": [(runtime.Runner, "_watched"), (runtime, "signature")],
    "guards": [(runtime.CompiledCall, "fits")],
    "binding": [(runtime, "bind")],
    "agreeing": [(Session, "announce"), (SharedInputs, "known")],
    "collectives": [
        (module, name)
        for module in (all_gather, all_reduce, all_to_all, halo)
        for name in ("process_group", "complete", "hold", "settle")
        if hasattr(module, name)
    ],
    "kernels": [(CompiledFxGraph, "__call__")],
}
"""The functions whose time a part is. Kernels are inductor's code without the collectives in it."""
COLUMNS = ("signature", "guards", "binding", "dispatch", "kernels", "collectives", "agreeing", "the rest")
READING = {getattr(torch.ops.aten, name).default for name in ("_local_scalar_dense", "equal", "is_nonzero")}


@dataclasses.dataclass
class Found:
    """What one process found of a contender; milliseconds, one number a round."""

    name: str
    failure: str = ""
    first_call_s: float = 0.0
    difference: float = 0.0
    reads: int = 0
    host_ms: list[float] = dataclasses.field(default_factory=list)
    wall_ms: list[float] = dataclasses.field(default_factory=list)
    parts: dict[str, list[float]] = dataclasses.field(default_factory=dict)

    def ratio(self, to: Found) -> float:
        """Median of the ratios round by round."""
        return statistics.median(a / b for a, b in zip(self.host_ms, to.host_ms, strict=True))


def contenders(world: int, backend: str) -> dict[str, Callable[[Any], Any]]:
    """What takes turns on so many processes, each from a module of its own."""
    found: dict[str, Callable[[Any], Any]] = {REFERENCE: lambda module: module}
    if world == 1:
        for each in dict.fromkeys(("eager", backend)):
            found[f"xdit_compile, {each}"] = lambda module, each=each: parallelize(module, Plan(backend=each))
        return found
    plan = Plan(ulysses=world, backend=backend)
    found[f"xdit_compile, ulysses {world}, {backend}"] = lambda module: parallelize(module, plan)
    found[f"diffusers, ulysses {world}"] = lambda module: native(module, "ulysses")
    return found


class Reads(TorchDispatchMode):
    """Counts the operators by which the host reads values of tensors."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in READING
        return func(*args, **(kwargs or {}))


class Timer:
    """Adds up the processor time of this thread that functions take, without what others inside of them take."""

    def __init__(self) -> None:
        self.ms: dict[str, float] = {}
        self._inside = [0.0]

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self._inside.append(0.0)
            begin = time.thread_time()
            try:
                return function(*args, **kwargs)
            finally:
                taken = 1e3 * (time.thread_time() - begin)
                self.ms[part] = self.ms.get(part, 0.0) + taken - self._inside.pop()
                self._inside[-1] += taken

        return call

    @contextlib.contextmanager
    def installed(self, prepared: Any) -> Iterator[None]:
        """Time the parts of a call that runs what was prepared."""
        with contextlib.ExitStack() as stack:
            for part, functions in PARTS.items():
                for owner, name in functions:
                    own = self.timed(part, getattr(owner, name))
                    stack.enter_context(mock.patch.object(owner, name, _function(own)))
            own_run = prepared.run
            object.__setattr__(prepared, "run", self.timed("dispatch", own_run))
            try:
                yield
            finally:
                object.__setattr__(prepared, "run", own_run)


def _function(call: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **kwargs: call(*args, **kwargs)


class Turns:
    """The contenders of one process."""

    def __init__(self, topology: Topology, world: int, backend: str):
        self._topology, self._together = topology, world > 1
        torch.manual_seed(1)
        self._inputs: Inputs = topology.inputs()
        self._modules: dict[str, Any] = {}
        self.found = {name: Found(name) for name in contenders(world, backend)}
        self._open = contextlib.ExitStack()
        for name, make in contenders(world, backend).items():
            self._prepare(self.found[name], make)

    def _prepare(self, entry: Found, make: Callable[[Any], Any]) -> None:
        begin = time.perf_counter()
        try:
            module = self._modules[entry.name] = make(self._topology.build())
            if runner_of(module) is not None:
                self._open.enter_context(generation(module))
            result = self._call(entry.name)
        except Exception as error:
            if os.environ.get("BENCHMARK_DEBUG"):
                traceback.print_exc()
            entry.failure = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            return
        entry.first_call_s = time.perf_counter() - begin
        expected = self._call(REFERENCE)
        entry.difference = ((result - expected).abs().max() / expected.abs().max()).item()
        for _ in range(3):
            self._call(entry.name)
        with Reads() as reads:
            self._call(entry.name)
        entry.reads = reads.count

    @torch.no_grad()
    def _call(self, name: str) -> torch.Tensor:
        return self._modules[name](**self._topology.step(self._inputs))[0]

    def measure(self, rounds: int) -> list[Found]:
        """All take a call in every round, and those that are ours another one that is timed by part."""
        order, names = random.Random(0), [each.name for each in self.found.values() if not each.failure]
        gc.disable()
        for _ in range(rounds):
            order.shuffle(names)
            for name in names:
                self._once(self.found[name])
            gc.collect()
        gc.enable()
        self._open.close()
        return list(self.found.values())

    def _once(self, entry: Found) -> None:
        if self._together:
            dist.barrier()
        begin, wall = time.thread_time(), time.perf_counter()
        self._call(entry.name)
        entry.wall_ms.append(1e3 * (time.perf_counter() - wall))
        entry.host_ms.append(1e3 * (time.thread_time() - begin))
        runner = runner_of(self._modules[entry.name])
        if runner is not None:
            timer = Timer()
            with timer.installed(runner.calls.latest):
                timer.timed("the rest", lambda: self._call(entry.name))()
            for part in COLUMNS:
                entry.parts.setdefault(part, []).append(timer.ms.get(part, 0.0))


def work(model: str, rank: int, world: int, port: int, backend: str, rounds: int, end: Connection) -> None:
    """What one process does."""
    torch.set_num_threads(1)
    if world > 1:
        address, limit = f"tcp://127.0.0.1:{port}", datetime.timedelta(seconds=LIMIT_S)
        dist.init_process_group("gloo", init_method=address, rank=rank, world_size=world, timeout=limit)
    turns = Turns(TOPOLOGIES[model], world, backend)
    wrong = [each for each in turns.found.values() if not each.difference <= TOLERANCE]
    if wrong:
        raise SystemExit(f"{wrong[0].name} is off the module by {wrong[0].difference:.1e}; nothing was timed")
    end.send(turns.measure(rounds))
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()


def on_processes(model: str, world: int, backend: str, rounds: int) -> list[Found]:
    """What the first of so many processes found.

    Raises:
        SystemExit: it ended before it found anything, as it does where a contender computes something else.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    pipes = [context.Pipe() for _ in range(world)]
    ranks = [
        context.Process(target=work, args=(model, rank, world, port, backend, rounds, theirs))
        for rank, (_, theirs) in enumerate(pipes)
    ]
    for each in ranks:
        each.start()
    for _, theirs in pipes:
        theirs.close()
    if not pipes[0][0].poll(LIMIT_S):
        raise SystemExit(f"{model} on {world} processes took more than {LIMIT_S} s")
    try:
        found: list[Found] = pipes[0][0].recv()
    except EOFError:
        raise SystemExit(f"{model} on {world} processes: the first ended, see above") from None
    for each in ranks:
        each.join(60)
    return found


def table_of(model: str, found: dict[int, list[Found]], rounds: int, load: float) -> Table:
    """One row a contender."""
    title = (
        f"{model}, {TOPOLOGIES[model].about}, narrow, fp32, CPU: median ms of the calling thread in a known call; "
        f"{rounds} rounds; load average {load:.1f} on {os.cpu_count()} cores"
    )
    table = Table("processes", "contender", title=title, title_justify="left")
    for column in ("host ms", "ratio", *COLUMNS, "reads", "difference"):
        table.add_column(column, justify="right")
    for world, entries in found.items():
        for entry in entries:
            if entry.failure:
                continue
            parts = [f"{statistics.median(entry.parts[part]):.2f}" if entry.parts else "" for part in COLUMNS]
            cells = [f"{statistics.median(entry.host_ms):.2f}", f"{entry.ratio(entries[0]):.3f}", *parts]
            table.add_row(str(world), entry.name, *cells, str(entry.reads), f"{entry.difference:.1e}")
    return table


@click.command()
@click.option("--model", "models", type=click.Choice(list(TOPOLOGIES)), multiple=True, default=list(TOPOLOGIES))
@click.option("--backend", type=click.Choice(["inductor", "eager"]), default="inductor", show_default=True)
@click.option("--world", "worlds", type=click.IntRange(1, 2), multiple=True, default=(1, 2), show_default=True)
@click.option("--rounds", default=30, show_default=True, help="Calls of each contender; all take one in each round.")
@click.option("--json", "json_file", type=click.Path(path_type=pathlib.Path), help="Write everything measured here.")
def main(
    models: tuple[str, ...], backend: str, worlds: tuple[int, ...], rounds: int, json_file: pathlib.Path | None
) -> None:
    """Measure what a known call costs the host."""
    console, kept = Console(width=200), {}
    for model in models:
        found = {world: on_processes(model, world, backend, rounds) for world in worlds}
        console.print(table_of(model, found, rounds, os.getloadavg()[0]))
        for entry in (each for entries in found.values() for each in entries if each.failure):
            console.print(f"not measured: {entry.name}: {entry.failure}", markup=False, highlight=False)
        kept[model] = {world: [dataclasses.asdict(each) for each in entries] for world, entries in found.items()}
    if json_file is not None:
        about = {"date": datetime.date.today().isoformat(), "load_average": os.getloadavg(), "cores": os.cpu_count()}
        versions = {name: version(name) for name in ("torch", "diffusers")}
        json_file.write_text(json.dumps({**about, "versions": versions, "models": kept}, indent=1) + "\n")


if __name__ == "__main__":
    main()
