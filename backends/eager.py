"""Runs graphs op by op: the oracle."""

from __future__ import annotations

from torch import fx, nn

from .base import Backend


class Eager(Backend):
    """Every operator is called as it stands in the graph."""

    name = "eager"

    def compile_structure(self, structure: fx.GraphModule) -> nn.Module:
        return structure
