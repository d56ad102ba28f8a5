"""The latest calls of modules that a rank made in a request, and what other ranks say of theirs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from xdit_compile.errors import AgreementError

from .sketch import Coming, Sketch, alike, is_complete

REMEMBERED = 8
"""Calls whose inputs a rank keeps in the store for others to compare."""


class Calls:
    """What this rank says of its calls, each by its number: what runs, and sketches of the inputs.

    Values of inputs on a device are said, and compared, once they are here; nobody waits for them but at the end.

    Args:
        rank: this process.
    """

    def __init__(self, rank: int):
        self._rank = rank
        self.made = 0
        self._latest: dict[int, list[Sketch]] = {}
        self._unread: set[int] = set()

    def restart(self) -> None:
        """Count from the first again."""
        self.made = 0
        self._latest.clear()
        self._unread.clear()

    def add(self, what: str, sketches: Sequence[Sketch]) -> None:
        """Another call is made."""
        self.made += 1
        self._unread.add(self.made)
        self._latest[self.made] = [what, *sketches]
        self._latest.pop(self.made - REMEMBERED, None)
        self.settle(self.made - REMEMBERED // 2)

    def settle(self, until: int) -> bool:
        """Wait for the values of all calls until one; False where they were here."""
        waiting = [call for call in self._latest if call <= until and not _complete(self._latest[call])]
        for call in waiting:
            self._latest[call] = [_text(each, wait=True) for each in self._latest[call]]
        return bool(waiting)

    def said(self) -> dict[int, list[str]]:
        """The latest calls, as far as is known."""
        for call, sketches in self._latest.items():
            if not _complete(sketches):
                pairs = [(each, _text(each)) for each in sketches]
                self._latest[call] = [text if is_complete(text) else each for each, text in pairs]
        return {call: [_text(each) for each in sketches] for call, sketches in self._latest.items()}

    @property
    def behind(self) -> bool:
        """Whether many calls were compared with nobody's."""
        return len(self._unread) > REMEMBERED // 2

    def are_made(self, theirs: Mapping[str, Sequence[str]]) -> bool:
        """Whether another rank has made as many, and said all of the latest."""
        latest = theirs.get(str(self.made), ())
        return max(map(int, theirs), default=0) >= self.made and all(map(is_complete, latest))

    def compare(self, rank: int, theirs: Mapping[str, Sequence[str]]) -> None:
        """Compare another rank's latest calls, as far as it has come, with this rank's that are not compared yet.

        Another thread than the one that makes calls may do this, too.

        Raises:
            AgreementError: it made another call, or the same one with other inputs.
        """
        latest = dict(self._latest)
        for call in sorted(call for call in set(self._unread) if str(call) in theirs and call in latest):
            self._check(rank, call, [_text(each) for each in latest[call]], theirs[str(call)])

    def compared(self, theirs: Mapping[str, Sequence[str]]) -> None:
        """Calls that another rank has reached need no comparison any more, once all values were there."""
        reached = max(map(int, theirs), default=0)
        partial = {call for call in self._unread if not self._complete(call, theirs)}
        self._unread = {call for call in self._unread if call > reached or call in partial}

    def _complete(self, call: int, theirs: Mapping[str, Sequence[str]]) -> bool:
        return _complete(self._latest.get(call, ())) and all(map(is_complete, theirs.get(str(call), ())))

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


def _complete(sketches: Sequence[Sketch]) -> bool:
    return not any(isinstance(each, Coming) for each in sketches)


def _text(sketch: Sketch, wait: bool = False) -> str:
    return sketch.text(wait) if isinstance(sketch, Coming) else sketch
