"""What a server is started with."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import ClassVar

from xdit_compile.cli.options.request import PipelineRequest
from xdit_compile.errors import UsageError

from .http.settings import Limits as Most
from .queue.arrangements import Arrangement, arrangements_of
from .queue.desk import Limits

LOG_FORMATS = ("text", "json")


@dataclasses.dataclass(frozen=True)
class ServeRequest(PipelineRequest):
    """A pipeline to serve, and how. What it says of pictures holds where a request says nothing."""

    host: str = "127.0.0.1"
    port: int = 8000
    max_batch: int = Limits.max_batch
    max_wait_ms: float = Limits.max_wait_ms
    max_queue: int = Limits.max_queue
    retry: int = Limits.retries
    drain: float = 30.0
    start_timeout: float = 1800.0
    api_key_file: str | None = None
    cors_origin: tuple[str, ...] = ()
    log_format: str = "text"
    max_pixels: int = Most.pixels
    max_steps: int = Most.steps
    plans: tuple[str, ...] = ()

    counts: ClassVar[tuple[str, ...]] = (*PipelineRequest.counts, "max_batch", "max_queue", "max_pixels", "max_steps")

    @property
    def name(self) -> str:
        """What is served, as it was named."""
        return self.model or "xdit-compile/shapes"

    @property
    def limits(self) -> Limits:
        """How much is done at once."""
        return Limits(self.max_batch, self.max_wait_ms, self.max_queue, self.retry)

    @property
    def most(self) -> Most:
        """What a request may ask for at most."""
        return Most(pixels=self.max_pixels, steps=self.max_steps)

    @property
    def arrangements(self) -> tuple[Arrangement, ...]:
        """Of the ranks: one, or the one for an idle server and the one for a queue.

        Raises:
            UsageError: as `arrangements_of`.
        """
        return arrangements_of(self.plan, self.plans)

    def _more_checks(self) -> list[Callable[[], None]]:
        return [self._check_numbers]

    def _check_numbers(self) -> None:
        problems = [] if 0 <= self.port < 2**16 else [f"--port {self.port} must lie between 0 and 65535"]
        for name in ("max_wait_ms", "retry", "drain"):
            if getattr(self, name) < 0:
                problems.append(f"--{name} {getattr(self, name)} must not be negative")
        if self.start_timeout <= 0:
            problems.append(f"--start_timeout {self.start_timeout} must be more than 0 s")
        if problems:
            raise UsageError("; ".join(problems))
