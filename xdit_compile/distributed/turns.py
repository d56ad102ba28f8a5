"""Requests of several threads, one at a time: on every rank in the order of the first."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from .agreement import Agreement

PATIENCE_SECONDS = 5.0
"""How long a rank waits for a thread of its own with the request whose turn it is, before another one takes it."""


class Turns:
    """The threads of this rank that want to make a request.

    The first rank takes its threads as they come and says which request it takes. Threads of other ranks wait until it
    is theirs: a server whose threads run freely must not have ranks compute two requests in two orders.
    """

    def __init__(self, agreement: Agreement):
        self._agreement = agreement
        self._lock = threading.RLock()
        self._changed = threading.Condition()
        self._waiting: list[str] = []
        self._count = 0

    @contextmanager
    def one(self) -> Iterator[None]:
        """Whatever runs inside, no other thread is in a turn meanwhile."""
        with self._lock:
            yield

    @contextmanager
    def of(self, request: str) -> Iterator[None]:
        """A turn of this thread.

        Args:
            request: tells requests apart; the same on every rank.

        Raises:
            AgreementError: the first rank failed, does something else or does not come.
        """
        if self._agreement.leads:
            self._lock.acquire()
            self._agreement.lead(self._count, request)
        else:
            self._await(request)
        self._count += 1
        try:
            yield
        finally:
            with self._changed:
                self._lock.release()
                self._changed.notify_all()

    def reset(self) -> None:
        """Count turns from the first again: ranks go on in another epoch."""
        self._count = 0

    def _await(self, request: str) -> None:
        with self._changed:
            self._waiting.append(request)
        try:
            while not self._is_mine(request):
                with self._changed:
                    self._changed.wait(0.01)
        finally:
            with self._changed:
                self._waiting.remove(request)

    def _is_mine(self, request: str) -> bool:
        """Take the lock if it is this request's turn."""
        if not self._lock.acquire(timeout=0.01):
            return False
        try:
            wanted = self._agreement.led(self._count)
        except BaseException:
            self._lock.release()
            raise
        end = time.monotonic() + (PATIENCE_SECONDS if _others_may_come() else 0)
        while wanted != request and wanted not in self._waiting and time.monotonic() < end:
            time.sleep(0.01)
        if wanted == request or wanted not in self._waiting:
            return True
        self._lock.release()
        return False


def _others_may_come() -> bool:
    """Whether other threads of this process may make requests."""
    working = [thread for thread in threading.enumerate() if not thread.daemon]
    return len(working) > 1 or threading.current_thread() is not threading.main_thread()
