"""Graphs stay what they were: a change of places and words changes none, any other says which and why."""

from __future__ import annotations

import golden
import pytest


@pytest.mark.parametrize(
    "name", [name if name == "flux" else pytest.param(name, marks=pytest.mark.slow) for name in golden.NAMES]
)
def test_graphs_are_what_is_kept(name: str) -> None:
    assert golden.changes(name) == "", "where that is meant: python tests/golden.py, and say why in the commit"
