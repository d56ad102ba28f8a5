"""How patches of the tokens lie in a tensor."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import torch


@dataclasses.dataclass(frozen=True)
class PatchLayout:
    """The positions of each patch, along the dim of a tensor that is ``back`` from its end."""

    back: int
    positions: tuple[tuple[int, ...], ...]

    @property
    def size(self) -> int:
        """Positions of all patches."""
        return sum(map(len, self.positions))

    @functools.cached_property
    def _indices(self) -> tuple[torch.Tensor | None, ...]:
        """Where the positions of each patch are; None for neighbours in order."""
        runs = (range(each[0], each[0] + len(each)) if each else range(0) for each in self.positions)
        pairs = zip(self.positions, runs, strict=True)
        return tuple(None if each == tuple(run) else torch.tensor(each, dtype=torch.long) for each, run in pairs)

    @functools.cached_property
    def _order(self) -> torch.Tensor | None:
        """Where each position is once patches are end to end; None where they are in order then."""
        joined = [position for each in self.positions for position in each]
        return None if joined == list(range(len(joined))) else torch.argsort(torch.tensor(joined, dtype=torch.long))

    def along(self, back: int) -> PatchLayout:
        """The same patches along another dim."""
        return self if back == self.back else dataclasses.replace(self, back=back)

    def take(self, whole: torch.Tensor, patch: int, back: int | None = None) -> torch.Tensor:
        """One patch of a whole tensor, a view of it where positions are neighbours.

        Args:
            back: the dim along which patches lie in this tensor, from its end, where it is another.
        """
        positions, index = self.positions[patch], self._indices[patch]
        dim = whole.ndim - (back or self.back)
        if index is None:
            return whole.narrow(dim, positions[0] if positions else 0, len(positions))
        return whole.index_select(dim, index.to(whole.device))

    def like(self, whole: torch.Tensor, patch: int) -> torch.Tensor:
        """A tensor of the shape and dtype that one patch of a whole one has, on the meta device."""
        return self._sized(whole, len(self.positions[patch]), torch.device("meta"))

    def empty(self, like: torch.Tensor, device: torch.device) -> torch.Tensor:
        """Room for a whole tensor of which a patch is like this."""
        return self._sized(like, self.size, device)

    def _sized(self, like: torch.Tensor, size: int, device: torch.device) -> torch.Tensor:
        shape = list(like.shape)
        shape[len(shape) - self.back] = size
        return torch.empty(shape, dtype=like.dtype, device=device)

    def join(self, patches: Sequence[torch.Tensor]) -> torch.Tensor:
        """The whole from its patches."""
        dim = patches[0].ndim - self.back
        whole = torch.cat(list(patches), dim)
        return whole if self._order is None else whole.index_select(dim, self._order.to(whole.device))
