"""What the environment says about this process: its rank among the processes of a launcher, or none."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping

from xdit_compile.errors import UsageError

PLACES = {
    "RANK": "LOCAL_RANK",
    "SLURM_PROCID": "SLURM_LOCALID",
    "OMPI_COMM_WORLD_RANK": "OMPI_COMM_WORLD_LOCAL_RANK",
    "PMI_RANK": "MPI_LOCALRANKID",
}
"""Under what names launchers write a process's rank, and its number among those of its host."""


@dataclasses.dataclass(frozen=True)
class World:
    """This process's place, as torchrun and PyTorch's elastic launcher write it into the environment.

    Args:
        rank: among all processes.
        local_rank: among those of this host; None where no launcher says so.
        size: how many processes there are.
        launched: whether a launcher started this one.
    """

    rank: int = 0
    local_rank: int | None = None
    size: int = 1
    launched: bool = False

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> World:
        """Read RANK and WORLD_SIZE, and the number on this host from whoever started this rank.

        Raises:
            UsageError: one of them is no whole number.
        """
        if "RANK" not in environment or "WORLD_SIZE" not in environment:
            return cls()
        local = next((own for of, own in PLACES.items() if own in environment and _same(environment, of)), None)
        try:
            rank, size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
            return cls(rank, None if local is None else int(environment[local]), size, launched=True)
        except ValueError:
            read = ("RANK", local or "LOCAL_RANK", "WORLD_SIZE")
            names = ", ".join(f"{name}={environment.get(name)!r}" for name in read)
            raise UsageError(f"{names} are no whole numbers; start with torchrun, or unset them") from None


def _same(environment: Mapping[str, str], name: str) -> bool:
    """Whether a launcher means this rank: a script that it started may have started several of its own."""
    return environment.get(name) == environment["RANK"]
