"""What a command asks for, and every reason against it that can be seen before anything heavy is imported."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Self

from xdit_compile.cli.inputs.annotations import Argument, arguments_of, assigned_to
from xdit_compile.cli.inputs.asked import Inputs, texts_of
from xdit_compile.cli.inputs.call_source import call_in_folder
from xdit_compile.distributed.world import World
from xdit_compile.errors import UsageError
from xdit_compile.plan import Plan
from xdit_compile.plan.backend_options import parsed
from xdit_compile.plan.methods import METHODS, Method
from xdit_compile.plan.nearest import unknown
from xdit_compile.plan.requirements import too_old
from xdit_compile.weights.model_folder import check_parts, check_size

from .destination import OUTPUT_TYPES, check_format, check_made, check_place, numbered, settle, suffixes_for
from .repeats import Repeats, check_memory_savers
from .result_kind import kind_in_folder

DTYPES = {
    "float32": "float32",
    "fp32": "float32",
    "bfloat16": "bfloat16",
    "bf16": "bfloat16",
    "float16": "float16",
    "fp16": "float16",
}
DEVICES = ("auto", "cpu", "cuda")
DEMO_PIPELINE = Path(__file__).parent.parent / "demo_pipeline"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


@dataclasses.dataclass(frozen=True)
class PipelineRequest:
    """What every command that runs a pipeline asks for. ``None`` leaves a value to the pipeline's own default."""

    plan: Plan = dataclasses.field(default_factory=Plan)
    model: str | None = None
    negative_prompt: str | None = None
    height: int | None = None
    width: int | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    max_sequence_length: int | None = None
    use_resolution_binning: bool | None = None
    seed: int = 42
    dtype: str = "auto"
    device: str = "auto"
    debug: bool = False
    quiet: bool = False
    verbose: bool = False
    json: bool = False
    download_dir: str | None = None
    trust_remote_code: bool = False
    enable_model_cpu_offload: bool = False
    enable_sequential_cpu_offload: bool = False
    enable_slicing: bool = False
    enable_tiling: bool = False
    force: bool = False
    method_chosen: bool = False
    """Whether the plan's method was chosen for a number of processes that came without one."""

    counts: ClassVar[tuple[str, ...]] = ("height", "width", "num_inference_steps", "max_sequence_length")
    """Fields that must be at least 1."""

    def to_json(self) -> str:
        """The request as one line, for the processes that a launcher starts."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The request that ``to_json`` wrote."""
        fields = json.loads(text)
        return cls(plan=Plan(**_tuples(fields.pop("plan"))), **_tuples(fields))

    @property
    def binning(self) -> bool | None:
        """Whether the pipeline may work at the nearest of its own sizes and resize: not with a size that was asked for,
        unless that was asked for too."""
        asked = self.height is not None or self.width is not None
        return False if self.use_resolution_binning is None and asked else self.use_resolution_binning

    def check(self, world: World | None, nproc: int | None = None, weights: bool = True) -> None:
        """Look at everything that needs no model; without a ``world`` any number of processes will do.

        Args:
            weights: whether the command reads the model's weights.

        Raises:
            UsageError: naming every problem at once.
        """
        problems = [*too_old(), *_world_problems(self.plan, world, nproc)]
        problems += [
            *self._number_problems(),
            *self._choice_problems(),
            *self._offload_problems(),
            *self._plan_problems(),
        ]
        for check in (lambda: self._check_model(weights), self._check_savers, *self._more_checks()):
            try:
                check()
            except UsageError as error:
                problems.append(str(error))
        if problems:
            raise UsageError("; ".join(problems))

    def _more_checks(self) -> list[Callable[[], None]]:
        return []

    def settled(self, world: World) -> Self:
        """The request once its files were seen to be free and writable; this one has none."""
        return self

    def _number_problems(self) -> list[str]:
        problems = []
        for name in self.counts:
            value = getattr(self, name)
            if value is not None and value < 1:
                problems.append(f"--{name} {value} must be at least 1")
        if self.guidance_scale is not None and not math.isfinite(self.guidance_scale):
            problems.append(f"--guidance_scale {self.guidance_scale} must be a finite number")
        if not 0 <= self.seed < 2**63:
            problems.append(f"--seed {self.seed} must lie between 0 and 2**63 - 1")
        return problems

    def _choice_problems(self) -> list[str]:
        problems = []
        if self.dtype != "auto" and self.dtype not in DTYPES:
            problems.append(unknown(f"--dtype {self.dtype}", self.dtype, ("auto", *DTYPES)))
        if self.device not in DEVICES:
            problems.append(unknown(f"--device {self.device}", self.device, DEVICES))
        return problems

    def _offload_problems(self) -> list[str]:
        problems = []
        if self.enable_model_cpu_offload and self.enable_sequential_cpu_offload:
            problems.append(
                "--enable_model_cpu_offload and --enable_sequential_cpu_offload exclude each other; give one"
            )
        if self.enable_sequential_cpu_offload and self.plan.world_size > 1:
            problems.append(
                "--enable_sequential_cpu_offload brings one layer at a time, but a split graph takes all weights at "
                "once; give --enable_model_cpu_offload or --tensor_parallel_degree instead"
            )
        if self.enable_model_cpu_offload and self.plan.tensor > 1:
            problems.append(
                f"--enable_model_cpu_offload moves whole models, but with --tensor_parallel_degree {self.plan.tensor} "
                "a rank holds slices; leave one of them out"
            )
        return problems

    def _plan_problems(self) -> list[str]:
        """What of the plan does not go with the numbers of this request."""
        steps, warmup = self.num_inference_steps, self.plan.warmup_steps
        if self.plan.is_stale and steps is not None and 0 < steps < warmup:
            return [
                f"--warmup_steps {warmup} is more than --num_inference_steps {steps}; give --warmup_steps {steps} for "
                "an exact picture, or more steps"
            ]
        return []

    def with_method(self, world: World, nproc: int | None) -> Self:
        """The request with Ulysses over all processes, where there are several and the plan has a use for one."""
        ranks = nproc if nproc is not None and not world.launched else world.size
        if ranks < 2 or self.plan.world_size != 1:
            return self
        return dataclasses.replace(self, plan=dataclasses.replace(self.plan, ulysses=ranks), method_chosen=True)

    def _check_savers(self) -> None:
        check_memory_savers(self.enable_tiling, self.enable_slicing, self.plan.vae)

    def _check_model(self, weights: bool) -> None:
        """A folder is looked into; what an id of the Hub stands for is seen when it is fetched."""
        if (folder := Path(find_model(self.model))).is_dir():
            check_parts(folder, weights)
            self.check_size(folder)

    def check_kind(self, kind: str | None) -> None:
        """See that a pipeline makes what is asked for, where it is known what it makes, as `result_kind` has it.

        Raises:
            UsageError: it does not.
        """
        check_made(kind)

    def check_size(self, folder: Path) -> None:
        """See that a folder's pipeline makes pictures of this size; a `UsageError` names the nearest that it makes."""
        sides = [side if side is None or side > 0 else None for side in (self.height, self.width)]
        check_size(folder, sides[0], sides[1], bool(self.binning))


