"""Work that runs in turns: each in a thread of its own, of which one at a time goes on, until it next waits.

A pipeline's loop cannot be split into steps from outside, but it can be halted where it calls its denoiser. Ranks that
let the same strands go on in the same order do the same everywhere, which threads of their own accord would not.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch


class Cancelled(BaseException):
    """Raised where a strand waits, once nobody wants what it makes; no ``Exception``, which pipelines might catch."""


class Strand:
    """A function that halts wherever it calls `ask`, until it is told to go on.

    What it draws of PyTorch's global random numbers depends on ``seed`` alone, whatever other strands draw between.

    Args:
        work: what to do.
        seed: of the random numbers.
        device: where these are drawn besides the CPU.

    Attributes:
        asked: what it waits for; None before it has begun and after it has ended.
        over: whether it has ended.
        result: what it returned.
        error: what it raised.
    """

    def __init__(self, work: Callable[[], Any], seed: int, device: torch.device):
        self.asked: Any = None
        self.over = False
        self.result: Any = None
        self.error: BaseException | None = None
        self._work, self._device = work, device
        self._mine, self._others = threading.Semaphore(0), threading.Semaphore(0)
        self._answer: Any = None
        self._failure: BaseException | None = None
        with _state_kept(device):
            torch.manual_seed(seed)
            self._random = _random_state(device)
        self._thread = threading.Thread(target=self._run, name="strand", daemon=True)
        self._thread.start()

    def go_on(self, answer: Any = None, failure: BaseException | None = None) -> None:
        """Have it run with an answer to what it asked, or with an exception there, until it waits again or ends."""
        if self.over:
            return
        self._answer, self._failure, self.asked = answer, failure, None
        with _state_kept(self._device):
            _set_random_state(self._random, self._device)
            self._mine.release()
            self._others.acquire()
            self._random = _random_state(self._device)
        if self.over:
            self._thread.join()

    def ask(self, question: Any) -> Any:
        """Wait, in the strand's own thread, for the answer to a question; raises what it is answered with."""
        self.asked = question
        self._others.release()
        self._mine.acquire()
        if self._failure is not None:
            raise self._failure
        return self._answer

    def _run(self) -> None:
        CURRENT.strand = self
        self._mine.acquire()
        try:
            if self._failure is not None:
                raise self._failure
            if self._device.type == "cuda":
                torch.cuda.set_device(self._device)
            self.result = self._work()
        except BaseException as error:  # noqa: BLE001 - whoever lets it go on looks at it
            self.error = error
        finally:
            self.over = True
            self._others.release()


class _Current(threading.local):
    strand: Strand | None = None


CURRENT = _Current()
"""The strand that runs in this thread, where one does."""


def _random_state(device: torch.device) -> tuple[torch.Tensor, torch.Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def _set_random_state(state: tuple[torch.Tensor, torch.Tensor | None], device: torch.device) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)


def _state_kept(device: torch.device) -> AbstractContextManager[None]:
    """Give the global random numbers back as they were."""
    return torch.random.fork_rng([device] if device.type == "cuda" else [])
