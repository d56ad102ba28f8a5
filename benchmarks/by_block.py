"""What inductor makes of the repeated blocks of an unmodified module, each compiled by itself, counted for a card.

That is what ``torch.compile`` of each block makes of it, and diffusers' ``compile_repeated_blocks`` with it:
TorchDynamo records the module's own code, and inductor compiles that with torch's default options. None of our passes
sees it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils import _pytree as pytree

from xdit_compile.backends.target.cards import Card
from xdit_compile.backends.target.pretend_card import DEVICE, pretend_card
from xdit_compile.reports.counting.count import count, form_of, on_card
from xdit_compile.reports.counting.counts import Code


@dataclasses.dataclass(frozen=True)
class Block:
    """One call of a block: the module and what it was given, on the meta device."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def form(self) -> Any:
        """Equal for blocks of which inductor makes the same code."""
        weights = [form_of(weight) for weight in self.module.state_dict().values()]
        return type(self.module), tuple(weights), tuple(map(form_of, pytree.tree_leaves((self.args, self.kwargs))))

    def recorded(self) -> fx.GraphModule:
        """The graph that TorchDynamo records of it, with weights as inputs.

        Raises:
            torch._dynamo.exc.TorchDynamoException: the code of the block is no one graph.
        """
        return torch.export.export(self.module, self.args, self.kwargs, strict=True).graph_module


def blocks_of(model: nn.Module, call: dict[str, Any], paths: Sequence[str]) -> dict[str, Block]:
    """The calls of some modules of a model, by their paths."""
    calls: dict[str, Block] = {}

    def noting(path: str) -> Any:
        return lambda module, args, kwargs: calls.setdefault(path, Block(module, args, kwargs)) and None

    hooks = [model.get_submodule(path).register_forward_pre_hook(noting(path), with_kwargs=True) for path in paths]
    try:
        with torch.no_grad():
            model(**call)
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def by_block(blocks: dict[str, Block], card: Card) -> dict[str, Code]:
    """The code of each block by its path; of blocks that are alike it is made once.

    They are recorded before the card is there, for which Dynamo has no handlers.

    Raises:
        torch._dynamo.exc.TorchDynamoException: as `Block.recorded` does.
    """
    alike = {block.form: block for block in blocks.values()}
    with torch.no_grad():
        graphs = {form: on_card(block.recorded()) for form, block in alike.items()}
        with pretend_card(card) as binaries:
            made = {form: count(graph, _inputs(graph), binaries, card, options={}) for form, graph in graphs.items()}
    return {path: made[block.form] for path, block in blocks.items()}


def _inputs(graph: fx.GraphModule) -> list[Any]:
    """Fake tensors on the card, as the placeholders of a graph are."""
    values = [node.meta.get("val") for node in graph.graph.find_nodes(op="placeholder")]
    with FakeTensorMode(shape_env=ShapeEnv()):
        return pytree.tree_map_only(
            torch.Tensor,
            lambda each: torch.empty_strided(each.shape, each.stride(), dtype=each.dtype, device=DEVICE),
            values,
        )
