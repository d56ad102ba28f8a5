"""Which positions a rank holds: complete, disjoint, in order, and as many as ``length`` says."""

from __future__ import annotations

import numpy as np
import pytest

from xdit_compile.ir.axes import Axis, AxisSystem, Concat, Product
from xdit_compile.ir.sharding import Sharding, Split, share

PARTS = [1, 2, 3, 5, 8]


def test_shares_are_as_even_as_they_go() -> None:
    assert [stop - start for start, stop in (share(226, 4, i) for i in range(4))] == [57, 57, 56, 56]
    assert [stop - start for start, stop in (share(3, 5, i) for i in range(5))] == [1, 1, 1, 0, 0]


def axes_and_units() -> list[tuple[Axis, list[tuple[Axis, ...]]]]:
    system = AxisSystem()
    h, w, f, txt, b = (system.atom(size) for size in (7, 11, 5, 13, 2))
    grid = Product((h, w))
    video = Product((f, h, w))
    return [
        (txt, [(txt,)]),
        (grid, [(h,)]),
        (grid, [(w,)]),
        (grid, [(h, w)]),
        (video, [(h, w)]),
        (Concat((txt, grid)), [(txt,), (h,)]),
        (Concat((grid, txt)), [(txt,), (h, w)]),
        (Product((b, Concat((txt, grid)))), [(txt,), (w,)]),
    ]


@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("case", range(len(axes_and_units())))
def test_every_position_is_held_once(case: int, parts: int) -> None:
    axis, units = axes_and_units()[case]
    split = Split("m", parts, units)
    assert split.splits(axis)
    held = [split.positions(axis, index) for index in range(parts)]
    assert sorted(np.concatenate(held)) == list(range(axis.size))
    assert [len(positions) for positions in held] == [split.length(axis, index) for index in range(parts)]
    assert all(np.all(np.diff(positions) > 0) for positions in held)


def test_a_concatenation_with_a_whole_part_is_not_split() -> None:
    system = AxisSystem()
    txt, img = system.atom(13), system.atom(77)
    assert not Split("m", 2, [(img,)]).splits(Concat((txt, img)))
    assert Split("m", 2, [(img,), (txt,)]).splits(Concat((txt, img)))


def test_a_product_of_an_atom_with_itself_is_not_split() -> None:
    system = AxisSystem()
    a = system.atom(5)
    assert not Split("m", 2, [(a,)]).splits(Product((a, a)))


@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("case", range(len(axes_and_units())))
def test_parts_of_another_split_are_cut_each_by_itself(case: int, parts: int) -> None:
    axis, units = axes_and_units()[case]
    first = {unit[0]: (unit[0].size,) * 3 for unit in units if unit[0].size == 13}
    outer = Split("o", 3, units, first)
    split = Split("m", parts, units, within=outer)
    held = [split.positions(axis, index) for index in range(parts)]
    assert sorted(np.concatenate(held)) == list(range(axis.size))
    assert [len(positions) for positions in held] == [split.length(axis, index) for index in range(parts)]
    assert all(np.all(np.diff(positions) > 0) for positions in held)
    both = Sharding({"o": outer, "m": split}, {})
    for part in range(3):
        counts = [len(both.positions(axis, ["o", "m"], {"o": part, "m": index})) for index in range(parts)]
        assert sum(counts) == len(outer.positions(axis, part))
        assert max(counts) - min(counts) <= 1 or case not in (0, 3), "what is one run is shared evenly"
    assert split.ends(axis) is None


def test_two_mesh_dimensions_split_one_grid() -> None:
    system = AxisSystem()
    h, w = system.atom(6), system.atom(4)
    grid = Product((h, w))
    splits = {"rows": Split("rows", 3, [(h,)]), "columns": Split("columns", 2, [(w,)])}
    held = [
        Sharding(splits, {"rows": r, "columns": c}).positions(grid, ["rows", "columns"])
        for r in range(3)
        for c in range(2)
    ]
    assert sorted(np.concatenate(held)) == list(range(24))
    assert Sharding(splits, {"rows": 0, "columns": 1}).length(grid, ["rows", "columns"]) == 4
