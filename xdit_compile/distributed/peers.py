"""What the other ranks of a conversation say of themselves in the store."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch.distributed as dist

from xdit_compile.errors import AgreementError

from .liveness import SILENT_SECONDS, Signs

SETTLE_SECONDS = 2.0
"""How long a broken transfer is given for its cause to be known."""


class Peers:
    """The other ranks, as one thread sees them through its connection to the store.

    Args:
        signs: of life, with the connection that they and all else is read through.
        name: begins the keys; the same on every rank.
        rank: this process.
        timeout_s: seconds after which a silent rank has stopped, where that is less than usual.
    """

    def __init__(self, signs: Signs, name: str, rank: int, timeout_s: float):
        self._signs, self._store, self._name, self._rank, self._timeout = signs, signs.store, name, rank, timeout_s

    def through(self, store: dist.Store) -> Peers:
        """The same ranks seen through another connection, by another thread."""
        return Peers(Signs(store, self._name), self._name, self._rank, self._timeout)

    def position(self, rank: int) -> dict[str, Any] | None:
        """What a rank is at, if it said so yet."""
        key = f"{self._name}/at/{rank}"
        return json.loads(self._store.get(key)) if self._store.check([key]) else None

    def where(self, rank: int) -> str:
        """The same in words."""
        position = self.position(rank)
        return "has made no call yet" if position is None else f"was last seen at {position['said']}"

    def failure(self, epoch: int, over: Sequence[Any] | None = None) -> str | None:
        """Which rank failed in an epoch and why, where another did.

        Args:
            over: count only what failed at the end of a request, and of this one.
        """
        key = f"{self._name}/{epoch}/failed"
        if not self._store.check([key]):
            return None
        said = json.loads(self._store.get(key))
        return None if said["rank"] == self._rank or over not in (None, said["at"]) else said["why"]

    def stopped(self, ranks: Sequence[int]) -> str | None:
        """Which of some ranks gives no sign of life, if one does not."""
        for rank in ranks:
            if self._signs.silence(rank) > min(SILENT_SECONDS, self._timeout):
                return _stopped(rank)
        return None

    def blame(self, epoch: int, ranks: Sequence[int]) -> str | None:
        """Why a transfer broke, once it is known: what failed, or which of some ranks gives no sign of life."""
        end = time.monotonic() + SETTLE_SECONDS
        while (failed := self.failure(epoch)) is None and time.monotonic() < end:
            time.sleep(SETTLE_SECONDS / 400)
        if failed is None:
            silent = self._signs.silent(ranks)
            failed = self.failure(epoch) or (None if silent is None else _stopped(silent))
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
            f"rank {rank} is at {theirs} where rank {self._rank} is at {mine}: every rank must make the same calls; "
            "give them the same inputs, and read results or stop on all of them or on none"
        )


def _stopped(rank: int) -> str:
    return f"rank {rank} stopped: it gives no sign of life; look at what it printed, and start all processes again"
