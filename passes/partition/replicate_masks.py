"""Which values are wanted whole: attention masks and what they are made of."""

from __future__ import annotations

from torch import fx

from xdit_compile.passes.axes.flops import flops
from xdit_compile.passes.axes.infer import Frame
from xdit_compile.passes.axes.operators import AttentionOp
from xdit_compile.passes.axes.rule import tensor_operands


def wants_whole(frame: Frame, wanted_results: list[fx.Node]) -> set[fx.Node]:
    """Nodes of a frame of which somebody wants every position, found backwards from masks and from ``wanted_results``.

    A mask is permuted to the order in which ranks hold keys, so a sliced one would have to be gathered again. What it
    costs to compute a mask everywhere is nothing; the search stops at operators that cost something.
    """
    wanted = set(wanted_results)
    for node in reversed(frame.graph.nodes):
        op_axes = frame.op_axes.get(node)
        attention = op_axes.operator if op_axes is not None else None
        if op_axes is not None and isinstance(attention, AttentionOp) and attention.mask is not None:
            wanted.add(op_axes.operands[attention.mask])
        if node in wanted and node.op == "call_function" and not flops(node):
            operands = tensor_operands(node)
            read = op_axes.read() if op_axes is not None else range(len(operands))
            wanted.update(operands[operand] for operand in read)
    return wanted
