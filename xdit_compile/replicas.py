"""Data parallel: the images of one pipeline call are shared out over replicas, and their results joined in order."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from .agreement import Agreement
from .errors import AgreementError, UsageError
from .kernels.groups import answering, process_group
from .mesh import Mesh
from .results import copied, found_in, replaced
from .shards import share

DIMENSION = "data"
_PER_IMAGE = "num_images_per_prompt"
_OTHER_PER_IMAGE = ("num_videos_per_prompt",)
_SHARED_OUT = ("prompt", "embeds", "mask", "latents", "generator", "image", "video", "class_labels")
_NOT_SHARED_OUT = ("num_", "output", "callback", "guidance")


@dataclasses.dataclass(frozen=True)
class Images:
    """The images of one call: ``prompts`` entries, each wanted ``each`` times, counted in the order of the result."""

    prompts: int
    each: int

    @property
    def total(self) -> int:
        """Images in all."""
        return self.prompts * self.each


class Replicas:
    """This rank's place among the replicas.

    Args:
        mesh: this rank's place.
        agreement: the talk of all ranks.
    """

    def __init__(self, mesh: Mesh, agreement: Agreement):
        self._agreement = agreement
        self._count = mesh.size(DIMENSION)
        self._index = mesh.coordinate(DIMENSION)
        self._group = mesh.group(DIMENSION)

    def arguments(self, call: Any, args: tuple, kwargs: Mapping[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """The arguments with which this replica makes its share of the images.

        Every image becomes an entry of its own: lists and tensors with one entry a prompt are repeated as
        ``num_images_per_prompt`` asks, those with one an image are cut. A single generator gives every replica but the
        first a stream of its own, so only a list of generators gives the same images as one process does.

        Args:
            call: the pipeline's own ``__call__``.

        Raises:
            UsageError: there are fewer images than replicas.
        """
        if self._count == 1:
            return args, dict(kwargs)
        bound = inspect.signature(call).bind_partial(*args, **kwargs)
        given = dict(bound.arguments)
        for parameter in bound.signature.parameters.values():
            if parameter.kind is parameter.VAR_KEYWORD:
                given.update(given.pop(parameter.name, {}))
        images = count_images(given)
        if images.total < self._count:
            raise UsageError(
                f"data={self._count} replicas but {images.total} image{'s' if images.total > 1 else ''}: give more "
                f"prompts or --{_PER_IMAGE}, or use fewer replicas"
            )
        mine = range(*share(images.total, self._count, self._index))
        return (), {name: self._part(name, value, images, mine) for name, value in given.items()}

    def _part(self, name: str, value: Any, images: Images, mine: range) -> Any:
        if name in (_PER_IMAGE, *_OTHER_PER_IMAGE):
            return 1
        if isinstance(value, torch.Generator):
            return value if self._index == 0 else _stream(value, self._index)
        if name.startswith(_NOT_SHARED_OUT) or not any(word in name for word in _SHARED_OUT):
            return value
        if isinstance(value, str):
            return [value] * len(mine)
        return _entries(value, images, mine)

    def joined(self, result: Any, interrupted: bool = False) -> Any:
        """All images in order on the ranks of the first replica; the others keep their own.

        Args:
            result: what the pipeline returned on this rank.
            interrupted: whether it was stopped before its last step.

        Raises:
            AgreementError: another rank failed, or was interrupted where this one was not.
        """
        if self._count == 1:
            return result
        for rank, other in self._agreement.exchange("the images", interrupted, everyone=True).items():
            if other != interrupted:
                stopped, other_one = (rank, self._agreement.rank) if other else (self._agreement.rank, rank)
                raise AgreementError(
                    f"rank {stopped} was interrupted and rank {other_one} was not; interrupt all or none"
                )
        group = process_group(self._group)
        parts: list[Any] | None = [None] * self._count if self._index == 0 else None
        with answering(group, "a gather of images"):
            dist.gather_object(sent(result), parts, group_dst=0, group=group)
        return result if parts is None else join(result, parts)


def count_images(given: Mapping[str, Any]) -> Images:
    """How many images the arguments of a call ask for."""
    each = next((int(given[name]) for name in (_PER_IMAGE, *_OTHER_PER_IMAGE) if given.get(name)), 1)
    for name in ("prompt", "prompt_embeds", "class_labels"):
        value = given.get(name)
        if isinstance(value, list | tuple):
            return Images(len(value), each)
        if isinstance(value, torch.Tensor):
            return Images(value.shape[0], each)
    return Images(1, each)


def _entries(value: Any, images: Images, mine: range) -> Any:
    """This replica's entries of something with one entry an image or a prompt; anything else stays whole."""
    length = value.shape[0] if isinstance(value, torch.Tensor) and value.ndim else None
    length = len(value) if isinstance(value, list | tuple) else length
    if length == images.total:
        wanted = list(mine)
    elif length == images.prompts:
        wanted = [image // images.each for image in mine]
    else:
        return value
    return value[wanted] if isinstance(value, torch.Tensor) else [value[at] for at in wanted]


def _stream(generator: torch.Generator, index: int) -> torch.Generator:
    """Another replica's stream: seeded by the generator's next number, so it follows its state."""
    state = generator.get_state()
    (number,) = torch.randint(2**62, (1,), generator=generator, device=generator.device).tolist()
    generator.set_state(state)
    return torch.Generator(generator.device).manual_seed((number + index) % 2**63)


_ENTRIES = (torch.Tensor, np.ndarray, list)
"""What has an entry for each image."""


def sent(result: Any) -> list[Any]:
    """What a result holds an entry of for each image, of a kind that every process can read."""
    return [copied(entries, torch.Tensor, torch.Tensor.cpu) for entries in found_in(result, _ENTRIES)]


def join(result: Any, parts: Sequence[list[Any]]) -> Any:
    """A result with the entries of all replicas, in their order, in the place of this one's; the rest stays.

    Args:
        parts: of every replica what it `sent`.

    Raises:
        UsageError: a replica has nothing where another has entries.
    """
    if len({len(part) for part in parts}) > 1:
        raise UsageError("replicas returned results with other fields than each other; use data=1")
    pieces = zip(*parts, strict=True)
    return replaced(result, _ENTRIES, lambda own: _concatenated(own, next(pieces)))


def _concatenated(own: Any, pieces: Sequence[Any]) -> Any:
    if isinstance(own, list):
        return [entry for piece in pieces for entry in piece]
    if own.ndim == 0:
        return own
    return torch.cat(list(pieces)).to(own.device) if isinstance(own, torch.Tensor) else np.concatenate(pieces)
