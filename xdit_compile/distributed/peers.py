"""What the other ranks of a conversation say of themselves in the store."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch.distributed as dist

from xdit_compile.errors import AgreementError

from .liveness import QUIET_SECONDS, Signs

SETTLE_SECONDS = 2.0
"""How long a broken transfer is given for its cause to be known."""
NOTICE_SECONDS = 5.0
"""After so long a rank that waits says for whom."""
LATE = (
    "was it stopped, or does it call something else? Look at what it printed, and start all processes again, with a "
    "greater timeout_s where it is only slow"
)
"""What to do about a rank that others waited for in vain."""
LOOK_AGAIN_SECONDS = 0.2
"""So often a rank that waits looks what the other does."""
logger = logging.getLogger("xdit_compile.peers")
details = logging.getLogger("xdit_compile")


class Peers:
    """The other ranks, as one thread sees them through its connection to the store.

    Args:
        signs: of life, with the connection that they and all else is read through.
        name: begins the keys; the same on every rank.
        rank: this process.
        timeout_s: seconds after which a silent rank has stopped.
    """

    def __init__(self, signs: Signs, name: str, rank: int, timeout_s: float):
        self._signs, self._store, self._name, self.rank, self._timeout = signs, signs.store, name, rank, timeout_s

    def through(self, store: dist.Store) -> Peers:
        """The same ranks seen through another connection, by another thread."""
        return Peers(Signs(store, self._name), self._name, self.rank, self._timeout)

    def position(self, rank: int) -> dict[str, Any] | None:
        """What a rank is at, if it said so yet."""
        key = f"{self._name}/at/{rank}"
        return json.loads(self._store.get(key)) if self._store.check([key]) else None

    def where(self, rank: int) -> str:
        """The same in words."""
        position, (does, _) = self.position(rank), self._signs.does(rank)
        if does:
            return f"was last seen {does}"
        return "has made no call yet" if position is None else f"was last seen at {position['said']}"

    def is_busy(self, rank: int) -> bool:
        """Whether a rank does what takes as long as it takes, such as compiling."""
        return self._signs.does(rank)[1]

    def failure(self, epoch: int, over: Sequence[Any] | None = None) -> str | None:
        """Which rank failed in an epoch and why, where another did.

        Args:
            over: count only what failed at the end of a request, and of this one.
        """
        key = f"{self._name}/{epoch}/failed"
        if not self._store.check([key]):
            return None
        said = json.loads(self._store.get(key))
        return None if said["rank"] == self.rank or over not in (None, said["at"]) else said["why"]

    def stopped(self, ranks: Sequence[int]) -> str | None:
        """Which of some ranks gives no sign of life, if one does not; one that gave none for a while is told of."""
        for rank in ranks:
            silence = self._signs.silence(rank)
            if silence > self._timeout:
                return self._stopped(rank, silence)
            if silence > QUIET_SECONDS and self._signs.first_to_tell(rank):
                logger.warning(
                    "rank %d gives no sign of life for %.0f s and %s; if it gives none, all ranks end in %.0f s",
                    rank, silence, self.where(rank), self._timeout - silence,
                )  # fmt: skip
        return None

    def refuse_late(self, ranks: Sequence[int], here: tuple[int, int], what: str) -> None:
        """Raise where some rank has not come as far as this one, which waited for long enough.

        Args:
            here: the epoch of this rank, and the number of its latest event.
            what: this rank is at.
        """
        for rank in ranks:
            position = self.position(rank)
            if position is None or (position["epoch"], position["event"]) < here:
                raise AgreementError(
                    f"rank {rank} did not come to {what} within {self._timeout:.0f} s and {self.where(rank)}; {LATE}"
                )

    def tell_waiting(self, rank: int, stage: str, event: str) -> None:
        """Say that a rank runs and does not come to what others wait at; once for all that wait."""
        if self._store.add(f"{self._name}/waiting/{rank}/{event}", 1) == 1:
            logger.warning(
                "rank %d waits at %s for rank %d, which runs and %s; if it does not come, all ranks end after %.0f s",
                self.rank, stage, rank, self.where(rank), self._timeout,
            )  # fmt: skip

    def _stopped(self, rank: int, silence: float = math.inf) -> str:
        for_long = f" for {silence:.0f} s" if math.isfinite(silence) else ""
        return (
            f"rank {rank} stopped: it gives no sign of life{for_long} and {self.where(rank)}; look at what it printed, "
            "and start all processes again"
        )

    def blame(self, epoch: int, ranks: Sequence[int]) -> str | None:
        """Why a transfer broke, once it is known: what failed, or which of some ranks gives no sign of life."""
        end = time.monotonic() + SETTLE_SECONDS
        while (failed := self.failure(epoch)) is None and time.monotonic() < end:
            time.sleep(SETTLE_SECONDS / 400)
        if failed is None:
            silent = self._signs.silent(ranks)
            failed = self.failure(epoch) or (None if silent is None else self._stopped(silent))
        return failed

    def refuse_other_way(
        self, rank: int, position: Mapping[str, Any] | None, epoch: int, event: tuple[int, str], waiting: str = ""
    ) -> None:
        """Raise where a peer's latest event shows that it does not come to what this rank is at.

        Args:
            position: of the peer.
            event: the latest of this rank: its number, and what it is.
            waiting: what this rank waits for the peer to come to, where that is no transfer: one that is further on
                will not come any more.
        """
        if position is None or position["epoch"] != epoch:
            return
        ahead = position["event"] - event[0]
        if (ahead > 0 and waiting) or (ahead == 0 and position["said"] != event[1]):
            raise self.other_way(rank, position["said"], waiting or event[1])

    def other_way(self, rank: int, theirs: str, mine: str) -> AgreementError:
        """What to raise where a peer is at something else than this rank."""
        return AgreementError(
            f"rank {rank} is at {theirs} where rank {self.rank} is at {mine}: every rank must make the same calls; "
            "give them the same inputs, and read results or stop on all of them or on none"
        )


class Patience:
    """How long a rank waits for another: one that is busy may take as long as it runs.

    That it runs is seen by its signs of life, which `Peers.stopped` looks at.

    Args:
        timeout_s: seconds that one which is not busy may let others wait.
        stage: what for; told after a while.
        event: tells this wait apart from others.
    """

    def __init__(self, peers: Peers, rank: int, timeout_s: float, stage: str = "", event: str = ""):
        self._peers, self._rank, self._timeout = peers, rank, timeout_s
        self._stage, self._event = stage, event
        self._since = begin = time.monotonic()
        self._looked = -LOOK_AGAIN_SECONDS
        self._noticed, self._told = begin + NOTICE_SECONDS, not stage

    def is_over(self) -> bool:
        """Whether the other let this one wait for too long; to be asked again and again."""
        now, peers, rank = time.monotonic(), self._peers, self._rank
        if now - self._looked > LOOK_AGAIN_SECONDS:
            self._looked = now
            self._since = now if peers.is_busy(rank) else self._since
        if self._stage and now > self._noticed:
            self._noticed = now + 6 * NOTICE_SECONDS
            details.info("rank %d waits at %s for rank %d, which %s", peers.rank, self._stage, rank, peers.where(rank))
        if now - self._since > QUIET_SECONDS and not self._told:
            self._told = True
            peers.tell_waiting(rank, self._stage, self._event)
        return now - self._since > self._timeout
