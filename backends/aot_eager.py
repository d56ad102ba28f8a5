"""Runs graphs op by op after inductor's decompositions: tells what these change from what its code generation does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from .base import Backend
from .forms import Forms, fakes_of
from .sites import Sites


class AotEager(Backend):
    """What is left of each operator after the decompositions that inductor applies, called one by one.

    PyTorch's ``aot_eager_decomp_partition`` without dynamo and without a backward pass. What reaches other ranks has no
    decomposition: it stays one call each, in the order of the graph.
    """

    name = "aot_eager"

    def compile(self, root: fx.GraphModule) -> Callable[..., tuple[Any, ...]]:
        """The root with every structure decomposed when it is first called."""
        return Sites(root, lambda structure, forms: decomposed(structure, forms).forward)


@torch.no_grad()
def decomposed(structure: fx.GraphModule, forms: Forms) -> fx.GraphModule:
    """A structure in the operators that inductor generates code for.

    Args:
        structure: a flat graph; nothing of it is run.
        forms: of a call's arguments.
    """
    from torch._inductor.decomposition import select_decomp_table

    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        return make_fx(structure, decomposition_table=select_decomp_table())(*fakes_of(mode, forms))
