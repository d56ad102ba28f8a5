"""The latest calls of modules that a rank made in a request, and what other ranks say of theirs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .errors import AgreementError
from .sketch import Late, alike

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
        self._late: tuple[int, list[str | Late]] | None = None
        self._unread: set[int] = set()

    def restart(self) -> None:
        """Count from the first again."""
        self.made = 0
        self.latest.clear()
        self._late = None
        self._unread.clear()

    def add(self, what: str, sketches: Sequence[str | Late]) -> None:
        """Another call is made; what is late of the one before is there by now."""
        self.settle()
        self.made += 1
        self._unread.add(self.made)
        self._late = (self.made, [what, *sketches])
        if not any(isinstance(each, Late) for each in sketches):
            self.settle()

    def settle(self) -> dict[int, list[str]]:
        """The latest calls, once what is late of the last one is there."""
        if self._late is not None:
            call, said = self._late
            self._late = None
            self.latest[call] = [each.text() if isinstance(each, Late) else each for each in said]
            self.latest.pop(call - REMEMBERED, None)
        return self.latest

    @property
    def behind(self) -> bool:
        """Whether many calls were compared with nobody's."""
        return len(self._unread) > REMEMBERED // 2

    def compare(self, rank: int, theirs: Mapping[str, Sequence[str]]) -> None:
        """Compare another rank's latest calls, as far as it has come, with this rank's that are not compared yet.

        Raises:
            AgreementError: it made another call, or the same one with other inputs.
        """
        for call in sorted(call for call in self._unread if str(call) in theirs and call in self.latest):
            self._check(rank, call, theirs[str(call)])

    def compared(self, theirs: Mapping[str, Sequence[str]]) -> None:
        """Calls that another rank has reached need no comparison any more."""
        reached = max(map(int, theirs), default=0)
        self._unread = {call for call in self._unread if call > reached}

    def _check(self, rank: int, call: int, theirs: Sequence[str]) -> None:
        mine = self.latest[call]
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
