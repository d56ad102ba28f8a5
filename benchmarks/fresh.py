"""Calls a function in processes that were just started, once in each, and gives what it returned."""

from __future__ import annotations

import datetime
import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist
from processes import LIMIT_S


def in_new_processes(function: Callable[..., Any], count: int, *args: Any) -> list[Any]:
    """Call a function in `count` processes of one thread each that form a gloo group.

    Args:
        function: of a module, as processes are spawned; its first argument is a path of the process's own.

    Returns:
        What it returned, by rank.

    Raises:
        SystemExit: a process failed, with what it said.
    """
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="benchmark-") as scratch:
        pairs = [context.Pipe() for _ in range(count)]
        members = [
            context.Process(target=_serve, args=(theirs, rank, count, scratch, function, args), daemon=True)
            for rank, (_, theirs) in enumerate(pairs)
        ]
        for member, (_, theirs) in zip(members, pairs, strict=True):
            member.start()
            theirs.close()
        try:
            found = [_answer(rank, mine) for rank, (mine, _) in enumerate(pairs)]
            for member in members:
                member.join(LIMIT_S)
        finally:
            for member in members:
                member.kill()
    return found


def _serve(end: Connection, rank: int, count: int, scratch: str, function: Callable[..., Any], args: tuple) -> None:
    torch.set_num_threads(1)
    try:
        limit = datetime.timedelta(seconds=LIMIT_S)
        init = f"file://{scratch}/rendezvous"
        dist.init_process_group("gloo", init_method=init, rank=rank, world_size=count, timeout=limit)
        end.send((True, function(f"{scratch}/{rank}", *args)))
    except Exception:
        end.send((False, traceback.format_exc()))
        os._exit(1)
    dist.barrier()
    dist.destroy_process_group()


def _answer(rank: int, end: Connection) -> Any:
    if not end.poll(LIMIT_S):
        raise SystemExit(f"rank {rank} did not answer within {LIMIT_S:g} s")
    try:
        fine, answer = end.recv()
    except EOFError:
        raise SystemExit(f"rank {rank} ended without an answer") from None
    if not fine:
        raise SystemExit(f"rank {rank} failed:\n{answer}")
    return answer
