"""What a rank tells and asks others beside its work: that it runs and what it does, and where they are.

Every rank says in the store that it runs, so that one which was stopped can be named, and told from one that is busy.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path

import torch.distributed as dist

BEAT_SECONDS = 1.0
QUIET_SECONDS = 30.0
"""Of a rank that gives no sign for so long the others say so, once."""
LOOK_SECONDS = 5.0
"""A rank that was not looked at for so long is looked at anew: nobody knows that it was silent all the while."""
ENDED = "ended"


Look = Callable[[dist.Store | None], None]


class Signs:
    """The signs of life that ranks write in a store, as one thread sees them through its connection.

    Args:
        store: read by one thread at a time.
        name: begins the keys; the same on every rank.
    """

    def __init__(self, store: dist.Store, name: str):
        self.store, self._name = store, name
        self._seen: dict[int, _Seen] = {}

    def silence(self, rank: int) -> float:
        """Seconds for which a rank was looked at and gave no sign of life; infinite for one that said it ended."""
        sign, now = self._sign(rank), time.monotonic()
        if sign == ENDED or _is_gone(sign):
            return math.inf
        seen = self._seen.get(rank)
        if seen is None or seen.sign != sign or now - seen.looked > LOOK_SECONDS:
            seen = self._seen[rank] = _Seen(sign, now, now)
        seen.looked = now
        return now - seen.since

    def does(self, rank: int) -> tuple[str, bool]:
        """What a rank said last that it does, and whether that takes as long as it takes."""
        sign = self._sign(rank)
        if sign in ("", ENDED):
            return "", False
        said = json.loads(sign)
        return said["does"], said["busy"]

    def first_to_tell(self, rank: int) -> bool:
        """Whether this one is the first of all ranks that wants to tell of another one's latest sign."""
        return self.store.add(f"{self._name}/told/{rank}/{self._sign(rank)}", 1) == 1

    def forget(self) -> None:
        """Look anew: a rank that was stopped may run again."""
        self._seen.clear()

    def silent(self, ranks: Sequence[int]) -> int | None:
        """The first of some ranks that gives no sign of life while it is looked at for three beats."""
        first = {rank: self._sign(rank) for rank in ranks}
        end = time.monotonic() + 3 * BEAT_SECONDS
        while True:
            signs = {rank: self._sign(rank) for rank in ranks}
            quiet = [rank for rank in ranks if signs[rank] in (ENDED, first[rank])]
            ended = next((rank for rank in ranks if signs[rank] == ENDED or _is_gone(signs[rank])), None)
            if ended is not None or not quiet:
                return ended
            if time.monotonic() > end:
                return quiet[0]
            time.sleep(BEAT_SECONDS / 10)

    def _sign(self, rank: int) -> str:
        key = self._key(rank)
        return self.store.get(key).decode() if self.store.check([key]) else ""

    def _key(self, rank: int) -> str:
        return f"{self._name}/alive/{rank}"


class Liveness(Signs):
    """This rank's signs of life, and what it has seen of the others'.

    A thread of its own writes them, through a connection of its own, as the main thread may be in a collective. It ends
    with this object, and says so: a rank that has ended is known at once. The same thread looks values up for which the
    main one does not wait (`ask`), and looks after one that cannot (`watch`).

    Args:
        store: the store of the process group.
        name: begins the keys; the same on every rank.
    """

    def __init__(self, store: dist.Store, name: str, rank: int):
        super().__init__(store, name)
        self._errand = _Errand()
        own: dist.Store = store.clone()  # type: ignore[attr-defined]
        thread = threading.Thread(target=_run, args=(own, self._key(rank), self._errand), daemon=True)
        thread.start()
        self.close = weakref.finalize(self, _end, thread, self._errand)

    def ask(self, key: str) -> None:
        """Have a key of the store looked up, which must be there; `answer` gives its value later."""
        self._errand.key = key
        self._errand.wake.set()

    def answer(self) -> bytes | None:
        """What was found since the last answer, if anything."""
        found, self._errand.found = self._errand.found, None
        return found

    def do(self, what: str, busy: bool) -> None:
        """Say from the next beat on what this rank does.

        Args:
            busy: it takes as long as it takes, and others wait for as long as this rank runs.
        """
        self._errand.does, self._errand.busy = what, busy

    def watch(self, look: Look | None) -> None:
        """Have the thread call something at every beat with its connection, or with None once that is lost."""
        self._errand.look = look


@dataclasses.dataclass
class _Seen:
    """A rank's latest sign, since when it is that one, and when it was last looked at."""

    sign: str
    since: float
    looked: float


@dataclasses.dataclass
class _Errand:
    """What the main thread and the one beside it leave for one another."""

    wake: threading.Event = dataclasses.field(default_factory=threading.Event)
    ended: bool = False
    key: str = ""
    found: bytes | None = None
    look: Look | None = None
    does: str = ""
    busy: bool = False


def _run(store: dist.Store, sign_key: str, errand: _Errand) -> None:
    begin, process = time.monotonic(), {"home": _home(), "process": os.getpid()}
    try:
        while not errand.ended:
            errand.wake.clear()
            beat = int((time.monotonic() - begin) / BEAT_SECONDS)
            store.set(sign_key, json.dumps({"beat": beat, "does": errand.does, "busy": errand.busy, **process}))
            if key := errand.key:
                errand.key = ""
                errand.found = store.get(key)
            _look(errand, store)
            errand.wake.wait(BEAT_SECONDS)
        store.set(sign_key, ENDED)
    except RuntimeError:
        _look(errand, None)


def _home() -> str:
    """What processes have in common that see one another by their numbers; empty where that is not known."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _is_gone(sign: str) -> bool:
    """Whether a process has ended without a word, where this one can see that."""
    if not sign or sign == ENDED:
        return False
    said = json.loads(sign)
    if not said["home"] or said["home"] != _home():
        return False
    try:
        state = Path(f"/proc/{said['process']}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return True
    return state in "ZX"


def _look(errand: _Errand, store: dist.Store | None) -> None:
    if (look := errand.look) is not None:
        look(store)


def _end(thread: threading.Thread, errand: _Errand) -> None:
    errand.ended = True
    errand.wake.set()
    thread.join(2 * BEAT_SECONDS)
