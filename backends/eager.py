"""Runs graphs op by op: the oracle."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx

from xdit_compile.ir.inline_calls import flatten

from .base import Backend


class Eager(Backend):
    """Every operator is called as it stands in the graph."""

    name = "eager"

    def compile(self, root: fx.GraphModule) -> Callable[..., tuple[Any, ...]]:
        """All in one graph, which lets go of every value after its last use."""
        return flatten(root)
