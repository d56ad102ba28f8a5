"""Whether requests fit into the memory that there was before the ranks started; counted by processes of their own, so
that the front stays small."""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import json
import logging
import os
import subprocess
import sys
from typing import Any

from xdit_compile.cli.options.plenty import is_plenty, uses_cuda
from xdit_compile.cli.options.request import PipelineRequest, Request
from xdit_compile.distributed.world import LAUNCHERS
from xdit_compile.errors import UsageError
from xdit_compile.plan import Plan
from xdit_compile.plan.host import available_memory, free_on_cards

from .queue.desk import Full
from .queue.messages import Work
from .request import ServeRequest

log = logging.getLogger(__name__)
KEPT = 256
"""Forms of requests whose need is known."""
WAITING = 16
"""Requests that may wait for theirs to be counted."""
COUNT_S = 300.0


@dataclasses.dataclass(frozen=True)
class Free:
    """What a rank may take.

    Args:
        bytes: None where nobody says.
        on_card: of an accelerator, and not of RAM.
    """

    bytes: int | None
    on_card: bool = False

    @property
    def where(self) -> str:
        """In words."""
        return "the device" if self.on_card else "RAM"


def free_here(ranks: int, on_cards: bool) -> Free:
    """Of the memory of this machine, which so many ranks share, or of the cards that this process sees, one each."""
    cards = free_on_cards()[:ranks] if on_cards else []
    free = min(cards) if cards and len(cards) == ranks else available_memory(ranks)
    return Free(free, bool(cards))


class Room:
    """The memory that ranks had before they started, and what requests take of it.

    Args:
        request: what the server was started with.
        plan: under which a rank takes most.
        ranks: processes on this machine.
        elsewhere: what each rank had on machines that are others; None where they are on this one.

    Attributes:
        free: what each rank had.
    """

    def __init__(self, request: ServeRequest, plan: Plan, ranks: int, elsewhere: Free | None = None):
        self._request, self._ranks = _one(dataclasses.replace(request, plan=plan)), ranks
        self.free = elsewhere or free_here(ranks, on_cards=uses_cuda(request))
        self._elsewhere = None if elsewhere is None else elsewhere.bytes
        self._known: collections.OrderedDict[str, dict[str, Any] | None] = collections.OrderedDict()
        self._lock, self._waiting = asyncio.Lock(), 0

    def check(self) -> None:
        """See that a request of the server's own size fits, before anything is loaded.

        Raises:
            UsageError: it does not; says what would.
        """
        if is_plenty(self._request, self._ranks):
            return
        done = subprocess.run(
            [*_COMMAND, "--check", str(self._ranks), self._request.to_json()], stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE, text=True, env=_environment(),
        )  # fmt: skip
        if done.returncode == UsageError.exit_code:
            raise UsageError(done.stderr.strip().rpartition("\n")[2].removeprefix("xdit-compile: error: "))

    async def refusal(self, work: Work) -> str | None:
        """Why a request does not fit; None where it does, as what `check` has looked at, or where it cannot be counted.

        Raises:
            Full: too many wait for theirs to be counted.
        """
        asked = self._of(work)
        if self.free.bytes is None or asked == self._request or is_plenty(asked, self._ranks, self._elsewhere):
            return None
        needed = await self._need(asked)
        if needed is None or needed["total"] <= self.free.bytes:
            return None
        return (
            f"this takes about {_mebibytes(needed['total'])} on each rank ({needed['words']}), and "
            f"{_mebibytes(self.free.bytes)} of {self.free.where} were free for it; ask for less"
        )

    def _of(self, work: Work) -> Request:
        """A request of the same form, so that there are few of them: a value of guidance is 1 or more."""
        names = ("height", "width", "num_frames", "max_sequence_length")
        asked = {name: value for name in names if (value := getattr(work, name)) is not None}
        if work.guidance_scale is not None:
            asked["guidance_scale"] = 1.0 if work.guidance_scale <= 1 else 2.0
        count = work.num_images if work.num_images > 1 else None
        return dataclasses.replace(self._request, num_images_per_prompt=count, **asked)

    async def _need(self, asked: Request) -> dict[str, Any] | None:
        text = asked.to_json()
        if self._waiting >= WAITING:
            raise Full(10)
        self._waiting += 1
        try:
            async with self._lock:
                if text not in self._known:
                    self._known[text] = await _counted(text)
                self._known.move_to_end(text)
                if len(self._known) > KEPT:
                    self._known.popitem(last=False)
                return self._known[text]
        finally:
            self._waiting -= 1


_COMMAND = (sys.executable, "-P", "-m", "xdit_compile", "serve_room")


async def _counted(text: str) -> dict[str, Any] | None:
    """What a request takes, by a process; None where that does not say it."""
    process = await asyncio.create_subprocess_exec(
        *_COMMAND, "1", text, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=_environment()
    )
    try:
        said, errors = await asyncio.wait_for(process.communicate(), COUNT_S)
    except TimeoutError:
        return None
    finally:
        if process.returncode is None:
            process.kill()
    if process.returncode:
        log.info("memory was not counted: %s", errors.decode(errors="replace").strip().rpartition("\n")[2])
        return None
    return dict(json.loads(said))


def _one(request: ServeRequest) -> Request:
    """One request that says nothing itself."""
    fields = {field.name: getattr(request, field.name) for field in dataclasses.fields(PipelineRequest)}
    return Request(**fields)


def _environment() -> dict[str, str]:
    """That of one process, whatever launched this one."""
    of_launchers = {name for names in LAUNCHERS for name in names}
    alone = {name: value for name, value in os.environ.items() if name not in of_launchers}
    return {**alone, "OMP_NUM_THREADS": "1"}


def _mebibytes(count: int) -> str:
    return f"{count / 2**20:,.0f} MiB"
