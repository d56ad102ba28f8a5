"""Inputs that every rank computed itself, such as a prompt's embeddings, differ by rounding: the first rank's count."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.weak import WeakTensorKeyDictionary

from xdit_compile.distributed.agreement import Agreement
from xdit_compile.distributed.sketch import ROUNDING, UNCHANGED, Sketch, begin_sketch, samples
from xdit_compile.errors import AgreementError
from xdit_compile.ir.digest import digest_tensors
from xdit_compile.ir.versions import version_of
from xdit_compile.kernels.collectives.process_groups import complete, process_group


class SharedInputs:
    """The tensors of one request that were replaced by the first rank's, and what is known of all others.

    Args:
        agreement: the talk among the ranks that make the same images.
        group: role of their process group.
    """

    def __init__(self, agreement: Agreement, group: str):
        self._agreement, self._group = agreement, group
        self._shared: dict[tuple[Any, ...], tuple[torch.Tensor, torch.Tensor]] = {}
        self._seen: Any = WeakTensorKeyDictionary()
        self._compared: set[int] = set()

    def forget(self) -> None:
        """The request is over."""
        self._shared.clear()
        self._seen.clear()
        self._compared.clear()

    def sketch(self, leaf: Any) -> Sketch:
        """A sketch of one input; `UNCHANGED` for a tensor that was seen in this request and not written to since."""
        version = version_of(leaf) if type(leaf) is torch.Tensor else None
        if version is not None:
            if self._seen.get(leaf) == version:
                return UNCHANGED
            self._seen[leaf] = version
        return begin_sketch(leaf)

    def first(self, caller: object) -> bool:
        """Whether this is the first call of ``caller`` in a request; the same on all ranks."""
        if id(caller) in self._compared:
            return False
        self._compared.add(id(caller))
        return True

    def known(self, leaves: Sequence[Any]) -> list[Any]:
        """Inputs, with the first rank's in the place of those that were replaced before."""
        if not self._shared:
            return list(leaves)
        return [self._shared[key][1] if (key := _identity(leaf)) in self._shared else leaf for leaf in leaves]

    def agreed(self, leaves: Sequence[Any]) -> list[Any]:
        """Inputs, with the first rank's in the place of those that differ by rounding.

        Raises:
            AgreementError: some differ by more, or are of other shapes.
        """
        if self._agreement.alone:
            return list(leaves)
        mine = [_digest(leaf) for leaf in leaves]
        said = {self._agreement.rank: mine, **self._agreement.exchange("inputs", mine)}
        if any(len(theirs) != len(mine) for theirs in said.values()):
            raise self._differing(said)
        differ = [position for position in range(len(mine)) if len({theirs[position] for theirs in said.values()}) > 1]
        return self._replaced(leaves, differ, said) if differ else list(leaves)

    def _replaced(self, leaves: Sequence[Any], differ: Sequence[int], said: dict[int, list[str]]) -> list[Any]:
        if any(len({theirs[position].partition(" ")[0] for theirs in said.values()}) > 1 for position in differ):
            raise self._differing(said)
        replaced, alike = list(leaves), True
        for position in differ:
            if not _may_be_rounded(leaves[position]):
                raise self._differing(said)
            replaced[position] = self._first_rank_s(leaves[position])
            alike = alike and _close(leaves[position], replaced[position])
            self._shared[_identity(leaves[position])] = (leaves[position], replaced[position])
        if self._agreement.any("rounding", not alike):
            raise self._differing(said)
        return replaced

    def _first_rank_s(self, tensor: torch.Tensor) -> torch.Tensor:
        shared = tensor.detach().clone(memory_format=torch.contiguous_format)
        group = process_group(self._group)
        plain = torch.view_as_real(shared) if shared.is_complex() else shared
        start = functools.partial(dist.broadcast, plain, group=group, group_src=0, async_op=True)
        complete(group, "a broadcast of inputs", start, plain.device)
        return shared

    def _differing(self, said: dict[int, list[str]]) -> AgreementError:
        mine = said[self._agreement.rank]
        rank = next(rank for rank, theirs in said.items() if theirs != mine)
        shapes = ([each.partition(" ")[0] for each in every] for every in (mine, said[rank]))
        what = "input" if len({tuple(each) for each in shapes}) == 1 else "input shape and another input"
        return self._agreement.called_otherwise(rank, what)


def _identity(leaf: Any) -> tuple[Any, ...]:
    """What tells a tensor in a state from all others: inference tensors do not count writes, so their values do."""
    if not isinstance(leaf, torch.Tensor):
        return ()
    version = version_of(leaf)
    return (id(leaf), tuple(samples(leaf)) if version is None else version)


def _digest(leaf: Any) -> str:
    """Form and values of an input, apart."""
    if type(leaf) is torch.Tensor:
        return f"{leaf.dtype}{list(leaf.shape)}".replace(" ", "") + f" {digest_tensors([leaf])}"
    return f"{type(leaf).__name__} {digest_tensors([] if isinstance(leaf, torch.Tensor) else [leaf])}"


def _may_be_rounded(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor) and (leaf.is_floating_point() or leaf.is_complex())


def _close(one: torch.Tensor, other: torch.Tensor) -> bool:
    if not one.numel():
        return True
    difference, greatest = (one - other).abs().max().item(), other.abs().max().item()
    return difference <= ROUNDING.get(one.dtype, 0.0) * greatest
