"""Branches of guidance that are calls of their own, each computed by a pipeline of its own.

With ``cfg`` ranks several pipelines stand side by side. Each computes the calls of some branches, and gives every patch
of their results to the others: to the first stage, which goes on with it, and to the last, which has all patches.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from xdit_compile.distributed.mesh import Mesh

from .stage_channel import Incoming, Pipe


class CfgPipelines:
    """This rank's place among the pipelines of a mesh; with two ``cfg`` ranks each is half of it."""

    def __init__(self, mesh: Mesh):
        self.count, self.here = mesh.size("cfg"), mesh.coordinate("cfg")
        self._mesh, self._last = mesh, mesh.size("pipefusion") - 1
        self._pipe = Pipe(mesh) if self.count > 1 else None

    def reset(self) -> None:
        """Forget what is on its way: connections were closed."""
        if self._pipe is not None:
            self._pipe.reset()

    def turn(self) -> None:
        """Another call begins: let go of what was given and asked for two calls ago."""
        if self._pipe is not None:
            self._pipe.turn()

    def give(self, tensors: Sequence[torch.Tensor]) -> None:
        """Send the results of a patch from the last stage here to the other pipelines, and go on at once."""
        assert self._pipe is not None
        for cfg_rank in range(self.count):
            for stage in sorted({0, self._last}) if cfg_rank != self.here else ():
                self._pipe.send(tensors, self._mesh.rank_at(cfg=cfg_rank, pipefusion=stage))

    def take(self, likes: Sequence[torch.Tensor], device: torch.device, cfg_rank: int) -> Incoming:
        """Ask for the results of a patch from the pipeline that computes them."""
        assert self._pipe is not None
        return self._pipe.receive(likes, device, self._mesh.rank_at(cfg=cfg_rank, pipefusion=self._last))
