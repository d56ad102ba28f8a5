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


_LIBRARY.define(
    "put_rows_at(Tensor(a!) out, Tensor rows, int dim, Tensor start) -> ()", tags=(torch.Tag.pt2_compliant_tag,)
)


@torch.library.impl(_LIBRARY, "put_rows_at", "CompositeExplicitAutograd")
def put_rows_at(out: torch.Tensor, rows: torch.Tensor, dim: int, start: torch.Tensor) -> None:
    """`put_rows` whose first row is a number in memory: graphs that differ in it alone are the same.

    Args:
        start: int64, without dims, on the CPU, so that reading it waits for no device.
    """
    put_rows(out, rows, dim, int(start))


@torch.library.register_fake("xdit_compile::put_rows_at", lib=_LIBRARY)
def _(out: torch.Tensor, rows: torch.Tensor, dim: int, start: torch.Tensor) -> None:
    out.narrow(dim, 0, rows.shape[dim])
