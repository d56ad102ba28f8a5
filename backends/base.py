"""What a backend is: something that makes a graph run."""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import Any

from torch import fx, nn

from xdit_compile.errors import UsageError

from .codes import Codes
from .target.cards import Card


class Backend(abc.ABC):
    """Makes a root graph run, and the structures that it calls."""

    name: str
    codes: Codes | None = None
    """Where compiled code is found again; None where nothing is compiled that could be."""

    def unavailable(self) -> str | None:
        """Why this backend cannot be used here, with what to do about it; None where it can."""
        return None

    def for_card(self, card: Card) -> Backend:
        """The backend that compiles for a card which is not there, and runs nothing.

        Raises:
            UsageError: it has no such thing.
        """
        raise UsageError(
            f"backend={self.name!r} compiles nothing for {card.target} ahead of time; use backend='inductor'"
        )

    def prepare(self) -> None:
        """Import what compiled code needs, so that the first call does not wait for it."""
        return None

    @abc.abstractmethod
    def compile(self, root: fx.GraphModule) -> Callable[..., tuple[Any, ...]]:
        """What computes the root, on the same flat tensors; each structure compiled once however often it is called."""


class ByStructure(Backend):
    """Compiles the structures of a program; the root that wires them together stays as it is."""

    @abc.abstractmethod
    def compile_structure(self, structure: fx.GraphModule) -> nn.Module:
        """A module that computes what ``structure`` does, on the same flat tensors."""

    def compile(self, root: fx.GraphModule) -> Callable[..., tuple[Any, ...]]:
        """The root with every structure compiled, each of them once."""
        called = {str(node.target) for node in root.graph.nodes if node.op == "call_module"}
        structures = {name: self.compile_structure(getattr(root, name)) for name in called}
        return fx.GraphModule(structures, root.graph)
