"""Processes of one thread each that build contenders and run steps on request, one request at a time."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Iterator, Mapping
from multiprocessing.connection import Connection
from typing import Any, Protocol

import torch
import torch.distributed as dist
from contenders import Contender, Steps, Stubs, suite
from resident import count_anew, give_back, greatest_resident, resident
from torch import nn
from torch.utils import _pytree as pytree

LIMIT_S = 900.0
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "DIFFUSERS_VERBOSITY": "error",
    "PYTHONWARNINGS": "ignore",
}


@dataclasses.dataclass(frozen=True)
class Setting:
    """What every process of a measurement shares."""

    size: Subject
    backend: str
    suite: str = "sequence"


class Subject(Protocol):
    """What is measured: a module, and the inputs of one call."""

    def build(self) -> nn.Module: ...
    def like(self, model: nn.Module) -> nn.Module: ...
    def inputs(self) -> dict[str, Any]: ...
    def title(self) -> str: ...


class Failed(RuntimeError):
    """A contender that cannot run here, with what it said."""


@dataclasses.dataclass(frozen=True)
class Step:
    """One step: seconds on the clock and seconds of processor time, each of the slowest process."""

    wall_s: float
    cpu_s: float


class Team:
    """``count`` processes that do the same thing at the same time; more than one form a gloo group."""

    def __init__(self, count: int, setting: Setting, environment: Mapping[str, str] | None = None):
        context = multiprocessing.get_context("spawn")
        self._folder = tempfile.TemporaryDirectory(prefix="benchmark-")
        pairs = [context.Pipe() for _ in range(count)]
        self._ends = [mine for mine, _ in pairs]
        self._members = [
            context.Process(target=_serve, args=(theirs, rank, count, self._folder.name, setting), daemon=True)
            for rank, (_, theirs) in enumerate(pairs)
        ]
        with _environment({**ENVIRONMENT, **(environment or {})}):
            for member in self._members:
                member.start()

    def prepare(self, name: str) -> tuple[Any, float]:
        """Build a contender and run its first call: its result on the first process, and the seconds that took."""
        answers = self._ask("prepare", name)
        return answers[0][0], max(seconds for _, seconds in answers)

    def step(self, name: str) -> Step:
        """One step of a contender that was prepared."""
        answers = self._ask("step", name)
        return Step(max(wall for wall, _ in answers), max(cpu for _, cpu in answers))

    def peak(self, name: str) -> int:
        """Bytes by which one step raises a process's memory above what it held before; the most of any process."""
        return max(self._ask("peak", name))

    def profile(self, name: str, rows: int) -> list[str]:
        """A table of where the time goes, for each process."""
        return self._ask("profile", name, rows)

    def spans(self, name: str) -> list[list[tuple[float, float]]]:
        """When each process computed something in the latest run of a contender that notes it, in seconds."""
        return self._ask("spans", name)

    def close(self) -> None:
        """End the processes."""
        for end, member in zip(self._ends, self._members, strict=True):
            if member.is_alive():
                end.send(("stop",))
        for member in self._members:
            member.join(10)
            if member.is_alive():
                member.kill()
        self._folder.cleanup()

    def _ask(self, *request: Any) -> list[Any]:
        for end in self._ends:
            end.send(request)
        limit = time.monotonic() + LIMIT_S
        answers = []
        for rank, end in enumerate(self._ends):
            if not end.poll(max(limit - time.monotonic(), 0.0)):
                raise TimeoutError(f"process {rank} did not answer {request} within {LIMIT_S:g} s")
            answers.append(end.recv())
        errors = [text for fine, text in answers if not fine]
        if errors:
            raise Failed(errors[0])
        return [value for _, value in answers]


@contextlib.contextmanager
def _environment(wanted: dict[str, str]) -> Iterator[None]:
    """Variables that processes started in the block inherit."""
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _serve(end: Connection, rank: int, count: int, folder: str, setting: Setting) -> None:
    torch.set_num_threads(1)
    if count > 1:
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=count,
            timeout=datetime.timedelta(seconds=LIMIT_S),
        )  # fmt: skip
    member = _Member(setting, count)
    while True:
        what, *rest = end.recv()
        if what == "stop":
            break
        try:
            end.send((True, getattr(member, what)(*rest)))
        except Exception as error:
            if os.environ.get("BENCHMARK_DEBUG"):
                traceback.print_exc()
            end.send((False, f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"))
    if count > 1:
        dist.barrier()
        dist.destroy_process_group()


class _Member:
    """One process's contenders."""

    def __init__(self, setting: Setting, count: int):
        self._setting = setting
        self._known = {entry.name: entry for entry in suite(setting.suite, setting.backend) if entry.processes == count}
        self._model = setting.size.build()
        self._inputs = setting.size.inputs()
        self._calls: dict[str, Any] = {}
        self._together = count > 1

    def prepare(self, name: str) -> tuple[Any, float]:
        entry = self._known[name]
        begin = time.perf_counter()
        if entry.same_as is None:
            self._calls[name] = entry.make(self._setting.size.like(self._model))
        else:
            self._calls[name] = self._calls[entry.same_as]
        self._run(entry)
        result = pytree.tree_leaves(self._run(entry, check=True))[0]
        return result.numpy(), time.perf_counter() - begin

    def step(self, name: str) -> tuple[float, float]:
        if self._together:
            dist.barrier()
        begin, begin_cpu = time.perf_counter(), time.thread_time()
        self._run(self._known[name])
        return time.perf_counter() - begin, time.thread_time() - begin_cpu

    def peak(self, name: str) -> int:
        give_back()
        count_anew()
        before = resident()
        self._run(self._known[name])
        return greatest_resident() - before

    def spans(self, name: str) -> list[tuple[float, float]]:
        return list(self._calls[name].timed.spans)

    def profile(self, name: str, rows: int) -> str:
        if self._together:
            dist.barrier()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as found:
            self._run(self._known[name])
        return found.key_averages(group_by_input_shape=True).table(
            sort_by="self_cpu_time_total", row_limit=rows, max_name_column_width=48, max_shapes_column_width=64
        )

    @torch.no_grad()
    def _run(self, entry: Contender, check: bool = False) -> Any:
        call = self._calls[entry.name]
        if not entry.stub:
            return call(**self._inputs)
        stubs = Stubs()
        with stubs.installed():
            result = call(**self._inputs)
        if check:
            _check_stubbed(call, stubs)
        return result


def _check_stubbed(module: Any, stubs: Stubs) -> None:
    """Every collective of the graph must have met its stub, or the ceiling is none; of steps some transfers."""
    from xdit_compile import explain

    if isinstance(module, Steps):
        if not stubs.calls:
            raise RuntimeError("no transfer was stubbed")
        return
    wanted = sum(item.count for item in explain(module).collectives)
    if stubs.calls != wanted:
        raise RuntimeError(f"{stubs.calls} collectives were stubbed where the graph has {wanted}")
