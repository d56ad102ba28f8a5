"""What a request says of pictures, the scheduler and other arguments, and what can be seen to be wrong with it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path

from xdit_compile.errors import UsageError, reason_of
from xdit_compile.plan.nearest import did_you_mean

from .call_source import scheduler_classes

PICTURES = {"input_images": "--image", "mask_image": "--mask_image", "control_image": "--control_image"}
"""The fields that name pictures, and the flags by which they are given."""


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What goes into a pipeline besides text.

    Args:
        input_images: files of pictures that it starts from.
        mask_image: the file of a mask: white is painted anew.
        control_image: files of pictures for control nets.
        resize_input_images: bring all of these to the height and width that are asked for, cut to shape.
        strength: how much of the picture is made anew, 0 to 1.
        scheduler: the class of diffusers that takes the place of the pipeline's own.
        assignments: further arguments of the pipeline's call, each as ``name=value``.
    """

    input_images: tuple[str, ...] = ()
    mask_image: tuple[str, ...] = ()
    control_image: tuple[str, ...] = ()
    resize_input_images: bool = False
    strength: float | None = None
    scheduler: str | None = None
    assignments: tuple[str, ...] = ()

    def input_problems(self, has_size: bool) -> Iterator[str]:
        """Everything that is wrong with these, each as one clause.

        Args:
            has_size: whether a height and a width are asked for.
        """
        named = [(flag, file) for field, flag in PICTURES.items() for file in getattr(self, field)]
        for flag, file in named:
            if not Path(file).is_file():
                yield f"{flag} {file} is no file; give pictures that are on this machine"
        if self.scheduler is not None and (classes := scheduler_classes()) and self.scheduler not in classes:
            near = did_you_mean(self.scheduler, classes) or "; give a class's name, such as DDIMScheduler"
            yield f"--scheduler {self.scheduler}: the installed diffusers has no scheduler of that name{near}"
        if self.resize_input_images and not (named and has_size):
            yield "--resize_input_images needs a picture (--image, --mask_image, --control_image), --height and --width"
        if self.strength is not None and not (math.isfinite(self.strength) and 0 <= self.strength <= 1):
            yield f"--strength {self.strength} must lie between 0, the picture as it is, and 1, one made anew"
        if self.mask_image and not self.input_images:
            yield "--mask_image says what of a picture is painted anew; give the picture with --image"
        try:
            names = texts_of(self.assignments)
        except UsageError as error:
            yield str(error)
        else:
            flags = {field.name for field in dataclasses.fields(self)}
            yield from (f"--set {name}: give --{name}, which is checked" for name in names if name in flags)


def texts_of(assignments: tuple[str, ...]) -> dict[str, str]:
    """The texts that arguments are given by their names.

    Raises:
        UsageError: one has no name, or a name is given twice.
    """
    texts: dict[str, str] = {}
    for each in assignments:
        name, equals, text = each.partition("=")
        name = name.strip()
        if not equals or not name.isidentifier():
            raise UsageError(f"--set {each} must be NAME=VALUE, such as true_cfg_scale=4.0")
        if name in texts:
            raise UsageError(f"--set gives {name} twice; leave one out")
        texts[name] = text.strip()
    return texts


def check_inputs(path: str | None) -> None:
    """See that a file of example inputs exists, and begins as an archive or a pickle of ``torch.save`` does.

    Raises:
        UsageError: it does not; says how to make one.
    """
    if path is None:
        return
    if not Path(path).is_file():
        raise UsageError(f"--inputs {path} is no file; {_make(path)}")
    try:
        with open(path, "rb") as file:
            first = file.read(1)
    except OSError as error:
        raise UsageError(f"--inputs {path} cannot be read: {reason_of(error)}") from error
    if first not in (b"P", b"\x80"):
        raise UsageError(not_saved(path))


def not_saved(path: str) -> str:
    """What is wrong with a file of example inputs that torch cannot read."""
    return f"--inputs {path} is no file of torch.save with tensors and plain values alone; {_make(path)}"


def _make(path: str) -> str:
    return f"make one with {how_to_save(path)}"


def how_to_save(path: str) -> str:
    """The line of Python that makes a file of example inputs."""
    return f"torch.save({{'args': (...), 'kwargs': {{...}}}}, {path!r})"


def prompts_in(path: str, flag: str) -> list[str]:
    """The prompts in a file, one a line; empty lines do not count.

    Args:
        flag: by which the file was named.

    Raises:
        UsageError: the file cannot be read, or holds none.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except UnicodeError as error:
        raise UsageError(f"{flag} {path} is no text file; write prompts one a line, in UTF-8") from error
    except OSError as error:
        raise UsageError(f"{flag} {path} cannot be read: {reason_of(error)}") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UsageError(f"{flag} {path} holds no prompt; write one a line")
    return prompts