@dataclasses.dataclass(frozen=True)
class Request(Inputs, Repeats, PipelineRequest):
    """One picture or video to make."""

    prompt: tuple[str, ...] = ("a large red star in the center on a striped mint background",)
    num_frames: int | None = None
    fps: int = 8
    num_images_per_prompt: int | None = None
    output: str | None = None
    output_type: str = "pil"
    overwrite: bool = False
    no_metadata: bool = False
    compare: bool = False

    counts: ClassVar[tuple[str, ...]] = (
        *PipelineRequest.counts,
        "num_frames",
        "fps",
        "num_images_per_prompt",
        "batch_size",
        "num_iterations",
    )

    def _more_checks(self) -> list[Callable[[], None]]:
        return [self._check_prompt, self._check_output, self._check_repeats, self._check_assignments]

    @property
    def seeds(self) -> int | list[int]:
        """One seed an image, counted up from ``seed``, so that how images are shared out changes none of them."""
        count = len(self.prompt) * (self.num_images_per_prompt or 1)
        return self.seed if count == 1 else [self.seed + image for image in range(count)]

    def _check_prompt(self) -> None:
        if not self.prompt:
            raise UsageError("--prompt is missing; say what to show")
        says_something = self.input_images or self.control_image or all(text.strip() for text in self.prompt)
        if not says_something and ((arguments := self._arguments()) is None or "prompt" in arguments):
            raise UsageError("--prompt is empty; say what to show")

    def _arguments(self) -> dict[str, Argument] | None:
        """The arguments of the pipeline's call, as its source has them; None where that is not here."""
        with contextlib.suppress(UsageError):
            folder = Path(find_model(self.model))
            if folder.is_dir() and (call := call_in_folder(folder)) is not None:
                return arguments_of(call)
        return None

    def _check_assignments(self) -> None:
        """See that the pipeline takes what ``--set`` gives, which does not wait for its weights."""
        try:
            texts = texts_of(self.assignments)
        except UsageError:
            return
        further = {name: text for name, text in texts.items() if not hasattr(self, name)}
        if further and (arguments := self._arguments()) is not None:
            assigned_to(arguments, further)

    def _check_repeats(self) -> None:
        has_size = self.height is not None and self.width is not None
        if problems := [*self.repeat_problems(), *self.input_problems(has_size)]:
            raise UsageError("; ".join(problems))

    def check_kind(self, kind: str | None) -> None:
        """The same, and that its file's ending goes with it."""
        check_made(kind)
        if self.output is not None:
            check_format(self.output, self.output_type, kind)

    @property
    def kind(self) -> str | None:
        """What the pipeline makes, as `result_kind` has it; None where its folder is not here or silent."""
        folder = Path(find_model(self.model))
        return kind_in_folder(folder) if folder.is_dir() else None

    def file(self, kind: str | None) -> str:
        """The file to write, where a pipeline makes what ``kind`` says."""
        return self.output or str(self.folder / f"out{suffixes_for(self.output_type, kind)[0]}")

    def written(self, kind: str | None) -> list[Path]:
        """All files to write."""
        pictures = len(self.prompt) * (self.num_images_per_prompt or 1) if self.output_type == "pil" else 1
        return [*numbered(self.file(kind), pictures), *([self.trace] if self.profile else [])]

    def _check_output(self) -> None:
        if self.output_type not in OUTPUT_TYPES:
            raise UsageError(unknown(f"--output_type {self.output_type}", self.output_type, OUTPUT_TYPES))
        if self.output is not None:
            if self.output_directory is None or Path(self.output).parent != self.folder:
                check_place(self.output)
            check_format(self.output, self.output_type, self._likely_kind())

    def _likely_kind(self) -> str | None:
        with contextlib.suppress(UsageError):
            return self.kind
        return None

    def settled(self, world: World) -> Self:
        """The request with the file that it stands for, seen to be free and writable, or given free by who was asked.

        Raises:
            UsageError, XditCompileError: as `destination.settle`, or the pipeline makes nothing that can be written.
        """
        return self.settled_for(self.kind, world)

    def settled_for(self, kind: str | None, world: World) -> Self:
        """The same where it is known what the pipeline makes; with neither that nor a file's name it stays open."""
        check_made(kind)
        if kind is None and self.output is None and self.output_type == "pil":
            return self
        check_format(self.file(kind), self.output_type, kind)
        may = settle(self.written(kind), self.overwrite, world)
        return dataclasses.replace(self, output=self.file(kind), overwrite=may)


