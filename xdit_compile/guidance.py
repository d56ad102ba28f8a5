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

import torch

import xdit_compile.kernels.collectives  # noqa: F401  (registers the op)

from .deferred import Source
from .errors import XditCompileError
from .mesh import Mesh

DIMENSION = "cfg"
Run = Callable[[], Sequence[torch.Tensor]]


@dataclasses.dataclass
class _Waiting:
    module: object
    run: Run
    likes: Sequence[torch.Tensor]
    source: Source


class Branches:
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
        self._group = mesh.group(DIMENSION)
        self._waiting: list[_Waiting] = []
        self._lonely: list[object] = []
        self.shared = 0
        self.alone = 0

    @property
    def active(self) -> bool:
        """Whether there is anything to share."""
        return self._size > 1

    def begin(self) -> None:
        """Start another generation; what a failed one left waiting is dropped."""
        self._waiting.clear()
        self._lonely.clear()
        self.shared = 0
        self.alone = 0

    def call(self, module: object, run: Run, likes: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The results of ``run``, a call of ``module``: deferred, or there with the last branch.

        Args:
            likes: tensors of the shapes, dtypes and device of the results.
        """
        source = Source(self.flush)
        results = source.deferred(likes)
        self._waiting.append(_Waiting(module, run, likes, source))
        if len(self._waiting) < self._size:
            return list(results)
        self.flush()
        return [result.value() for result in results]

    def flush(self, asking: object = None) -> None:
        """Compute what waits.

        Args:
            asking: the module whose next call takes the values as its input; none where the pipeline reads them.

        Raises:
            XditCompileError: one call waits in a generation in which no two ever met: there is no guidance to share.
        """
        with self._running():
            self._flush(asking)

    def _flush(self, asking: object) -> None:
        waiting, self._waiting = self._waiting, []
        if len(waiting) == 1:
            module = waiting[0].module
            if not self.shared and (asking in (None, module) or module in self._lonely):
                raise alone(self._size)
            self._lonely.append(module)
            self.alone += 1
            waiting[0].source.fill(waiting[0].run())
        elif waiting:
            self.shared += len(waiting)
            for one, values in zip(waiting, self._exchanged(waiting), strict=True):
                one.source.fill(values)

    def _exchanged(self, waiting: Sequence[_Waiting]) -> list[list[torch.Tensor]]:
        """The results of all calls; this rank computes one of them, if there are enough."""
        mine = list(waiting[self._index].run()) if self._index < len(waiting) else []
        flat: dict[torch.dtype, torch.Tensor] = {}
        for dtype in dict.fromkeys(like.dtype for one in waiting for like in one.likes):
            sizes = [sum(like.numel() for like in one.likes if like.dtype == dtype) for one in waiting]
            sizes += [0] * (self._size - len(waiting))
            parts = [value.reshape(-1) for value in mine if value.dtype == dtype]
            own = torch.cat(parts) if parts else waiting[0].likes[0].new_empty(0, dtype=dtype)
            flat[dtype] = torch.ops.xdit_compile.all_gather(own, 0, sizes, self._group)
        return _unpacked(waiting, flat)


def alone(size: int) -> XditCompileError:
    """What to raise where ``size`` ranks should share branches of guidance and there is one."""
    return XditCompileError(
        f"cfg={size} but this pipeline makes one call of the denoiser with one image per step: it is "
        "guidance-distilled or runs without guidance; use cfg=1, or a guidance scale above 1"
    )


def _unpacked(waiting: Sequence[_Waiting], flat: dict[torch.dtype, torch.Tensor]) -> list[list[torch.Tensor]]:
    at = dict.fromkeys(flat, 0)
    found = []
    for one in waiting:
        values = []
        for like in one.likes:
            start = at[like.dtype]
            at[like.dtype] += like.numel()
            values.append(flat[like.dtype][start : at[like.dtype]].view(like.shape).clone())
        found.append(values)
    return found
