"""What the environment says about this process: its rank among the processes of a launcher, or none."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping

from .errors import UsageError


@dataclasses.dataclass(frozen=True)
class World:
    """This process's place, as torchrun and PyTorch's elastic launcher write it into the environment."""

    rank: int = 0
    local_rank: int = 0
    size: int = 1
    launched: bool = False

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> World:
        """Read RANK, LOCAL_RANK and WORLD_SIZE.

        Raises:
            UsageError: one of them is no whole number.
        """
        if "RANK" not in environment or "WORLD_SIZE" not in environment:
            return cls()
        try:
            rank, size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
            return cls(rank, int(environment.get("LOCAL_RANK", rank)), size, launched=True)
        except ValueError:
            names = ", ".join(f"{name}={environment.get(name)!r}" for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
            raise UsageError(f"{names} are no whole numbers; start with torchrun, or unset them") from None
