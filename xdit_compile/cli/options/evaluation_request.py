"""What one ``evaluate`` command asks for, and every reason against it that can be seen beforehand."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Self

from xdit_compile.cli.inputs.asked import prompts_in
from xdit_compile.distributed.world import World
from xdit_compile.errors import UsageError
from xdit_compile.plan.nearest import unknown

from .destination import check_made, settle
from .request import PipelineRequest, find_model
from .result_kind import kind_in_folder

FEATURES = ("scenes", "inception")
DEFAULT_COUNT = 32
GREATEST_COUNT = 4096
INCEPTION_WEIGHTS = "weights-inception-2015-12-05-6726825d.pth"
KEPT = "images/reference.json"
"""Says, in an output folder, what the pictures of one process beside it were asked for with."""
REFERENCE, PLAN = "reference", "plan"
_NEEDED = ("torchmetrics", "scipy")
_OF_THE_PLAN = (
    "plan", "output", "overwrite", "no_metadata", "json", "images", "reference", "features", "debug", "download_dir",
    "force", "method_chosen",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class EvaluationRequest(PipelineRequest):
    """Pictures to make twice, without and with the plan, and how to compare them."""

    prompts: str | None = None
    num_prompts: int | None = None
    batch_size: int = 4
    features: str = "scenes"
    images: bool = False
    reference: str | None = None
    output: str = "evaluation"
    overwrite: bool = False
    no_metadata: bool = False

    counts: ClassVar[tuple[str, ...]] = (*PipelineRequest.counts, "num_prompts", "batch_size")

    def _more_checks(self) -> list[Callable[[], None]]:
        return [
            self._check_prompts,
            self._check_features,
            self._check_output,
            self._check_reference,
            self._check_offload,
            check_installed,
        ]

    def _check_offload(self) -> None:
        if self.enable_sequential_cpu_offload and self.plan.world_size == 1:
            raise UsageError("--enable_sequential_cpu_offload leaves nothing to compare: the plan runs a whole graph")

    def _check_prompts(self) -> None:
        if self.prompts is not None:
            prompts_in(self.prompts, "--prompts")
        elif (self.num_prompts or 0) > GREATEST_COUNT:
            raise UsageError(
                f"--num_prompts {self.num_prompts} is too many; at most {GREATEST_COUNT}, or give --prompts"
            )

    def _check_features(self) -> None:
        if self.features not in FEATURES:
            raise UsageError(unknown(f"--features {self.features}", self.features, FEATURES))
        if self.features == "inception":
            check_inception()

    def _check_reference(self) -> None:
        if self.reference is not None:
            kept, asked = read_kept(self.reference), self.asked
            defaults = dataclasses.asdict(EvaluationRequest())
            other = [name for name in asked if kept.get(name, defaults[name]) != asked[name]]
            if other:
                raise UsageError(
                    f"--reference {self.reference} holds pictures of another {other[0]}: {kept.get(other[0])}; "
                    "give the same flags as there, or leave it out"
                )

    @property
    def asked(self) -> dict[str, Any]:
        """All that the pictures of one process depend on."""
        fields = dataclasses.asdict(self)
        found = {name: fields[name] for name in fields if name not in _OF_THE_PLAN}
        return {**found, "prompts": prompts_in(self.prompts, "--prompts") if self.prompts else None}

    @property
    def count(self) -> int:
        """How many pictures each of both makes."""
        if self.prompts is None:
            return self.num_prompts or DEFAULT_COUNT
        return len(prompts_in(self.prompts, "--prompts")[: self.num_prompts])

    @property
    def written(self) -> list[Path]:
        """All files to write."""
        names = ["report.json", "sheet.png"]
        if self.images:
            pictures = (picture_name(index, which) for index in range(self.count) for which in (REFERENCE, PLAN))
            names += [KEPT, *pictures]
        return [Path(self.output) / name for name in names]

    def settled(self, world: World) -> Self:
        """The request, its files seen to be free and writable, or given free by who was asked.

        Raises:
            UsageError, XditCompileError: as `destination.settle`, or the pipeline makes no images.
        """
        folder = Path(find_model(self.model))
        self.check_kind(kind_in_folder(folder) if folder.is_dir() else None)
        return dataclasses.replace(self, overwrite=settle(self.written, self.overwrite, world))

    def check_kind(self, kind: str | None) -> None:
        """The same, images alone."""
        check_made(kind, ("images",))

    def _check_output(self) -> None:
        folder = Path(self.output)
        if folder.exists() and not folder.is_dir():
            raise UsageError(f"--output {self.output} is a file; name a folder")
        if not folder.parent.is_dir():
            raise UsageError(f"--output {self.output}: folder {folder.parent} does not exist; make it first")


def picture_name(index: int, which: str) -> str:
    """The file, in the output folder, of a picture of one process (`REFERENCE`) or of the plan (`PLAN`)."""
    return f"images/{index:04}-{which}.png"


def read_kept(folder: str) -> dict[str, Any]:
    """What the pictures of one process that an earlier evaluation left in ``folder`` were asked for with.

    Raises:
        UsageError: the folder holds none.
    """
    file = Path(folder) / KEPT
    try:
        asked: dict[str, Any] = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise UsageError(
            f"--reference {folder} holds no pictures of one process ({file.name} is missing or broken); name the "
            "--output of an evaluation with --images"
        ) from error
    return asked


def check_installed() -> None:
    """See that the libraries of the measures are there.

    Raises:
        UsageError: saying what to install.
    """
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(f"evaluate needs {' and '.join(missing)}; pip install 'xdit-compile[evaluate]'")


def check_inception() -> None:
    """See that torch-fidelity and its Inception weights are on this machine: nothing is fetched.

    Raises:
        UsageError: saying what to install, and where the weights belong.
    """
    file = inception_file()
    if importlib.util.find_spec("torch_fidelity") is None:
        raise UsageError("--features inception needs torch-fidelity; pip install torch-fidelity, or take scenes")
    if not file.is_file():
        raise UsageError(f"--features inception needs {file.name} of torch-fidelity in {file.parent}; or take scenes")


def inception_file() -> Path:
    """Where torch-fidelity keeps its Inception weights: the folder of ``torch.hub``."""
    cache = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    home = Path(os.environ.get("TORCH_HOME", Path(cache) / "torch")).expanduser()
    return home / "hub" / "checkpoints" / INCEPTION_WEIGHTS
