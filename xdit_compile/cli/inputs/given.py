"""Pictures, the scheduler and other arguments as a loaded pipeline takes them."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from xdit_compile.errors import UsageError, XditCompileError, one_line
from xdit_compile.plan.nearest import did_you_mean

from .annotations import Argument, arguments_of, assigned_to
from .asked import PICTURES, Inputs, texts_of
from .call_source import call_of


def pictures(inputs: Inputs, height: int | None, width: int | None) -> dict[str, Any]:
    """The pictures of a request by the fields that name them; empty where there are none.

    Args:
        height, width: in pixels, which pictures are brought to where that is asked for.

    Raises:
        UsageError: a file is no picture.
    """
    size = (width, height) if inputs.resize_input_images and height and width else None
    loaded = {
        field: [_picture(flag, file, size, "L" if field == "mask_image" else "RGB") for file in getattr(inputs, field)]
        for field, flag in PICTURES.items()
    }
    return {field: found[0] if len(found) == 1 else found for field, found in loaded.items() if found}


def _picture(flag: str, file: str, size: tuple[int, int] | None, mode: str) -> Any:
    from PIL import Image, ImageOps

    try:
        image = Image.open(Path(file)).convert(mode)
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise UsageError(f"{flag} {file} is no picture that can be read: {one_line(error)}") from error
    return image if size is None else ImageOps.fit(image, size)


def further_arguments(pipe: Any, inputs: Inputs) -> dict[str, Any]:
    """The arguments that a request names itself.

    Raises:
        UsageError: the pipeline's call takes no argument of such a name, or no such value; says what it takes.
    """
    if not inputs.assignments:
        return {}
    annotated = arguments_of(call) if (call := call_of(pipe)) is not None else {}
    parameters = list(inspect.signature(type(pipe).__call__).parameters.values())[1:]
    names = [each.name for each in parameters if each.kind is not inspect.Parameter.VAR_KEYWORD]
    return assigned_to({name: annotated.get(name, Argument(None)) for name in names}, texts_of(inputs.assignments))


def put_scheduler(pipe: Any, name: str | None) -> None:
    """Put a scheduler of another class in the place of the pipeline's own, with what that was configured with.

    Raises:
        UsageError: the pipeline has none, or this one does not go with it; says which do.
    """
    if name is None:
        return
    scheduler = getattr(pipe, "scheduler", None)
    if scheduler is None:
        raise UsageError("--scheduler: this pipeline has no scheduler; leave it out")
    kinds = {kind.__name__: kind for kind in [*getattr(scheduler, "compatibles", []), type(scheduler)]}
    if name not in kinds:
        near = did_you_mean(name, kinds) or f"; choose one of {', '.join(sorted(kinds))}"
        raise UsageError(
            f"--scheduler {name} does not go with this pipeline, which has a {type(scheduler).__name__}{near}"
        )
    pipe.scheduler = kinds[name].from_config(scheduler.config)


@contextlib.contextmanager
def naming_assignments(inputs: Inputs) -> Iterator[None]:
    """Have an error of a pipeline's own code name the arguments that were given by ``--set``: one may be the cause.

    Raises:
        XditCompileError: in the place of such an error.
    """
    try:
        yield
    except (TypeError, ValueError, AttributeError, LookupError, AssertionError) as error:
        if not inputs.assignments or isinstance(error, XditCompileError):
            raise
        names = ", ".join(f"--set {name}" for name in texts_of(inputs.assignments))
        raise XditCompileError(
            f"the pipeline stopped, maybe at what {names} gave it: {type(error).__name__}: {one_line(error)}"
        ) from error
