"""Ranks tell each other what they are about to do, and stop together where they differ.

Everything goes through the key-value store of the process group, never through a collective: a collective is what must
not be entered before all agree.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence

import torch.distributed as dist

from .errors import AgreementError
from .mesh import REPLICA, Mesh

POLL_SECONDS = 0.02


class Agreement:
    """One rank's side of the talk.

    Args:
        name: sets this conversation apart from others in the same store; the same on every rank that takes part.
        rank: this process.
        members: the ranks that take part, in ascending order; the first of them has the say in `share`.
        timeout_s: seconds to wait for a rank before giving up.
    """

    def __init__(self, name: str, rank: int, members: Sequence[int], timeout_s: float):
        self._name = name
        self._rank = rank
        self._members = members
        self._timeout = timeout_s
        self._talks = 0
        self._calls = 0
        self._store = dist.distributed_c10d._get_default_store() if len(members) > 1 else None

    @classmethod
    def over(cls, mesh: Mesh, timeout_s: float) -> Agreement:
        """A new conversation among the ranks that make the same images; all must start theirs in the same order."""
        members = mesh.peers(REPLICA)
        if len(members) == 1:
            return cls("alone", mesh.rank, members, timeout_s)
        count = dist.distributed_c10d._get_default_store().add(f"xdit_compile/conversations/{mesh.rank}", 1)
        return cls(f"{members[0]}/{count}", mesh.rank, members, timeout_s)

    def announce_call(self, what: str) -> None:
        """Say which call this rank enters now, without waiting for anybody."""
        if self._store is not None:
            self._calls += 1
            self._store.set(self._key("call", self._rank), f"{self._calls} {what}")

    def share(self, value: bytes | None) -> bytes:
        """The first member's bytes on every rank; the last one to read them takes them out of the store."""
        if self._store is None:
            assert value is not None
            return value
        self._talks += 1
        first = self._members[0]
        key = self._key(f"share{self._talks}", first)
        if self._rank == first:
            assert value is not None
            self._store.set(key, value.hex())
        shared = bytes.fromhex(self._wait(key, first).decode())
        if self._store.add(f"{key}/read", 1) == len(self._members):
            self._store.delete_key(key)
            self._store.delete_key(f"{key}/read")
        return shared

    def agree(self, stage: str, facts: Mapping[str, str]) -> None:
        """Return once every rank has come to this stage with equal facts.

        Raises:
            AgreementError: naming the ranks and the facts that differ, a rank that failed, or one that did not come.
        """
        said = self._exchange(stage, {"facts": dict(facts)})
        failed = {rank: other["error"] for rank, other in said.items() if "error" in other}
        if failed:
            raise AgreementError("; ".join(f"rank {rank} failed: {why}" for rank, why in sorted(failed.items())))
        for rank, other in sorted(said.items()):
            differing = [name for name, value in facts.items() if other["facts"].get(name) != value]
            if differing:
                raise AgreementError(
                    f"rank {rank} was called with another {' and another '.join(differing)} than rank {self._rank}; "
                    "give every rank the same plan, the same inputs and the same seed"
                )

    def fail(self, stage: str, error: BaseException) -> None:
        """Tell the others that this rank will not come to ``stage``; waits for nobody."""
        if self._store is not None:
            self._talks += 1
            self._store.set(self._key(f"{stage}{self._talks}", self._rank), json.dumps({"error": str(error)}))

    def _exchange(self, stage: str, mine: dict) -> dict[int, dict]:
        if self._store is None:
            return {}
        self._talks += 1
        topic = f"{stage}{self._talks}"
        self._store.set(self._key(topic, self._rank), json.dumps(mine))
        others = [rank for rank in self._members if rank != self._rank]
        return {rank: json.loads(self._wait(self._key(topic, rank), rank)) for rank in others}

    def _wait(self, key: str, rank: int) -> bytes:
        assert self._store is not None
        deadline = time.monotonic() + self._timeout
        mine = self._latest(self._rank)
        while not self._store.check([key]):
            theirs = self._latest(rank)
            if mine is not None and theirs is not None and theirs[0] >= mine[0] and theirs != mine:
                if not self._store.check([key]):
                    raise AgreementError(
                        f"rank {rank} makes another call than rank {self._rank}; give every rank the same inputs"
                    )
            if time.monotonic() > deadline:
                raise AgreementError(f"rank {rank} did not answer within {self._timeout:.0f} s; was it stopped?")
            time.sleep(POLL_SECONDS)
        return self._store.get(key)

    def _latest(self, rank: int) -> tuple[int, str] | None:
        assert self._store is not None
        key = self._key("call", rank)
        if not self._store.check([key]):
            return None
        count, _, what = self._store.get(key).decode().partition(" ")
        return int(count), what

    def _key(self, topic: str, rank: int) -> str:
        return f"xdit_compile/{self._name}/{topic}/{rank}"
