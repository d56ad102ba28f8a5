"""Run a function in N gloo processes, with a limit on how long they may take."""

from __future__ import annotations

import contextlib
import datetime
import functools
import multiprocessing
import os
import pathlib
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from typing import Any

import torch
import torch.distributed as dist

from xdit_compile import Plan
from xdit_compile.distributed.mesh import Mesh, connect
from xdit_compile.kernels.collectives.process_groups import RUNNING, Groups

GRACE_S = 5.0
PRELOADED = ["torch", "torch.distributed", "diffusers", "diffusers.models.transformers", "xdit_compile.api"]
"""Imported once by the server that children are forked from; it never computes, so it has no threads to lose."""


class RankFailed(AssertionError):
    """A rank raised, died or did not finish; ``errors`` maps each failed rank to what it said."""

    def __init__(self, message: str, errors: dict[int, str]):
        super().__init__(message)
        self.errors = errors


def run(
    fn: Callable[..., Any], world_size: int, *args: Any, timeout: float = 120, method: str = "forkserver"
) -> list[Any]:
    """Call ``fn(rank, *args)`` on ``world_size`` processes of one gloo group and return the results by rank.

    ``fn`` and ``args`` must be picklable (``fn`` at the top of a test module). Every process has one thread, and
    collectives wait at most ``timeout`` seconds. With ``method="spawn"`` every process starts from nothing, which CUDA
    needs.

    Raises:
        RankFailed: with the traceback of every rank that raised, or what became of those that did not answer.
    """
    with tempfile.TemporaryDirectory(prefix="procs-") as folder, _one_thread():
        context = multiprocessing.get_context(method)
        if method == "forkserver":
            context.set_forkserver_preload(PRELOADED)
        processes = [
            context.Process(target=_child, args=(fn, rank, world_size, folder, timeout, args), daemon=True)
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        try:
            _wait(processes, timeout)
        finally:
            late = _stop(processes)
        return _results(pathlib.Path(folder), processes, late, timeout)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before


def _child(fn: Callable[..., Any], rank: int, world_size: int, folder: str, timeout: float, args: tuple) -> None:
    torch.set_num_threads(1)
    limit = datetime.timedelta(seconds=timeout)
    try:
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size, timeout=limit
        )
        outcome = (True, fn(rank, *args))
    except BaseException:  # noqa: BLE001 - whatever it was, the parent reports it
        outcome = (False, traceback.format_exc())
    unfinished = pathlib.Path(folder, f"{rank}.unfinished")
    unfinished.write_bytes(pickle.dumps(outcome))
    unfinished.rename(pathlib.Path(folder, f"{rank}.pickle"))
    if not outcome[0]:
        os._exit(1)
    _leave()


def _leave() -> None:
    """Together, since one that closes its connections early can fail a peer whose last send has not settled."""
    if dist.is_initialized():
        with contextlib.suppress(RuntimeError):
            dist.barrier()
        dist.destroy_process_group()


def connected(plan: Plan, timeout: float = 60) -> Mesh:
    """The mesh of a plan over this process's group, with connections that ops find for the rest of its life."""
    mesh = Mesh.from_process_group(plan)
    groups = Groups(functools.partial(connect, mesh, datetime.timedelta(seconds=timeout)))
    groups.open()
    RUNNING.set(groups)
    return mesh


def _wait(processes: list[BaseProcess], timeout: float) -> None:
    """Until all have ended, time is up, or a failed one has left the others without an answer for a while."""
    end = time.monotonic() + timeout
    failed = False
    while time.monotonic() < end and any(process.is_alive() for process in processes):
        if not failed and any(process.exitcode for process in processes):
            failed, end = True, min(end, time.monotonic() + GRACE_S)
        time.sleep(0.02)


def _stop(processes: list[BaseProcess]) -> set[int]:
    late = {rank for rank, process in enumerate(processes) if process.is_alive()}
    for process in processes:
        if process.is_alive():
            process.kill()
        process.join()
    return late


def _results(folder: pathlib.Path, processes: list[BaseProcess], late: set[int], timeout: float) -> list[Any]:
    results, errors = [], {}
    for rank, process in enumerate(processes):
        file = folder / f"{rank}.pickle"
        fine, value = pickle.loads(file.read_bytes()) if file.exists() else (False, None)
        if fine:
            results.append(value)
        elif value is not None:
            errors[rank] = value
        elif rank in late:
            errors[rank] = f"did not finish within {timeout} s, or within {GRACE_S} s of another rank's failure"
        else:
            errors[rank] = f"ended with exit code {process.exitcode} and no result"
    if errors:
        raise RankFailed("\n".join(f"rank {rank}: {text}" for rank, text in errors.items()), errors)
    return results
