"""Pictures become files: whole or not at all, with what they were made with; where that fails, somewhere safe."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from xdit_compile import __version__
from xdit_compile.cli.options.destination import FORMATS, LATENTS, check_format, numbered
from xdit_compile.cli.options.request import PipelineRequest
from xdit_compile.errors import UsageError, XditCompileError, one_line

from .output import Latents, Pixels

SOFTWARE = "Software"
"""Key under which PNG files name the program."""
_DESCRIPTION, _PROGRAM = 0x010E, 0x0131
"""Tags of EXIF: what an image shows, and the program that made it."""

_Written = TypeVar("_Written")

Facts = Mapping[str, Any]
"""What a picture was made with, by names: plain data."""


def made_with(request: PipelineRequest, prompt: str, seed: int, steps: int | None) -> dict[str, Any]:
    """What a picture is made with, as its file tells: only what was asked for, or is known."""
    import diffusers
    import torch

    plan = request.plan
    facts = {
        "prompt": prompt,
        "negative_prompt": request.negative_prompt,
        "seed": seed,
        "num_inference_steps": steps,
        "guidance_scale": request.guidance_scale,
        "model": request.model or "the embedded pipeline",
        "plan": " ".join(f"{name} {getattr(plan, name)}" for name in plan.used) or "one process",
        SOFTWARE: f"xdit_compile {__version__}, torch {torch.__version__}, diffusers {diffusers.__version__}",
    }
    return {name: fact for name, fact in facts.items() if fact is not None}


def save(
    made: Pixels | Latents, output: str, fps: int, about: Sequence[Facts] = (), overwrite: bool = False
) -> list[Path]:  # fmt: skip
    """Write pictures as `write` does, or else into a new folder elsewhere.

    Raises:
        XditCompileError: they could not be written where they should be; says where they are.
    """
    try:
        return write(made, output, fps, about, overwrite)
    except Exception as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else one_line(error)
        kept = _kept_elsewhere(made, output, fps, about)
        what = "latents" if isinstance(made, Latents) else "picture" if len(made.values) == 1 else "pictures"
        place = f"the {what} went to {kept}" if kept else f"the {what} could be kept nowhere else and is lost"
        begin = "" if isinstance(error, UsageError) else f"--output {output} cannot be written: "
        raise XditCompileError(f"{begin}{reason}; {place}") from error


def write(
    made: Pixels | Latents, output: str, fps: int, about: Sequence[Facts] = (), overwrite: bool = False
) -> list[Path]:  # fmt: skip
    """Write every image or video and return the files: ``out.png``, then ``out-1.png`` and so on; latents in one.

    A file appears whole or not at all.

    Args:
        about: what each of them was made with, to be written into it; nothing is where this is empty.
        overwrite: whether files that are there may go.

    Raises:
        UsageError: the file's ending is none of such pictures.
        OSError: a file cannot be written, or is there.
    """
    if isinstance(made, Latents):
        with whole_file(Path(output), overwrite) as temporary:
            _write_latents(made, temporary, about)
        return [Path(output)]
    check_format(output, "pil", "videos" if made.is_video else "images")
    files = numbered(output, len(made.values))
    for index, (item, file) in enumerate(zip(made.bytes(), files, strict=True)):
        with whole_file(file, overwrite) as temporary:
            (_write_video if made.is_video else _write_image)(item, temporary, fps, about[index] if about else {})
    return files


def _kept_elsewhere(made: Pixels | Latents, output: str, fps: int, about: Sequence[Facts]) -> str | None:
    """The files that pictures went to, in the first folder that takes them; a simpler format where theirs cannot be."""
    ending = Path(output).suffix.lower()
    suited = LATENTS if isinstance(made, Latents) else FORMATS["videos" if made.is_video else "images"]
    for suffix in dict.fromkeys([ending if ending in suited else suited[0], suited[0], suited[-1]]):
        name = f"{Path(output).stem[:100]}{suffix}"
        if files := elsewhere(lambda place: write(made, str(place / name), fps, about)):  # noqa: B023
            return ", ".join(map(str, files))
    return None


def elsewhere(written: Callable[[Path], _Written]) -> _Written | None:
    """What ``written`` returns of the first new folder, in one of three places, that takes everything; else None."""
    for parent in (tempfile.gettempdir, _cache_folder, os.getcwd):
        with contextlib.suppress(Exception):
            os.makedirs(parent(), exist_ok=True)
            place = Path(tempfile.mkdtemp(prefix="xdit-compile-", dir=parent()))
            with _removed_if_empty(place):
                return written(place)
    return None


def _cache_folder() -> str:
    import platformdirs

    return str(platformdirs.user_cache_path("xdit_compile").with_name("xdit_compile_pictures"))


@contextlib.contextmanager
def _removed_if_empty(folder: Path) -> Iterator[None]:
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            folder.rmdir()


@contextlib.contextmanager
def whole_file(file: Path, overwrite: bool = False) -> Iterator[Path]:
    """A path to write to; the file appears, whole, once the block ends without an error. A link leads to its target.

    It has the mode that any new file has, whoever wrote it. Its folder is made where it is gone.

    Raises:
        FileExistsError: it is there, and may not be overwritten.
    """
    target = Path(os.path.realpath(file))
    temporary = target.with_name(f".xdit-compile-{os.getpid()}{target.suffix}")
    try:
        target.parent.mkdir(exist_ok=True)
        temporary.touch()
        mode = temporary.stat().st_mode & 0o777
        yield temporary
        os.chmod(temporary, mode)
        if not overwrite and os.path.lexists(file):
            raise FileExistsError(0, "something came there meanwhile", str(file))
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def _write_latents(made: Latents, file: Path, about: Sequence[Facts]) -> None:
    from safetensors.numpy import save_file

    metadata = {"images": json.dumps(list(about)), **_texts(about[0])} if about else None
    save_file({"latents": np.ascontiguousarray(made.values)}, file, metadata)


def _write_image(item: np.ndarray, file: Path, fps: int, facts: Facts) -> None:
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    image = Image.fromarray(item[..., 0] if item.shape[-1] == 1 else item)
    if file.suffix.lower() == ".png":
        texts = PngInfo()
        for name, text in _texts(facts).items():
            texts.add_itxt(name, text) if not text.isascii() else texts.add_text(name, text)
        image.save(file, pnginfo=texts)
        return
    exif = Image.Exif()
    if facts:
        exif[_DESCRIPTION], exif[_PROGRAM] = json.dumps(dict(facts)), str(facts.get(SOFTWARE, ""))
    jpeg = file.suffix.lower() in FORMATS["images"][1:3]
    (image.convert("RGB") if jpeg else image).save(file, exif=exif)


def _write_video(frames: np.ndarray, file: Path, fps: int, facts: Facts) -> None:
    from PIL import Image

    comment = json.dumps(dict(facts)) if facts else ""
    if file.suffix.lower() == ".gif":
        first, *rest = [Image.fromarray(frame) for frame in frames]
        first.save(file, save_all=True, append_images=rest, duration=round(1000 / fps), loop=0, comment=comment)
        return
    import imageio
    from imageio_ffmpeg import count_frames_and_secs

    tags = ["-metadata", f"comment={comment}", "-metadata", f"title={facts.get('prompt', '')}"] if facts else []
    writer: Any = imageio.get_writer(file, fps=fps, macro_block_size=1, output_params=tags)
    with writer:
        for frame in frames:
            writer.append_data(_even(frame))
    _check_video(file, len(frames), count_frames_and_secs)


def _check_video(file: Path, frames: int, count: Any) -> None:
    """See that a video is whole: ffmpeg says nothing where a disk is full.

    Raises:
        OSError: it is not.
    """
    try:
        there = count(str(file))[0]
    except RuntimeError:
        there = 0
    if there != frames:
        raise OSError(0, f"the file was cut short, with {there} of {frames} frames; see whether there is room")


def _even(frame: np.ndarray) -> np.ndarray:
    """H.264 in 4:2:0 needs even sides: repeat the last row or column where one is odd."""
    height, width = frame.shape[:2]
    return np.pad(frame, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")


def _texts(facts: Facts) -> dict[str, str]:
    """Facts as text: JSON where they are none."""
    return {name: fact if isinstance(fact, str) else json.dumps(fact) for name, fact in facts.items()}
