"""What one ``generate`` command asks for, and every reason that can be seen before anything heavy is imported."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any

from .errors import UsageError, one_line
from .plan import Plan
from .world import World

DTYPES = {
    "float32": "float32",
    "fp32": "float32",
    "bfloat16": "bfloat16",
    "bf16": "bfloat16",
    "float16": "float16",
    "fp16": "float16",
}
DEVICES = ("auto", "cpu", "cuda")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".mp4", ".gif")
TINY_PIPELINE = Path(__file__).parent / "data" / "tiny_pipeline"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


@dataclasses.dataclass(frozen=True)
class Request:
    """One picture or video to make. ``None`` leaves a value to the pipeline's own default."""

    plan: Plan = dataclasses.field(default_factory=Plan)
    model: str | None = None
    prompt: str = "a lighthouse at dusk"
    negative_prompt: str | None = None
    height: int | None = None
    width: int | None = None
    num_frames: int | None = None
    fps: int = 8
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    max_sequence_length: int | None = None
    num_images_per_prompt: int | None = None
    seed: int = 42
    dtype: str = "auto"
    device: str = "auto"
    output: str = "out.png"
    compare: bool = False
    debug: bool = False

    def to_json(self) -> str:
        """The request as one line, for the processes that a launcher starts."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Request:
        """The request that ``to_json`` wrote."""
        fields = json.loads(text)
        return cls(plan=Plan(**fields.pop("plan")), **fields)

    def check(self, world: World | None, nproc: int | None = None) -> None:
        """Look at everything that needs no model; without a ``world`` any number of processes will do.

        Raises:
            UsageError: naming every problem at once.
        """
        found = [*_world_problems(self.plan, world, nproc), *self._number_problems(), *self._choice_problems()]
        for check in (lambda: find_model(self.model), self._check_output):
            try:
                check()
            except UsageError as error:
                found.append(str(error))
        if found:
            raise UsageError("; ".join(found))

    def _number_problems(self) -> list[str]:
        found = []
        whole = ("height", "width", "num_frames", "fps", "num_inference_steps", "max_sequence_length")
        for name in (*whole, "num_images_per_prompt"):
            value = getattr(self, name)
            if value is not None and value < 1:
                found.append(f"--{name} {value} must be at least 1")
        if self.guidance_scale is not None and not math.isfinite(self.guidance_scale):
            found.append(f"--guidance_scale {self.guidance_scale} must be a finite number")
        if not 0 <= self.seed < 2**63:
            found.append(f"--seed {self.seed} must lie between 0 and 2**63 - 1")
        return found

    def _choice_problems(self) -> list[str]:
        found = []
        if self.dtype != "auto" and self.dtype not in DTYPES:
            found.append(f"--dtype {self.dtype} is unknown; choose one of auto, {', '.join(DTYPES)}")
        if self.device not in DEVICES:
            found.append(f"--device {self.device} is unknown; choose one of {', '.join(DEVICES)}")
        return found

    def _check_output(self) -> None:
        path = Path(self.output)
        if path.suffix.lower() not in SUFFIXES:
            raise UsageError(f"--output {self.output} must end in one of {', '.join(SUFFIXES)}")
        if path.is_dir():
            raise UsageError(f"--output {self.output} is a folder; name a file in it")
        if not path.parent.is_dir():
            raise UsageError(f"--output {self.output}: folder {path.parent} does not exist; make it first")


def find_model(name: str | None) -> str:
    """The folder or Hub id to load: the embedded pipeline where none is named.

    Raises:
        UsageError: ``name`` is neither a folder in diffusers format nor of the form ``org/name``.
    """
    if name is None:
        if not (TINY_PIPELINE / "model_index.json").is_file():
            raise UsageError("the embedded pipeline is missing; install again, or give --model FOLDER_OR_ID")
        return str(TINY_PIPELINE)
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "model_index.json").is_file():
            raise UsageError(f"--model {name} has no model_index.json; give a pipeline folder in diffusers format")
        return str(folder)
    if folder.exists() or not _HUB_ID.fullmatch(name) or folder.parent.is_dir():
        raise UsageError(f"--model {name} is no folder; give a pipeline folder in diffusers format or an id ORG/NAME")
    return name


def pipeline_index(folder: Path) -> dict[str, Any]:
    """What a pipeline folder consists of: each component's library and class.

    Raises:
        UsageError: the folder's index cannot be read.
    """
    try:
        return dict(json.loads((folder / "model_index.json").read_text()))
    except (OSError, ValueError) as error:
        raise UsageError(f"{folder / 'model_index.json'} cannot be read: {one_line(error)}") from error


def check_component(folder: Path, component: str | None) -> None:
    """See that a pipeline folder has a component of that name.

    Raises:
        UsageError: naming those it has.
    """
    names = [name for name, entry in pipeline_index(folder).items() if isinstance(entry, list) and entry[0]]
    if component is not None and component not in names:
        raise UsageError(f"--component {component} is not in this pipeline; choose one of {', '.join(names)}")


def check_inputs(path: str | None) -> None:
    """See that a file of example inputs exists.

    Raises:
        UsageError: it does not; says how to make one.
    """
    if path is not None and not Path(path).is_file():
        raise UsageError(f"--inputs {path} does not exist; torch.save({{'args': (...), 'kwargs': {{...}}}}, {path!r})")


def _world_problems(plan: Plan, world: World | None, nproc: int | None) -> list[str]:
    if world is None:
        return plan.problems()
    if nproc is not None and nproc < 1:
        return [*plan.problems(), f"--nproc {nproc} must be at least 1"]
    if nproc is not None and world.launched:
        return [*plan.problems(), f"{world.size} processes are already launched; leave out --nproc {nproc}"]
    return plan.problems(nproc or world.size)


def plan_from_flags(**flags: Any) -> Plan:
    """A plan from the command line's flags; those not given keep the plan's own defaults."""
    return Plan(**{name: value for name, value in flags.items() if value is not None})
