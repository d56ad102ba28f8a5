"""Arguments of fx nodes as what they are; fx itself types each as a union of everything that one can be."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx


def node_of(argument: object) -> fx.Node:
    """An argument that is another node.

    Raises:
        TypeError: it is something else, as for all of these.
    """
    if not isinstance(argument, fx.Node):
        raise TypeError(f"{argument!r} is no node")
    return argument


def integer_of(argument: object) -> int:
    """An argument that is a whole number."""
    if not isinstance(argument, int):
        raise TypeError(f"{argument!r} is no whole number")
    return argument


def number_of(argument: object) -> float:
    """An argument that is a number."""
    if not isinstance(argument, int | float):
        raise TypeError(f"{argument!r} is no number")
    return float(argument)


def sequence_of(argument: object) -> Sequence[Any]:
    """An argument that is a list or tuple, whatever is in it."""
    if not isinstance(argument, tuple | list):
        raise TypeError(f"{argument!r} is no list")
    return argument


def function_of(node: fx.Node) -> Callable[..., Any]:
    """What a node calls: an operator, or ``operator.getitem``."""
    if not callable(node.target):
        raise TypeError(f"{node} calls {node.target!r}, which is no function")
    return node.target


def overload_of(node: fx.Node) -> torch._ops.OpOverload:
    """The operator that a node calls."""
    if not isinstance(node.target, torch._ops.OpOverload):
        raise TypeError(f"{node} calls {node.target!r}, which is no operator of PyTorch's")
    return node.target
