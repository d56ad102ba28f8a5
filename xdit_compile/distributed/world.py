"""What the environment says about this process: its rank among the processes of a launcher, or none."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping

from xdit_compile.errors import UsageError

LAUNCHERS = (
    ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
)
"""Under what names launchers write a process's rank, how many there are, and its number among those of its host.

PyTorch's own, Open MPI's, those of MPICH and Intel MPI, and Slurm's. A batch script of Slurm's is no step, a shell in
an allocation one of a single task: either counts as one process however large the job is.
"""
MEETING = ("MASTER_ADDR", "MASTER_PORT")
"""Where ranks meet; launchers of other people's programs do not say."""


@dataclasses.dataclass(frozen=True)
class World:
    """This process's place, as launchers write it into the environment.

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
        """Read what torchrun, mpirun or srun wrote; torchrun's own names come first.

        Raises:
            UsageError: one of them is no whole number.
        """
        names = next((each for each in LAUNCHERS if environment.get(each[0]) and environment.get(each[1])), None)
        if names is None:
            return cls()
        ranks, sizes, _ = names
        rank_text = environment[ranks]
        local = next((own for of, _, own in LAUNCHERS if own in environment and environment.get(of) == rank_text), None)
        try:
            rank, size = int(rank_text), int(environment[sizes])
            number = None if local is None else int(environment[local])
        except ValueError:
            read = (ranks, local or names[2], sizes)
            said = ", ".join(f"{name}={environment.get(name)!r}" for name in read)
            raise UsageError(f"{said} are no whole numbers; start with torchrun, or unset them") from None
        return cls(rank, number, size, launched=names is LAUNCHERS[0] or size > 1)

    def check_meeting(self, environment: Mapping[str, str] = os.environ) -> None:
        """See that ranks are told where they meet.

        Raises:
            UsageError: they are not; says what to set.
        """
        missing = [name for name in MEETING if not environment.get(name)]
        if missing:
            raise UsageError(
                f"a launcher started {self.size} processes, but does not say where they meet: set "
                f"{' and '.join(missing)} (the host of rank 0, and a free port of it) in every one, as mpirun -x "
                "MASTER_ADDR=HOST -x MASTER_PORT=29500 does, or start with torchrun"
            )
