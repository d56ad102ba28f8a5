"""Ranks that differ, that hang up, that say nothing, as the front sees them: real connections, answered by threads."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from multiprocessing import Pipe
from multiprocessing.connection import Connection

import pytest

from xdit_compile.serving.queue.gang import Gang
from xdit_compile.serving.queue.members import GangLost, Member
from xdit_compile.serving.queue.messages import Lost, Ready, Report, Told, Turn

TURN = Turn(run=("a", "b"))


@contextlib.contextmanager
def gang(answer: Callable[[int, Connection], None], turn_s: float = 20) -> Iterator[Gang]:
    """Two ranks, each of which answers one turn by a function of its number and its connection."""
    pipes = [Pipe() for _ in range(2)]

    def run(rank: int) -> None:
        with contextlib.suppress(OSError, EOFError), pipes[rank][1] as connection:
            connection.recv()
            answer(rank, connection)

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(2)]
    for thread in threads:
        thread.start()
    members = [Member(rank, None, front) for rank, (front, _) in enumerate(pipes)]
    yield Gang(members, [Ready(rank, {}, 0.0) for rank in range(2)], turn_s)
    for front, _ in pipes:
        front.close()


def told(rank: int, **of_b: object) -> Report:
    return Report(rank, {"a": Told("waits", f"key {rank}", 3), "b": Told(**{"state": "done", "step": 4, **of_b})})


def test_ranks_that_agree_may_have_other_keys() -> None:
    with gang(lambda rank, connection: connection.send(told(rank))) as agreed:
        assert [report.rank for report in agreed.exchange(TURN)] == [0, 1]


@pytest.mark.parametrize(
    ("of_b", "said"),
    [
        ({"step": 5}, "ranks 0 and 1 differ over a request: it went another way"),
        ({"state": "failed", "error": "out of memory", "kind": "internal"}, "differ over a request: out of memory"),
    ],
)
def test_ranks_that_differ_are_lost(of_b: dict[str, object], said: str) -> None:
    ranks = gang(lambda rank, connection: connection.send(told(rank, **of_b if rank else {})))
    with ranks as differing, pytest.raises(GangLost, match=said):
        differing.exchange(TURN)


def test_a_rank_that_hangs_up_or_says_nothing_is_named() -> None:
    done = threading.Event()
    with gang(lambda rank, connection: None if rank else connection.send(told(rank))) as hung:
        with pytest.raises(GangLost, match="rank 1: it hung up"):
            hung.exchange(TURN)
        with pytest.raises(GangLost, match="rank 0: it hung up"):
            hung.look()
    with gang(lambda rank, connection: connection.send(told(rank)) if rank else done.wait(20), turn_s=0.1) as silent:
        with pytest.raises(GangLost, match="rank 0 did not end its turn in time"):
            silent.exchange(TURN)
        done.set()
    ranks = gang(lambda rank, connection: connection.send(Lost(rank, "no memory")))
    with ranks as lost, pytest.raises(GangLost, match="rank [01]: no memory"):
        lost.exchange(TURN)
