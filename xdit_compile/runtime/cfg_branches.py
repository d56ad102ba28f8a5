"""Classifier-free guidance over ranks for pipelines that call the denoiser once for each branch.

The first call of a step returns deferred tensors; once as many calls wait as there are ranks, each rank computes one
and they exchange the results. Nothing is assumed about which call is conditional: calls are independent as long as none
reads another's values.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch

import xdit_compile.kernels.collectives  # noqa: F401  (registers the op)
from xdit_compile.distributed.mesh import Mesh
from xdit_compile.errors import UsageError
from xdit_compile.runtime.tensors.deferred_tensor import Source
from xdit_compile.runtime.verify.independence import Bound

DIMENSION = "cfg"
Run = Callable[[], Sequence[torch.Tensor]]


@dataclasses.dataclass(frozen=True, eq=False)
class Call:
    """A call of a denoiser that ranks do not share.

    Args:
        module: what is called, and ``name`` what it is called in messages.
        inputs: the flat ones.
        unshared: why its batch is not shared.
    """

    module: object
    name: str
    inputs: Sequence[Any]
    unshared: Bound | None

    @property
    def time(self) -> list[Any]:
        """The inputs that say which step this is, among others: numbers, and tensors with one for each sample."""
        numbers = (bool, int, float)
        return [each for each in self.inputs if isinstance(each, numbers) or _is_flat(each)]

    def same_step(self, other: Call) -> bool:
        """Whether two calls may be branches of one step."""
        pairs = list(zip(self.time, other.time, strict=False))
        return len(self.time) == len(other.time) and bool(pairs) and all(_equal(*pair) for pair in pairs)


def _is_flat(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.dim() < 2


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return torch.equal(one, other)
    return type(one) is type(other) and one == other


@dataclasses.dataclass
class _Waiting:
    call: Call
    run: Run
    likes: Sequence[torch.Tensor]
    source: Source


class GuidanceScheduler:
    """The calls of one pipeline that wait for one another.

    Over the latest generation ``shared`` counts the calls that ranks shared, by splitting their batch or by computing
    one each, and ``alone`` those that every rank had to compute by itself.

    Args:
        mesh: this rank's place.
        running: around what reaches other ranks.
    """

    def __init__(self, mesh: Mesh, running: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext):
        self._running = running
        self._size = mesh.size(DIMENSION)
        self._index = mesh.coordinate(DIMENSION)
        self._mesh = mesh
        self._waiting: list[_Waiting] = []
        self._lonely: dict[int, Call] = {}
        self.shared = 0
        self.alone = 0
        self._met = False

    @property
    def active(self) -> bool:
        """Whether there is anything to share."""
        return self._size > 1

    def note_shared(self) -> None:
        """A call was shared by its batch."""
        self.shared += 1
        self._met = True

    def on_trial(self, inputs: Sequence[Any]) -> bool:
        """Whether a call may be one of a pipeline without guidance, as far as was seen: no two branches ever met.

        Nothing is compiled for such a call. Its batch is too small for ranks to share it.

        Args:
            inputs: the flat ones.
        """
        batches = [leaf.shape[0] for leaf in inputs if isinstance(leaf, torch.Tensor) and leaf.dim() > 2]
        return self.active and not self._met and bool(batches) and max(batches) < self._size

    def begin(self) -> None:
        """Start another generation; what a failed one left waiting is dropped."""
        self._waiting.clear()
        self._lonely.clear()
        self.shared = 0
        self.alone = 0

    def end(self) -> None:
        """A generation is over.

        Raises:
            UsageError: ranks shared nothing of it.
        """
        if self._lonely and not self.shared:
            raise alone(self._size, next(iter(self._lonely.values())))

    def call(self, call: Call, run: Run, likes: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The results of ``run``: deferred, or there with the last branch.

        Args:
            likes: tensors of the shapes, dtypes and device of the results.
        """
        source = Source(self.flush)
        results = source.deferred(likes)
        self._waiting.append(_Waiting(call, run, likes, source))
        if len(self._waiting) < self._size:
            return list(results)
        self.flush()
        return [result.value() for result in results]

    def flush(self, asking: object = None) -> None:
        """Compute what waits.

        Args:
            asking: the module whose next call takes the values as its input; none where the pipeline reads them.

        Raises:
            UsageError: one call of a module waits alone for the second time, and no two ever met.
        """
        with self._running():
            self._flush(asking)

    def _flush(self, asking: object) -> None:
        waiting, self._waiting = self._waiting, []
        if len(waiting) == 1:
            call = waiting[0].call
            before = self._lonely.get(id(call.module))
            if not self.shared and (asking is call.module or before is not None):
                raise alone(self._size, call, before)
            self._lonely[id(call.module)] = call
            self.alone += 1
            waiting[0].source.fill(waiting[0].run())
        elif waiting:
            self.shared += len(waiting)
            self._met = True
            for one, values in zip(waiting, self._exchanged(waiting), strict=True):
                one.source.fill(values)

    def _exchanged(self, waiting: Sequence[_Waiting]) -> list[list[torch.Tensor]]:
        """The results of all calls; this rank computes one of them, if there are enough."""
        mine = list(waiting[self._index].run()) if self._index < len(waiting) else []
        likes = [one.likes for one in waiting] + [()] * (self._size - len(waiting))
        return exchanged(mine, likes, self._mesh.group(DIMENSION), waiting[0].likes[0].device)[: len(waiting)]


