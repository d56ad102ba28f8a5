"""The latest calls of modules that a rank made in a request, and what other ranks say of theirs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .errors import AgreementError
from .sketch import alike

REMEMBERED = 8
"""Calls whose inputs a rank keeps in the store for others to compare."""


class Calls:
    """What this rank says of its calls, each by its number: what runs, and sketches of the inputs.

    Args:
        rank: this process.
    """

    def __init__(self, rank: int):
        self._rank = rank
        self.made = 0
        self.latest: dict[int, list[str]] = {}
        self._unread: set[int] = set()

    def restart(self) -> None:
        """Count from the first again."""
        self.made = 0
        self.latest.clear()
        self._unread.clear()

    def add(self, what: str, sketches: Sequence[str]) -> None:
        """Another call is made."""
        self.made += 1
        self._unread.add(self.made)
        self.latest[self.made] = [what, *sketches]
        self.latest.pop(self.made - REMEMBERED, None)

    @property
    def behind(self) -> bool:
        """Whether many calls were compared with nobody's."""
        return len(self._unread) > REMEMBERED // 2

    def compare(self, rank: int, theirs: Mapping[str, Sequence[str]]) -> None:
        """Compare another rank's latest calls, as far as it has come, with this rank's that are not compared yet.

        Another thread than the one that makes calls may do this, too.

        Raises:
            AgreementError: it made another call, or the same one with other inputs.
        """
        latest = dict(self.latest)
        for call in sorted(call for call in set(self._unread) if str(call) in theirs and call in latest):
            self._check(rank, call, latest[call], theirs[str(call)])

    def compared(self, theirs: Mapping[str, Sequence[str]]) -> None:
        """Calls that another rank has reached need no comparison any more."""
        reached = max(map(int, theirs), default=0)
        self._unread = {call for call in self._unread if call > reached}

    def _check(self, rank: int, call: int, mine: Sequence[str], theirs: Sequence[str]) -> None:
        if mine[0] != theirs[0] or len(mine) != len(theirs):
            raise AgreementError(
                f"call {call} of rank {rank} is {theirs[0]} where rank {self._rank} makes {mine[0]}; "
                "give every rank the same inputs"
            )
        pairs = enumerate(zip(mine[1:], theirs[1:], strict=True))
        differing = [at for at, (one, other) in pairs if not alike(one, other)]
        if differing:
            raise AgreementError(
                f"call {call} of rank {rank} has another input {differing[0]} than rank {self._rank}'s; "
                "give every rank the same inputs and the same seed"
            )
