"""Filling a tensor strip by strip, so that no second one of its size is needed."""

from __future__ import annotations

import torch

_LIBRARY = torch.library.Library("xdit_compile", "FRAGMENT")
_LIBRARY.define(
    "put_rows(Tensor(a!) out, Tensor rows, int dim, SymInt start) -> ()", tags=(torch.Tag.pt2_compliant_tag,)
)


@torch.library.impl(_LIBRARY, "put_rows", "CompositeExplicitAutograd")
def put_rows(out: torch.Tensor, rows: torch.Tensor, dim: int, start: int) -> None:
    """Write rows into a tensor that has room for them.

    Args:
        out: any shape; changed in place.
        rows: as ``out``, but for its size along ``dim``.
        dim: where the rows are counted.
        start: the first row that is written.

    Raises:
        RuntimeError: when the rows do not fit there.
    """
    out.narrow(dim, start, rows.shape[dim]).copy_(rows)


@torch.library.register_fake("xdit_compile::put_rows", lib=_LIBRARY)
def _(out: torch.Tensor, rows: torch.Tensor, dim: int, start: int) -> None:
    out.narrow(dim, start, rows.shape[dim])
