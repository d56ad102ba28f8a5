"""What is asked of ComfyUI itself while a node runs: its progress bar, its *Interrupt*, its memory.

Nothing of ComfyUI is imported before a node runs, so that the folder can be read without it.
"""

from __future__ import annotations

import contextlib
import logging
import os
from typing import Any

log = logging.getLogger(__name__)
PREVIEW_SIDE = 512
"""Pixels; ComfyUI scales greater previews down to it."""


def look() -> None:
    """See whether the user pressed *Interrupt*.

    Raises:
        comfy.model_management.InterruptProcessingException: they did.
    """
    from comfy.model_management import throw_exception_if_processing_interrupted

    throw_exception_if_processing_interrupted()


def say(words: str) -> None:
    """Show words on the node that runs, where ComfyUI can."""
    log.debug(words)
    with contextlib.suppress(ImportError):
        from comfy_execution.utils import get_executing_context
        from server import PromptServer

        context = get_executing_context()
        if context is not None and PromptServer.instance is not None:
            PromptServer.instance.send_progress_text(words, context.node_id)


def folder_of(model: str) -> str:
    """Where ComfyUI keeps a pipeline of that name, ``models/diffusers/NAME``; the name itself if it is not there."""
    with contextlib.suppress(ImportError, KeyError):
        from folder_paths import get_folder_paths

        for root in get_folder_paths("diffusers"):
            if model and os.path.isfile(os.path.join(root, model, "model_index.json")):
                return os.path.join(root, model)
    return model


def make_room() -> None:
    """Have ComfyUI take its own models off the device, for processes that are about to load theirs."""
    from comfy.model_management import soft_empty_cache, unload_all_models

    unload_all_models()
    soft_empty_cache()


class Bar:
    """The progress bar of the node that runs."""

    def __init__(self) -> None:
        self._bar: Any = None

    def show(self, step: int, steps: int, picture: Any = None) -> None:
        """So many steps are done.

        Args:
            picture: what it looks like after them, as PIL has it.
        """
        if self._bar is None:
            from comfy.utils import ProgressBar

            self._bar = ProgressBar(steps)
        preview = None if picture is None else ("JPEG", picture, PREVIEW_SIDE)
        self._bar.update_absolute(step, steps, preview)
