"""Axis inference names what models mean, without a hint."""

from __future__ import annotations

import torch
from splitting import captured
from torch import nn

from xdit_compile.capture.capture import capture
from xdit_compile.ir.axes import Atom, Axis, Concat, Product
from xdit_compile.passes.axes.axis_roles import roles
from xdit_compile.passes.axes.infer import Inference, infer
from xdit_compile.passes.axes.operators import AttentionOp
from xdit_compile.passes.rules.registry import rulebook


def attentions(inference: Inference) -> list[tuple[str, Axis, Axis, Axis]]:
    """Path, batch, query tokens and key tokens of every attention."""
    found = []
    for frame, _, op_axes in inference.nodes():
        if isinstance(op_axes.operator, AttentionOp):
            tokens = op_axes.operator.tokens
            q, k = op_axes.operand_axes[0], op_axes.operand_axes[1]
            found.append((frame.call.meta["path"], q[0], q[tokens], k[tokens]))
    return found


def sizes(axis: Axis) -> object:
    """An axis as nested sizes: tuples for products, lists for concatenations."""
    if isinstance(axis, Product):
        return tuple(sizes(factor) for factor in axis.factors)
    if isinstance(axis, Concat):
        return [sizes(part) for part in axis.parts]
    return axis.size


def user_axes(name: str, shape: tuple[int, ...]) -> list[Axis]:
    """Axes of the model's input of that shape."""
    inference = captured(name).inference
    (node,) = (node for node in inference.axes if node.op == "placeholder" and tuple(node.meta["val"].shape) == shape)
    return inference.axes[node][0]


def test_flux_attends_over_text_and_image() -> None:
    for _, _, queries, keys in attentions(captured("flux").inference):
        assert sizes(queries) == [13, 77] and queries is keys


def test_sd3_attends_over_a_grid_and_text_and_its_latents_are_a_grid_of_patches() -> None:
    for _, _, queries, keys in attentions(captured("sd3").inference):
        assert sizes(queries) == [(7, 11), 13] and queries is keys
    model = captured("sd3")
    latents = next(v for v in (*model.args, *model.kwargs.values()) if isinstance(v, torch.Tensor) and v.dim() == 4)
    _, _, rows, columns = user_axes("sd3", tuple(latents.shape))
    assert sizes(rows) == (7, 2) and sizes(columns) == (11, 2)
    (_, _, queries, _), *_ = attentions(captured("sd3").inference)
    grid = queries.parts[0]  # type: ignore[attr-defined]
    assert grid.factors[0] is rows.factors[0] and grid.factors[1] is columns.factors[0]  # type: ignore[attr-defined]


def test_pixart_attends_to_itself_and_to_text() -> None:
    found = attentions(captured("pixart").inference)
    themselves = [(q, k) for _, _, q, k in found if q is k]
    across = [(q, k) for _, _, q, k in found if q is not k]
    assert themselves and across
    assert all(sizes(q) == (7, 11) for q, _ in themselves + across)
    assert all(sizes(k) == 13 for _, k in across)


def test_latte_alternates_space_and_time() -> None:
    found = [(batch, q) for _, batch, q, k in attentions(captured("latte").inference) if q is k]
    space = [(batch, q) for batch, q in found if sizes(q) == (7, 11)]
    time = [(batch, q) for batch, q in found if sizes(q) != (7, 11)]
    assert space and time
    for batch, frames in time:
        assert isinstance(frames, Atom) and isinstance(batch, Product)
        assert set(space[0][1].factors) < set(batch.factors)  # type: ignore[attr-defined]
    assert all(time[0][1] in batch.factors for batch, _ in space)  # type: ignore[attr-defined]


def test_sana_contracts_its_tokens() -> None:
    contracted = [
        op_axes.operand_axes[loop.args[0][0]][loop.args[0][1]]
        for frame, node, op_axes in captured("sana").inference.nodes()
        for loop in op_axes.loops
        if loop.kind == "sum" and len(loop.args) == 2 and not any(o in frame.tables for o in op_axes.operands)
    ]
    assert any(sizes(axis) == (7, 11) for axis in contracted)


def inferred(module: nn.Module, *args: torch.Tensor) -> Inference:
    return infer(capture(module.eval(), args, {}), rulebook())


def test_a_conflict_on_one_dim_keeps_the_others() -> None:
    class Clash(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            pairs = x.view(2, 15, 4, 3).sum(-1)
            return x.view(2, 15, 3, 4).sum(-1).sum(-1) + pairs.sum(-1)

    inference = inferred(Clash(), torch.randn(2, 15, 12))
    refused = [(node, op_axes) for _, node, op_axes in inference.nodes() if op_axes.boundaries]
    ((_, op_axes),) = refused
    assert [boundary.dim for boundary in op_axes.boundaries] == [2]
    assert (
        op_axes.result_axes[0][0] is op_axes.operand_axes[0][0]
        and op_axes.result_axes[0][1] is op_axes.operand_axes[0][1]
    )


def test_overlapping_rows_of_a_position_table_are_not_one_axis() -> None:
    class Tables(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.randn(16, 4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.table[:5].view(5, 1, 4) + self.table[:7].view(1, 7, 4)

    inference = inferred(Tables(), torch.randn(5, 7, 4))
    (placeholder,) = (n for n in inference.axes if n.op == "placeholder" and tuple(n.meta["val"].shape) == (5, 7, 4))
    rows, columns, _ = inference.axes[placeholder][0]
    assert isinstance(rows, Atom) and isinstance(columns, Atom) and rows is not columns


def test_single_steps_do_not_become_a_chain_of_parts() -> None:
    class Steps(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.stack([x[:, i] for i in range(20)], 1) + torch.cat([x[:, i : i + 1] for i in range(20)], 1)

    inference = inferred(Steps(), torch.randn(2, 20, 3))
    (placeholder,) = (n for n in inference.axes if n.op == "placeholder")
    assert isinstance(inference.axes[placeholder][0][1], Atom)


def test_an_operator_without_a_rule_is_a_boundary_with_a_reason() -> None:
    class Odd(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.linalg.inv(x) + x

    inference = inferred(Odd(), torch.eye(4) * 2)
    reasons = {boundary.reason for _, _, op_axes in inference.nodes() for boundary in op_axes.boundaries}
    assert any(reason.startswith("no rule for aten.") for reason in reasons)


def roles_of(name: str) -> dict[str, set[int]]:
    found: dict[str, set[int]] = {}
    for use in roles(captured(name).inference):
        found.setdefault(use.role, set()).add(use.axis.size)
    return found


def test_roles_follow_from_use() -> None:
    flux = roles_of("flux")
    assert flux["query tokens"] == {90} and flux["heads"] == {5}
    width = captured("flux").module.config.attention_head_dim * 5
    assert flux["hidden"] == {width} and 4 * width in flux["ffn"]
    wan = roles_of("wan_t2v")
    assert wan["frames"] and wan["rows"] and wan["columns"]
    assert 5 in roles_of("latte")["key tokens"]
