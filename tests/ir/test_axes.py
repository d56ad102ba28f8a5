"""The algebra of axes: unification, cuts, splits, and taking back what was refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xdit_compile.ir.axes import Atom, AxisSystem, Concat, Conflict, Product, atoms, resolve, same


def test_equal_sizes_are_unified_only_when_asked() -> None:
    system = AxisSystem()
    a, b = system.atom(4), system.atom(4)
    assert not same(a, b)
    system.unify(a, b)
    assert same(a, b)


def test_different_sizes_refuse() -> None:
    system = AxisSystem()
    with pytest.raises(Conflict, match="sizes 4 and 5 differ"):
        system.unify(system.atom(4), system.atom(5))


def test_an_atom_becomes_a_product_where_a_view_splits_it() -> None:
    system = AxisSystem()
    tokens = system.atom(77)
    rows, columns = system.regroup([tokens], [7, 11])
    assert repr(resolve(tokens)) == repr(Product((rows, columns)))
    (again,) = system.regroup([rows, columns], [77])
    assert same(again, tokens)


def test_a_view_across_factors_is_refused_and_leaves_nothing() -> None:
    system = AxisSystem()
    grid = [system.atom(6), system.atom(5)]
    with pytest.raises(Conflict):
        system.regroup(grid, [5, 6])
    assert all(isinstance(resolve(axis), Atom) for axis in grid)


def test_a_cut_makes_a_concatenation_that_joins_again() -> None:
    system = AxisSystem()
    joint = system.atom(90)
    text, image = system.segment(joint, 0, 13), system.segment(joint, 13, 90)
    assert isinstance(resolve(joint), Concat)
    assert same(Concat((text, image)), joint)


def test_a_grid_is_cut_only_between_rows() -> None:
    system = AxisSystem()
    rows, columns = system.atom(7), system.atom(11)
    grid = Product((rows, columns))
    first = system.segment(grid, 0, 22)
    assert first.size == 22 and len(atoms(rows)) == 2
    with pytest.raises(Conflict, match="falls inside"):
        system.segment(grid, 0, 23)


def test_a_concatenation_meets_a_grid_of_pairs() -> None:
    """Rotary tables are a concatenation of pairs where queries have pairs of all channels."""
    system = AxisSystem()
    head = system.atom(28)
    pairs, two = system.regroup([head], [14, 2])
    inner = system.atom(2)
    table = Concat([Product((system.atom(n), inner)) for n in (4, 4, 6)])
    system.unify(head, table)
    assert same(two, inner) and len(atoms(pairs)) == 3


def test_one_chunk_after_another_is_one_axis() -> None:
    system = AxisSystem()
    parts = [system.atom(3) for _ in range(4)]
    packed = Concat([parts[0], parts[1], parts[2], parts[3]])
    outer, inner = system.split(packed, 6)
    assert (outer.size, inner.size) == (2, 6)
    assert same(parts[0], parts[2]) and same(parts[1], parts[3]) and not same(parts[0], parts[1])


def test_an_axis_never_contains_itself() -> None:
    system = AxisSystem()
    atom = system.atom(4)
    with pytest.raises(Conflict):
        system._bind(atom, Concat((atom,)))


shapes = st.lists(st.integers(1, 6), min_size=1, max_size=4)


@given(shapes, st.data())
def test_regrouping_keeps_the_number_of_positions_or_binds_nothing(sizes: list[int], data: st.DataObject) -> None:
    system = AxisSystem()
    axes = [system.atom(size) for size in sizes]
    total = 1
    for size in sizes:
        total *= size
    first = data.draw(st.sampled_from([d for d in range(1, total + 1) if total % d == 0]))
    try:
        grouped = system.regroup(axes, [first, total // first])
    except Conflict:
        assert all(isinstance(resolve(axis), Atom) for axis in axes)
        return
    assert [axis.size for axis in grouped] == [first, total // first]
    ordered = [atom for axis in axes for atom in atoms(axis) if atom.size > 1]
    assert [atom for axis in grouped for atom in atoms(axis) if atom.size > 1] == ordered