def exchanged(
    mine: Sequence[torch.Tensor], likes: Sequence[Sequence[torch.Tensor]], group: str, device: torch.device
) -> list[list[torch.Tensor]]:
    """The tensors of every rank of a group, by rank.

    Args:
        mine: those of this rank.
        likes: for every rank tensors of the shapes and dtypes of its own.
        device: where tensors lie.
    """
    flat: dict[torch.dtype, torch.Tensor] = {}
    for dtype in dict.fromkeys(like.dtype for each in likes for like in each):
        sizes = [sum(like.numel() for like in each if like.dtype == dtype) for each in likes]
        parts = [value.reshape(-1) for value in mine if value.dtype == dtype]
        own = torch.cat(parts) if parts else torch.empty(0, dtype=dtype, device=device)
        flat[dtype] = torch.ops.xdit_compile.all_gather(own, 0, sizes, group)
    return _unpacked(likes, flat)


def _unpacked(
    likes: Sequence[Sequence[torch.Tensor]], flat: dict[torch.dtype, torch.Tensor]
) -> list[list[torch.Tensor]]:
    offsets = dict.fromkeys(flat, 0)
    by_rank = []
    for each in likes:
        values = []
        for like in each:
            start = offsets[like.dtype]
            offsets[like.dtype] += like.numel()
            values.append(flat[like.dtype][start : offsets[like.dtype]].view(like.shape).clone())
        by_rank.append(values)
    return by_rank


def alone(size: int, call: Call | None = None, before: Call | None = None) -> UsageError:
    """What to raise where ``size`` ranks should share branches of guidance and there is one call alone.

    Args:
        call: that one.
        before: the one before it that was alone.
    """
    without = "use cfg=1"
    if call is not None and call.unshared is not None and call.unshared.samples > 1:
        return UsageError(f"cfg={size} but {call.name} {call.unshared.why}; {without} or a smaller one")
    if call is not None and before is not None and call.same_step(before):
        return UsageError(
            f"cfg={size} but this pipeline reads the result of {call.name} for one branch of guidance before it makes "
            f"the call of the next one, so that they cannot run at the same time; {without}"
        )
    return UsageError(
        f"cfg={size} but this pipeline makes one call of the denoiser with one image per step: it is "
        f"guidance-distilled or runs without guidance; {without}, or take a guidance scale above 1 (--guidance_scale 4)"
    )


def unshared_images(size: int, name: str, unshared: Bound | None) -> UsageError:
    """What to raise where ``size`` data ranks should share the batch of a call and do not."""
    if unshared is None or unshared.samples < size:
        return UsageError(
            f"data={size} but {name} is called with fewer images at once, or takes them one by one: "
            "give more prompts or a greater num_images_per_prompt, or use data=1"
        )
    return UsageError(f"data={size} but {name} {unshared.why}; use data=1")
