"""Ranks tell each other what they are about to do, and stop together where they differ.

All goes through the key-value store of the process group, never through a collective, which must not be entered before
all agree. What ranks do in step is counted in *events*; a rank that waits sees by the latest event of its peers when
they do something else. After a failure ranks go on in another *epoch*, in which nothing that was said before counts.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch.distributed as dist

from xdit_compile.errors import AgreementError, one_line

from .calls import Calls
from .liveness import Liveness, Look
from .mesh import Mesh
from .peers import LATE, NOTICE_SECONDS, SETTLE_SECONDS, Patience, Peers
from .sketch import Sketch, alike

POLL_SECONDS = 0.005
logger = logging.getLogger("xdit_compile")


class Agreement:
    """One rank's side of the talk.

    Args:
        name: sets this conversation apart from others in the same store; the same on every rank that takes part.
        rank: this process.
        members: the ranks that take part, in ascending order.
        timeout_s: seconds to wait for a rank before giving up.
    """

    def __init__(self, name: str, rank: int, members: Sequence[int], timeout_s: float):
        self._name = f"xdit_compile/{name}"
        self.rank = rank
        self._members = list(members)
        self._timeout = timeout_s
        self.epoch = 0
        self._calls = Calls(rank)
        self._starts = self._talks = 0
        self._at = (0, "")
        self._heard = self._ending = False
        self._store = dist.distributed_c10d._get_default_store() if len(members) > 1 else None
        self._life = None if self._store is None else Liveness(self._store, self._name, rank)
        self._peers = None if self._life is None else Peers(self._life, self._name, rank, timeout_s)

    @classmethod
    def over(cls, mesh: Mesh, timeout_s: float) -> Agreement:
        """A new conversation among all ranks of a mesh; all must start theirs in the same order."""
        members = list(range(mesh.world_size))
        if len(members) == 1:
            return cls("alone", mesh.rank, members, timeout_s)
        count = dist.distributed_c10d._get_default_store().add(f"xdit_compile/conversations/{mesh.rank}", 1)
        return cls(str(count), mesh.rank, members, timeout_s)

    @property
    def alone(self) -> bool:
        """Whether there is nobody to agree with."""
        return self._store is None

    @property
    def _seen(self) -> Peers:
        assert self._peers is not None
        return self._peers

    @property
    def _others(self) -> list[int]:
        return [rank for rank in self._members if rank != self.rank]

    @property
    def at(self) -> tuple[int, str]:
        """The latest event of this rank: its number, and what it is."""
        return self._at

    @property
    def _said(self) -> str:
        return self._at[1]

    def close(self) -> None:
        """End the talk; others see that this rank takes part no more."""
        if self._life is not None:
            self._life.close()

    # ---- calls, announced and compared

    def announce_call(self, what: str, sketches: Sequence[Sketch]) -> None:
        """Say which call this rank enters now and what it is given, without waiting for anybody.

        What a peer said of calls before this one is compared: if neighbours agree, all do.

        Raises:
            AgreementError: a peer made another call, or the same one with other inputs.
        """
        if self._store is None:
            return
        self._calls.add(what, sketches)
        self._say(f"call {self._calls.made} of {what}")
        if self._heard and self._life is not None:
            key = self._key("at", self._next)
            answer = self._life.answer()
            answer = self._store.get(key) if self._calls.behind else answer
            if answer is not None and (position := json.loads(answer))["count"] == self._count:
                self._compare({position["rank"]: position["calls"]})
            self._life.ask(key)

    def confirm_call(self) -> None:
        """See to it that all ranks made the latest call with the same inputs, before its result is used.

        Raises:
            AgreementError: one did not, failed, or did not come in time.
        """
        begin = time.monotonic()
        if self._store is not None and self._calls.settle(self.calls):
            self._publish()
        for rank in self._others if self._calls.made else ():
            patience = Patience(self._seen, rank, self._timeout)
            while (position := self._seen.position(rank)) is None or not self._has_made(position):
                if time.monotonic() - begin > 10 * POLL_SECONDS:
                    self.look([rank])
                    self._seen.refuse_other_way(rank, position, self.epoch, self._at)
                if patience.is_over():
                    raise AgreementError(f"rank {rank} did not make {self._said} in {self._timeout:.0f} s; {LATE}")
                time.sleep(POLL_SECONDS / 10)
            if position["count"] == self._count:
                self._compare({rank: position["calls"]})

    def _has_made(self, position: Mapping[str, Any]) -> bool:
        ahead = position["count"] > self._count
        return ahead or (position["count"] == self._count and self._calls.are_made(position["calls"]))

    @property
    def calls(self) -> int:
        """Calls since `start`."""
        return self._calls.made

    @property
    def _next(self) -> int:
        """The peer whose calls this rank reads while they go on."""
        return self._members[(self._members.index(self.rank) + 1) % len(self._members)]

    def _compare(self, calls: Mapping[int, Mapping[str, Sequence[str]]]) -> None:
        """Compare the latest calls of peers, as far as they have come, with this rank's."""
        for rank, theirs in calls.items():
            self._calls.compare(rank, theirs)
        if self._next in calls:
            self._calls.compared(calls[self._next])

    # ---- talks, in which ranks wait for one another

    def agree(self, stage: str, facts: Mapping[str, str]) -> None:
        """Return once every peer has come to this stage with equal facts.

        Raises:
            AgreementError: naming the ranks and the facts that differ, a rank that failed, or one that did not come.
        """
        self.require_equal(self.exchange(stage, dict(facts)), facts)

    def require_equal(self, said: Mapping[int, Mapping[str, str]], facts: Mapping[str, str]) -> None:
        """Compare what others said of some facts with what this rank says.

        Raises:
            AgreementError: naming the first rank that differs, and in what.
        """
        for rank, other in sorted(said.items()):
            differing = [name for name in {**facts, **other} if facts.get(name) != other.get(name)]
            if differing:
                raise self.called_otherwise(rank, " and another ".join(differing))

    def called_otherwise(self, rank: int, what: str) -> AgreementError:
        """What to raise where a rank was called with something else than this one."""
        return AgreementError(
            f"rank {rank} was called with another {what} than rank {self.rank}; "
            "give every rank the same plan, the same inputs and the same seed"
        )

    def any(self, stage: str, mine: bool) -> bool:
        """Whether something holds on any rank."""
        return any([mine, *self.exchange(stage, mine).values()])

    def share(self, value: bytes | None) -> bytes:
        """The first peer's bytes on every rank."""
        first = self._members[0]
        said = self.exchange("share", value.hex() if self.rank == first and value is not None else None)
        return bytes.fromhex(said[first]) if first in said else value or b""

    @property
    def leads(self) -> bool:
        """Whether this rank has the say in the order of requests."""
        return self._store is None or self.rank == self._members[0]

    def lead(self, turn: int, request: str) -> None:
        """Say which request this rank takes next."""
        if self._store is not None:
            self._store.set(self._key(f"{self.epoch}/turn{turn}", self.rank), request)
            if turn:
                self._store.delete_key(self._key(f"{self.epoch}/turn{turn - 1}", self.rank))

    def led(self, turn: int) -> str:
        """Which request the first rank takes, once it is known; raises as `exchange` does."""
        first = self._members[0]
        return self._wait(self._key(f"{self.epoch}/turn{turn}", first), first, "the start").decode()

    def exchange(self, stage: str, mine: Any) -> dict[int, Any]:
        """What every other rank says at this stage.

        Raises:
            AgreementError: a rank failed, does something else, or did not come in time.
        """
        if self._store is None:
            return {}
        self._talks += 1
        self._say(stage)
        topic = f"{self.epoch}/talk{self._talks}"
        self._store.set(self._key(topic, self.rank), json.dumps({"stage": stage, "said": mine}))
        said_by_rank = {}
        for rank in self._others:
            theirs = json.loads(self._wait(self._key(topic, rank), rank, stage))
            if theirs["stage"] != stage:
                raise self._seen.other_way(rank, theirs["stage"], stage)
            said_by_rank[rank] = theirs["said"]
        self._heard = True
        if self._talks > 2:
            self._store.delete_key(self._key(f"{self.epoch}/talk{self._talks - 2}", self.rank))
        return said_by_rank

    def _wait(self, key: str, rank: int, stage: str) -> bytes:
        assert self._store is not None
        begin = time.monotonic()
        patience = Patience(self._seen, rank, self._timeout, stage, f"{self.epoch}/{self._at[0]}")
        pause = POLL_SECONDS / 10
        while not self._store.check([key]):
            if time.monotonic() - begin > 10 * POLL_SECONDS:
                self.look([rank])
                position = self._seen.position(rank)
                if self._store.check([key]):
                    break
                self._seen.refuse_other_way(rank, position, self.epoch, self._at, stage)
            if patience.is_over():
                raise AgreementError(
                    f"rank {rank} did not answer within {self._timeout:.0f} s and {self._seen.where(rank)}; {LATE}"
                )
            time.sleep(pause)
            pause = min(2 * pause, 4 * POLL_SECONDS)
        return self._store.get(key)

    def pulse(self, what: str, waited: float) -> None:
        """To be called now and then while this rank waits in a transfer.

        Raises:
            AgreementError: a peer failed, has ended, or is not on its way to the same transfer.
        """
        counted = self.refuse_vain(self._seen)
        if self._next in counted:
            self._calls.compared(counted[self._next]["calls"])
        if waited > self._timeout:
            self._seen.refuse_late(self._others, (self.epoch, self._at[0]), f"{what} of {self._said}")
        if waited > NOTICE_SECONDS and int(waited) % int(6 * NOTICE_SECONDS) == int(NOTICE_SECONDS):
            others = "; ".join(f"rank {rank} {self._seen.where(rank)}" for rank in self._others)
            logger.info("rank %d waits in %s of %s: %s", self.rank, what, self._said, others)

    def do(self, what: str = "", busy: bool = False) -> None:
        """Tell the others what this rank does, where others wait for it as long as it runs if that is ``busy``."""
        if self._life is not None:
            self._life.do(what, busy)

    def watch(self, look: Look | None) -> None:
        """Have another thread look now and then, through its own connection, whether this one waits in vain."""
        if self._life is not None:
            self._life.watch(look)

    def through(self, store: dist.Store) -> Peers:
        """The other ranks as another thread sees them through its connection, for `refuse_vain`."""
        return self._seen.through(store)

    def refuse_vain(self, peers: Peers, still: bool = True) -> dict[int, dict[str, Any]]:
        """See whether waiting for other ranks is in vain; returns where those are that are in the same request.

        Args:
            still: this rank stays where it is: then a peer at the same event must be there, too.

        Raises:
            AgreementError: a peer failed or stopped; where ``still``, it goes another way or made another call.
        """
        self._look(peers, self._others)
        positions = {rank: position for rank in self._others if still and (position := peers.position(rank))}
        for rank, position in positions.items():
            peers.refuse_other_way(rank, position, self.epoch, self._at)
        counted = {rank: position for rank, position in positions.items() if position["count"] == self._count}
        for rank, position in counted.items():
            self._calls.compare(rank, position["calls"])
        return counted

    def look(self, ranks: Sequence[int]) -> None:
        """See whether waiting for some ranks is in vain.

        Raises:
            AgreementError: a rank failed in this epoch, or one of ``ranks`` gives no sign of life.
        """
        if self._peers is not None:
            self._look(self._peers, ranks)

    def _look(self, peers: Peers, ranks: Sequence[int]) -> None:
        found = peers.failure(self.epoch) or peers.stopped(ranks)
        if found is not None:
            raise AgreementError(found)

    # ---- failures

    def fail(self, error: BaseException, cause: str | None) -> None:
        """Tell the others that this rank goes no further in this epoch, and what stopped it; the first one counts."""
        if self._store is None or self._store.check([self._failed]):
            return
        if cause is None:
            prefix = "" if isinstance(error, AgreementError) else f"rank {self.rank} failed: {type(error).__name__}: "
            cause = prefix + one_line(error)
        self._store.set(self._failed, json.dumps({"rank": self.rank, "why": cause, "at": [self._ending, self._starts]}))

    def all_failed_unused(self) -> bool:
        """Whether all ranks failed before they reached one another, as all do at an argument that is wrong."""
        assert self._store is not None
        self._store.set(self._key(f"{self.epoch}/unused", self.rank), "yes")
        keys = [self._key(f"{self.epoch}/unused", rank) for rank in self._members]
        end = time.monotonic() + SETTLE_SECONDS / 2
        while not self._store.check(keys):
            if time.monotonic() > end or any("call" in self._seen.where(rank) for rank in self._others):
                return False
            time.sleep(POLL_SECONDS)
        return True

    def blame(self) -> str | None:
        """What stopped a transfer of this rank, once it is known: which rank failed and why, or which gives no sign."""
        return None if self._peers is None else self._peers.blame(self.epoch, self._others)

    def failure(self, ended: bool = False) -> str | None:
        """Which rank failed in this epoch and why, where another did; ``ended``: at the end of what is over here."""
        if self._peers is None:
            return None
        return self._peers.failure(self.epoch, [True, self._starts] if ended else None)

    def renew(self) -> None:
        """Go on in another epoch; what was said in this one is forgotten."""
        self.epoch += 1
        self._starts = self._talks = 0
        self._at = (0, "")
        if self._life is not None:
            self._life.forget()
        self.start()

    def start(self) -> None:
        """Count calls from the first again."""
        self._starts += 1
        self._ending = False
        self._calls.restart()

    @property
    def _count(self) -> list[int]:
        """From where calls are counted: the numbers of other requests are others."""
        return [self.epoch, self._starts]

    @property
    def _failed(self) -> str:
        return f"{self._name}/{self.epoch}/failed"

    def finish(self, results: Sequence[Any] = ()) -> None:
        """See to it that all peers made the calls that this rank made since `start`, with the same inputs.

        Args:
            results: sketches of what the calls came to, which must be alike as well.

        Raises:
            AgreementError: they did not.
        """
        if self._store is None:
            return
        self._calls.settle(self.calls)
        mine = {"made": self.calls, "calls": self._calls.said(), "results": list(results)}
        self._ending = True
        said = self.exchange("the end", mine)
        for rank, theirs in said.items():
            if theirs["made"] != self.calls:
                raise AgreementError(
                    f"rank {rank} made {theirs['made']} calls where rank {self.rank} made {self.calls}; "
                    "stop or go on on every rank alike"
                )
        self._compare({rank: theirs["calls"] for rank, theirs in said.items()})
        for rank, theirs in said.items():
            if len(theirs["results"]) != len(results) or not all(map(alike, results, theirs["results"])):
                raise AgreementError(
                    f"rank {rank} came to another result than rank {self.rank} by the same calls: a callback or a "
                    "scheduler does something else on one of them; let it do the same on all"
                )
        if (failed := self.failure(ended=True)) is not None:
            raise AgreementError(failed)
        self._ending = False

    # ---- where ranks are

    def _say(self, what: str) -> None:
        self._at = (self._at[0] + 1, what)
        self._publish()

    def _publish(self) -> None:
        assert self._store is not None
        position = {
            "rank": self.rank, "epoch": self.epoch, "count": self._count, "event": self._at[0], "said": self._said,
            "calls": self._calls.said(),
        }  # fmt: skip
        self._store.set(self._key("at", self.rank), json.dumps(position))

    def _key(self, topic: str, rank: int) -> str:
        return f"{self._name}/{topic}/{rank}"
