"""The small files of a model of the Hub, fetched without its weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from xdit_compile.errors import XditCompileError, one_line

CONFIGURATIONS = ("model_index.json", "*/config.json")
"""What a pipeline consists of, and what its models are."""


def fetched(name: str, cache_dir: str | None, patterns: Sequence[str] = CONFIGURATIONS) -> Path:
    """The folder in the Hub's cache with a model's files of some patterns; what is there already is not fetched again.

    Args:
        name: ORG/NAME.
        cache_dir: where models of the Hub are kept; ``None`` is the Hub's own choice.

    Raises:
        XditCompileError: they cannot be fetched.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import tqdm

    class Unseen(tqdm):
        def __init__(self, *arguments: Any, **settings: Any):
            super().__init__(*arguments, **{**settings, "disable": True})

    try:
        folder = snapshot_download(name, cache_dir=cache_dir, allow_patterns=list(patterns), tqdm_class=Unseen)
        return Path(folder)
    except Exception as error:
        raise XditCompileError(f"--model {name} cannot be fetched: {one_line(error)}") from error
