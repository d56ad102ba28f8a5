"""Pictures, the scheduler and other arguments as a loaded pipeline takes them."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from xdit_compile.cli.parsing.choices import did_you_mean
from xdit_compile.errors import UsageError, one_line

from .asked import PICTURES, Inputs, assigned


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
        UsageError: the pipeline's call takes no argument of such a name; says which is near.
    """
    values = assigned(inputs.assignments)
    parameters = inspect.signature(type(pipe).__call__).parameters
    names = [name for name, each in list(parameters.items())[1:] if each.kind is not inspect.Parameter.VAR_KEYWORD]
    for name in values:
        if name not in names:
            near = did_you_mean(name, names) or f"; it takes {', '.join(names)}"
            raise UsageError(f"--set {name}: this pipeline takes no argument of that name{near}")
    return values


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
