"""How often one ``generate`` command calls the pipeline, and with how many prompts at once."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

from xdit_compile.errors import UsageError


@dataclasses.dataclass(frozen=True)
class Repeats:
    """What a request says of its calls besides what they show.

    Args:
        batch_size: prompts in one call; all of them by default.
        num_iterations: times that everything is made and timed.
        warmup_calls: times that it is made before, untimed.
        determinism_check: see that every time gives the same bytes, twice at least.
        output_directory: the folder of what is written; it is made where it is missing.
        profile: the file for a trace of one step.
    """

    batch_size: int | None = None
    num_iterations: int = 1
    warmup_calls: int = 0
    determinism_check: bool = False
    output_directory: str | None = None
    profile: str | None = None

    @property
    def runs(self) -> int:
        """Times that everything is made and kept."""
        return max(self.num_iterations, 2 if self.determinism_check else 1)

    def repeat_problems(self) -> Iterator[str]:
        """Everything that is wrong with these, each as one clause."""
        if self.warmup_calls < 0:
            yield f"--warmup_calls {self.warmup_calls} must be at least 0"
        if self.output_directory is not None:
            folder = Path(self.output_directory)
            if folder.exists() and not folder.is_dir():
                yield f"--output_directory {folder} is a file; name a folder"
            elif not folder.absolute().parent.is_dir():
                yield f"--output_directory {folder}: folder {folder.parent} does not exist; make it first"
        if self.profile is not None and not self.trace.parent.is_dir() and self.trace.parent != self.folder:
            yield f"--profile {self.profile}: folder {self.trace.parent} does not exist; make it first"

    @property
    def folder(self) -> Path:
        """Where files are written that are named without a folder."""
        return Path(self.output_directory or "")

    @property
    def trace(self) -> Path:
        """The file of ``profile``, in the folder of what is written."""
        return self.folder / (self.profile or "")


def check_memory_savers(tiling: bool, slicing: bool, vae: str) -> None:
    """See that the autoencoder is not made to work in pieces twice.

    Raises:
        UsageError: it is.
    """
    if (tiling or slicing) and vae != "whole":
        name = "enable_tiling" if tiling else "enable_slicing"
        raise UsageError(
            f"--{name} and --use_parallel_vae both take the autoencoder's work apart; leave one out, and "
            "bound the memory of the parallel one with --vae_memory"
        )
