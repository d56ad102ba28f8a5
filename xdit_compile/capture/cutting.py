"""Cuts a call of a module into calls of fewer samples each, and says how their results are joined."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from xdit_compile.ir.results import Template
from xdit_compile.ir.sharding import share

Path = tuple[Any, ...]
"""Keys that lead to a part of ``(args, kwargs)``: 0 and 1 first, then items, again and again."""
Call = tuple[tuple, dict]


@dataclasses.dataclass(frozen=True)
class Cut:
    """How a call falls into parts, each of some samples in a row.

    Args:
        samples: of the whole call.
        parts: how many calls are made of it.
        entries: what goes by sample: tensors by their first dim, lists by their entries.
    """

    samples: int
    parts: int
    entries: frozenset[Path]

    def span(self, part_index: int) -> tuple[int, int]:
        """The samples of a part, start and stop; the first parts have the larger shares."""
        return share(self.samples, self.parts, part_index)

    def part(self, call: Call, part_index: int) -> Call:
        """The inputs of one part; what does not go by sample is there as a whole."""
        return self.mapped(call, lambda value: _rows(value, *self.span(part_index)))

    def mapped(self, call: Call, change: Any) -> Call:
        """A call with ``change(entry)`` for everything that goes by sample."""
        return _mapped(call, self.entries, change, ())

    def leaves(self, spec: pytree.TreeSpec, part_index: int) -> tuple[Leaf, ...]:
        """The flat inputs of one part, by their places in those of the whole call."""
        whole: Any = pytree.tree_unflatten([Leaf(position) for position in range(spec.num_leaves)], spec)
        return tuple(pytree.tree_leaves(self.part(whole, part_index)))


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A flat input of a call: its position, and which rows are taken of it."""

    position: int
    rows: tuple[int, int] | None = None

    def of(self, leaves: Sequence[Any]) -> Any:
        """This input from those of the whole call."""
        leaf = leaves[self.position]
        return leaf if self.rows is None else leaf[self.rows[0] : self.rows[1]]


def _rows(value: Any, start: int, stop: int) -> Any:
    return Leaf(value.position, (start, stop)) if isinstance(value, Leaf) else value[start:stop]


def _mapped(value: Any, entries: frozenset[Path], change: Any, path: Path) -> Any:
    if path in entries:
        return change(value)
    if type(value) in (list, tuple):
        return type(value)(_mapped(each, entries, change, (*path, at)) for at, each in enumerate(value))
    if type(value) is dict:
        return {key: _mapped(each, entries, change, (*path, key)) for key, each in value.items()}
    return value


def ways_to_cut(call: Call, samples: int, parts: int) -> Iterator[Cut]:
    """Which inputs may go by sample, by nothing but their lengths: likelier guesses first, each to be tested.

    A list of as many tensors as there are samples, each of as many rows, is cut one way or the other. One without
    tensors may be a size rather than one entry a sample.
    """
    seen = set()
    for plain in (True, False):
        for inner in (True, False):
            entries = frozenset(entry for at in (0, 1) for entry in _entries(call[at], samples, (at,), inner, plain))
            if entries and entries not in seen:
                seen.add(entries)
                yield Cut(samples, parts, entries)


def _entries(value: Any, samples: int, path: Path, inner: bool, plain: bool) -> Iterator[Path]:
    if isinstance(value, torch.Tensor):
        if value.dim() and len(value) == samples:
            yield path
    elif type(value) in (list, tuple):
        by_rows = inner and all(isinstance(each, torch.Tensor) and each.shape[:1] == (samples,) for each in value)
        if len(path) > 1 and len(value) == samples and not by_rows and (plain or _tensors(value)):
            yield path
        else:
            for at, each in enumerate(value):
                yield from _entries(each, samples, (*path, at), inner, plain)
    elif type(value) is dict:
        for key, each in value.items():
            yield from _entries(each, samples, (*path, key), inner, plain)


def _tensors(value: Any) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def counts_of(template: Template, shapes: Sequence[Sequence[int]]) -> list[int]:
    """How many samples a result may be of: the entries of its lists, or the rows that all its tensors have."""
    lists: dict[tuple, set[Any]] = {}
    for path in template.paths:
        for depth, (is_item, key) in enumerate(path):
            if depth and is_item and isinstance(key, int):
                lists.setdefault(path[:depth], set()).add(key)
    rows = {shape[0] if shape else 0 for shape in shapes}
    return list(dict.fromkeys([*map(len, lists.values()), *(rows if len(rows) == 1 else ())]))


Pieces = tuple[tuple[int, int], ...]
"""The parts of a result's tensor, end to end: which part of the call, and which of its tensors."""
Made = tuple[Template, Sequence[torch.Tensor]]


def pieces_of(whole: Made, parts: Sequence[Made], cut: Cut) -> list[Pieces] | None:
    """Where each tensor of the whole result is in the results of the parts; None where some are not by sample."""
    pieces_by_tensor = []
    for path, tensor in zip(whole[0].paths, whole[1], strict=True):
        pieces = _by_rows(path, tensor, parts, cut) or _by_entry(path, tensor, whole[0], parts, cut)
        if pieces is None:
            return None
        pieces_by_tensor.append(pieces)
    used = {piece for pieces in pieces_by_tensor for piece in pieces}
    return pieces_by_tensor if len(used) == sum(len(tensors) for _, tensors in parts) else None


def _by_rows(path: tuple, tensor: torch.Tensor, parts: Sequence[Made], cut: Cut) -> Pieces | None:
    pieces = []
    for part_index, (template, tensors) in enumerate(parts):
        start, stop = cut.span(part_index)
        place = template.paths.index(path) if path in template.paths else -1
        if place < 0 or tensor.dim() == 0 or tensors[place].shape != (stop - start, *tensor.shape[1:]):
            return None
        pieces.append((part_index, place))
    return tuple(pieces) if len(tensor) == cut.samples else None


def _by_entry(path: tuple, tensor: torch.Tensor, whole: Template, parts: Sequence[Made], cut: Cut) -> Pieces | None:
    for depth, (is_item, key) in enumerate(path):
        entries = {other[depth] for other in whole.paths if other[:depth] == path[:depth] and len(other) > depth}
        if is_item and isinstance(key, int) and len(entries) == cut.samples:
            part_index = next(index for index in range(cut.parts) if key < cut.span(index)[1])
            path_in_part = (*path[:depth], (True, key - cut.span(part_index)[0]), *path[depth + 1 :])
            template, tensors = parts[part_index]
            if (
                path_in_part in template.paths
                and tensors[place := template.paths.index(path_in_part)].shape == tensor.shape
            ):
                return ((part_index, place),)
    return None


def joined(pieces: Sequence[Pieces], parts: Sequence[Sequence[torch.Tensor]]) -> list[torch.Tensor]:
    """The tensors of the whole result from those of the parts."""
    found = [[parts[part][place] for part, place in each] for each in pieces]
    return [each[0] if len(each) == 1 else torch.cat(each) for each in found]
