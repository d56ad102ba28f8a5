"""What can be seen of a pipeline from its folder's small files, before anything heavy is imported or loaded."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

from xdit_compile.errors import UsageError, reason_of

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".msgpack", ".gguf")
_AUTOENCODER = "vae"
_SCALES = ("spatial_compression_ratio", "scale_factor_spatial", "vae_scale_factor")
_CHANNELS = ("block_out_channels", "encoder_block_out_channels", "dim_mult")


def pipeline_index(folder: Path) -> dict[str, Any]:
    """What a pipeline folder consists of: each component's library and class.

    Raises:
        UsageError: the folder's index cannot be read.
    """
    try:
        return dict(json.loads((folder / "model_index.json").read_text()))
    except (OSError, ValueError) as error:
        raise UsageError(f"{folder / 'model_index.json'} cannot be read: {reason_of(error)}") from error


def check_component(folder: Path, component: str | None) -> None:
    """See that a pipeline folder has a component of that name which is a module.

    Raises:
        UsageError: naming those it has.
    """
    if component is None:
        return
    names = list(_components(folder))
    modules = [name for name in names if _is_model(_file_names(folder / name))]
    if component not in (modules or names):
        what = "is no module" if component in names else "is not in this pipeline"
        raise UsageError(f"--component {component} {what}; choose one of {', '.join(modules or names)}")


def check_parts(folder: Path, weights: bool) -> None:
    """See that every component that the index lists is there, with its weights where they are needed.

    Raises:
        UsageError: naming all that is missing.
    """
    found = [problem for name in _components(folder) if (problem := _part_problem(folder / name, weights))]
    if found:
        raise UsageError(f"--model {folder} is not whole: {'; '.join(found)}; copy or download the whole folder")


def check_size(folder: Path, height: int | None, width: int | None, binning: bool) -> None:
    """See that autoencoder and denoiser can divide an image's sides, where their configurations say into what.

    Args:
        height, width: pixels; ``None`` is the pipeline's own choice.
        binning: whether the pipeline may work at another size and resize.

    Raises:
        UsageError: naming the nearest sizes that work.
    """
    multiple = pixel_multiple(folder)
    sides = {"height": height, "width": width}
    wrong = {name: side for name, side in sides.items() if multiple and side is not None and side % multiple}
    if not wrong or not multiple or binning:
        return
    problems = []
    for name, side in wrong.items():
        lower, upper = side // multiple * multiple, -(-side // multiple) * multiple
        nearest = f"{lower} or {upper}" if lower else str(upper)
        problems.append(f"--{name} {side} is no multiple of {multiple}, as this model needs; take {nearest}")
    raise UsageError("; ".join(problems))


def pixel_multiple(folder: Path) -> int | None:
    """The number of pixels that must divide a side: the autoencoder's factor times the denoiser's patch.

    ``None`` where the configurations do not say it.
    """
    components = _components(folder)
    if _AUTOENCODER not in components:
        return None
    factor = _spatial_factor(_configuration(folder / _AUTOENCODER))
    if factor is None:
        return None
    others = [name for name, library in components.items() if library == "diffusers" and name != _AUTOENCODER]
    return factor * math.lcm(*(_patch(_configuration(folder / name)) for name in others))


def makes_videos(folder: Path) -> bool:
    """Whether the autoencoder of a pipeline folder has to do with time, by what its configuration names."""
    return any("temporal" in name for name in _configuration(folder / _AUTOENCODER))


def _components(folder: Path) -> dict[str, str]:
    """Name and library of each component that a pipeline folder must hold."""
    return {
        name: entry[0]
        for name, entry in pipeline_index(folder).items()
        if isinstance(entry, list) and entry and isinstance(entry[0], str)
    }


def _part_problem(folder: Path, weights: bool) -> str | None:
    if not folder.is_dir():
        return f"there is no folder {folder.name}"
    files = _file_names(folder)
    if not files:
        return f"the folder {folder.name} is empty"
    if weights and _is_model(files) and not any(Path(file).suffix in WEIGHTS for file in files):
        return f"the folder {folder.name} has no weights ({', '.join(WEIGHTS[:2])})"
    return None


def _file_names(folder: Path) -> list[str]:
    return [file.name for file in folder.iterdir() if file.is_file()] if folder.is_dir() else []


def _is_model(files: list[str]) -> bool:
    """Whether these are a model's files: tokenizers, processors and schedulers have configurations of other names."""
    return "config.json" in files and not any(re.fullmatch(r"\w+_config\.json|tokenizer\.json", file) for file in files)


def _configuration(folder: Path) -> dict[str, Any]:
    try:
        configuration = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        return {}
    return configuration if isinstance(configuration, dict) else {}


def _spatial_factor(configuration: dict[str, Any]) -> int | None:
    """Pixels of a side that become one latent: said outright, or one halving between any two stages."""
    for name in _SCALES:
        if isinstance(configuration.get(name), int):
            return int(configuration[name])
    for name in _CHANNELS:
        if isinstance(configuration.get(name), list) and configuration[name]:
            return int(2 ** (len(configuration[name]) - 1))
    return None


def _patch(configuration: dict[str, Any]) -> int:
    """Latents along a side of one token; of several numbers the last two are those of height and width."""
    size = configuration.get("patch_size", 1)
    sides = size[-2:] if isinstance(size, list) else [size]
    return math.lcm(*(side for side in sides if isinstance(side, int) and side > 0))
