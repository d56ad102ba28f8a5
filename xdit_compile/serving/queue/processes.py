"""All ranks of a server: started, arranged in gangs, and ended together."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Sequence
from multiprocessing import connection as pipes

from .arrangements import Arrangement
from .gang import Gang
from .members import LOOK_S, GangLost, Member, answers
from .messages import Hello, Ready, Regroup
from .starters import Child, Starter, free_port

TURN_S = 3600.0
"""A turn that compiles may take long; what stands still is seen by the ranks themselves after the plan's timeout_s."""


class Processes:
    """All ranks.

    Args:
        starter: makes them.
        arrangement: in which they start: one gang.
        start_s: they have to be ready within so many seconds.

    Attributes:
        may_restart: whether they can be had once more.
        arrangement: of the gangs that there are.
        gangs: that take turns, each by itself.
    """

    def __init__(self, starter: Starter, arrangement: Arrangement, start_s: float):
        self.arrangement, self.may_restart = arrangement, starter.may_restart
        self.gangs: list[Gang] = []
        self._starter, self._start_s = starter, start_s
        self._children: list[Child] = []
        self._members: list[Member] = []
        self._ending = threading.Lock()

    def start(self) -> None:
        """Start the processes and wait until all have loaded the pipeline.

        Raises:
            GangLost: one ended before, or was not ready in time.
        """
        limit = time.monotonic() + self._start_s
        key = secrets.token_bytes(32)
        ranks, host = self.arrangement.ranks, self._starter.host
        with pipes.Listener(("127.0.0.1" if host is None else "", 0), backlog=ranks, authkey=key) as listener:
            front = {"address": (host or "127.0.0.1", listener.address[1]), "key": key.hex()}
            self._children.extend(self._starter.start(ranks, front))
            self._members = self._accepted(listener, limit)
        self._have_gangs(1, limit)

    def regroup(self, arrangement: Arrangement) -> None:
        """Arrange ranks that have nothing to do in other gangs, with the weights that they have.

        Raises:
            GangLost: one could not.
        """
        size = arrangement.plan.world_size
        for start in range(0, len(self._members), size):
            port = free_port()
            for rank, member in enumerate(self._members[start : start + size]):
                member.send(Regroup(arrangement.name, rank, size, port))
        self._have_gangs(arrangement.gangs, time.monotonic() + self._start_s)
        self.arrangement = arrangement

    def end(self) -> None:
        """Have the processes end, and see that nothing of them is left."""
        with self._ending:
            for member in self._members:
                member.connection.close()
            limit = time.monotonic() + 3
            while time.monotonic() < limit and any(child.ended() is None for child in self._children):
                time.sleep(0.02)
            self.kill()
            for child in self._children:
                child.wait()
            self._starter.close()

    def kill(self) -> None:
        """End the processes at once, whatever they do."""
        for child in self._children:
            child.kill()

    def _have_gangs(self, count: int, limit: float) -> None:
        ready = answers(self._members, Ready, lambda: time.monotonic() < limit, "was not ready")
        size = len(self._members) // count
        starts = range(0, len(self._members), size)
        self.gangs = [Gang(self._members[at : at + size], ready[at : at + size], TURN_S) for at in starts]

    def _accepted(self, listener: pipes.Listener, limit: float) -> list[Member]:
        """Every rank, once it has come, in their order."""
        come: dict[int, Member] = {}
        listening = vars(vars(listener)["_listener"])["_socket"]
        listening.settimeout(LOOK_S)
        children = dict(enumerate(self._children))
        while len(come) < self.arrangement.ranks:
            try:
                connection = listener.accept()
                hello: Hello = connection.recv()
                come[hello.rank] = Member(hello.rank, children.get(hello.rank), connection)
            except TimeoutError:
                _refuse_ended(self._children)
                if time.monotonic() > limit:
                    raise GangLost(f"the ranks did not start within {self._start_s:.0f} s") from None
            except EOFError:
                time.sleep(LOOK_S)
                _refuse_ended(self._children)
        return [come[rank] for rank in sorted(come)]


def _refuse_ended(children: Sequence[Child]) -> None:
    for rank, child in enumerate(children):
        if (how := child.ended()) is not None:
            raise GangLost(f"rank {rank} {how}")