def _tuples(fields: dict[str, Any]) -> dict[str, Any]:
    """Fields as they were before JSON, which has lists only."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}


def find_model(name: str | None) -> str:
    """The folder or Hub id to load: the embedded pipeline where none is named.

    Raises:
        UsageError: ``name`` is neither a folder in diffusers format nor of the form ``org/name``.
    """
    if name is None:
        if not (DEMO_PIPELINE / "model_index.json").is_file():
            raise UsageError("the embedded pipeline is missing; install again, or give --model FOLDER_OR_ID")
        return str(DEMO_PIPELINE)
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "model_index.json").is_file():
            raise UsageError(f"--model {name} has no model_index.json; give a pipeline folder in diffusers format")
        return str(folder)
    if folder.exists() or not _HUB_ID.fullmatch(name) or folder.parent.is_dir():
        raise UsageError(f"--model {name} is no folder; give a pipeline folder in diffusers format or an id ORG/NAME")
    return name


def _world_problems(plan: Plan, world: World | None, nproc: int | None) -> list[str]:
    if world is None:
        return plan.problems()
    if nproc is not None and nproc < 1:
        return [*plan.problems(), f"--nproc {nproc} must be at least 1"]
    if nproc is not None and world.launched:
        return [*plan.problems(), f"{world.size} processes are already launched; leave out --nproc {nproc}"]
    if nproc is None or plan.world_size == nproc or plan.problems():
        return plan.problems(nproc or world.size)
    needed = plan.world_size
    return [
        f"{plan.degrees_shown()} needs {needed} process{'es' if needed > 1 else ''}, and --nproc {nproc} asks for "
        f"{nproc}; give --nproc {needed}, or change the degrees"
    ]


def plan_from_flags(**flags: Any) -> Plan:
    """A plan from the command line's flags, which have xDiT's names and spellings."""
    degrees: dict[str, Any] = {method.name: _degree(method, flags[method.flag]) for method in METHODS}
    return Plan(
        **degrees,
        patches=flags["num_pipeline_patch"],
        warmup_steps=flags["warmup_steps"],
        stage_layers=_numbers(flags["attn_layer_num_for_pp"]),
        split_scheme="all" if flags["split_scheme"] == "row" else flags["split_scheme"],
        mesh_order=tuple(name.strip() for name in flags["mesh_order"].split(",")),
        backend=flags["backend"],
        compile_mode=flags["compile_mode"],
        backend_options=parsed(flags["backend_options"]),
        without=tuple(name.strip() for name in flags["without"].split(",") if name.strip()),
        attention=flags["attention"],
        link=flags["link"],
        vae=flags["vae_provider"] if flags["use_parallel_vae"] else "whole",
        vae_degree=flags["vae_parallel_degree"],
        vae_memory=flags["vae_memory"],
        timeout_s=flags["timeout"],
        compile=flags["compile"],
        cache=_cache(flags["cache_dir"], flags["no_cache"]),
    )


def _cache(folder: str | None, none: bool) -> str | None:
    """Where compiled graphs are kept.

    Raises:
        UsageError: somewhere, and nowhere.
    """
    if folder is not None and none:
        raise UsageError(f"--cache_dir {folder} and --no_cache exclude each other; give one")
    return None if none else folder or "auto"


def _degree(method: Method, value: int | bool) -> int:
    """The degree that a flag's value stands for."""
    return value if method.flag_degree is None else method.flag_degree if value else 1


def _numbers(text: str | None) -> tuple[Any, ...] | None:
    """Whole numbers of a list such as ``10,9``; what is none is left as text, for the plan to refuse."""
    if text is None:
        return None
    return tuple(int(each) if each.strip().isdigit() else each for each in text.replace(" ", ",").split(",") if each)
