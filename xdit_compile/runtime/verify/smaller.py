"""A smaller call of a module, with which one is verified for which the module itself has no memory."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from torch import fx
from torch.utils import _pytree as pytree

from xdit_compile.ir.axes import Atom, Axis, Concat, Product, atoms
from xdit_compile.ir.program import Input
from xdit_compile.passes.axes.infer import Inference

FEW = 16
"""What is left of an axis: the rest of a division by this, and this once."""
LEAST_GAIN = 2
"""How many times as many positions the whole call must have at least."""

Sizes = Mapping[int, int]


def smaller(inference: Inference, args: tuple, kwargs: dict, ranks: int) -> tuple[tuple, dict] | None:
    """The same call with fewer positions along the axes of its result, the first of each; None where none can be left.

    Such are axes of inputs on which no weight has a dim, and of which no code has read a value: rows, columns, frames,
    tokens of the picture. Inner factors are the code's own. All inputs are cut alike, by what their dims mean.

    Args:
        ranks: how many share the call; no fewer positions are left than they are.
    """
    few = FEW * max(1, math.ceil(ranks / FEW))
    long = [atom for atom in _free(inference) if atom.size >= 2 * few]
    cut = {id(atom): few + atom.size % few for atom in long}
    whole = math.prod(atom.size for atom in long)
    if whole < LEAST_GAIN * math.prod(cut.values()):
        return None
    leaves, spec = pytree.tree_flatten((args, kwargs))
    for program_input, node in placeholders(inference):
        if program_input.kind == "user":
            leaves[int(program_input.target)] = _cut(leaves[int(program_input.target)], inference.axes[node][0], cut)
    return pytree.tree_unflatten(leaves, spec)


def placeholders(inference: Inference) -> Iterator[tuple[Input, fx.Node]]:
    """What a program is given, with the node that stands for it."""
    program = inference.program
    yield from zip(program.inputs, program.root.graph.find_nodes(op="placeholder"), strict=True)


def _free(inference: Inference) -> list[Atom]:
    """Atoms of inputs and results alike that the caller chose the size of."""
    made = {id(atom) for axis in _results(inference) for atom in atoms(axis)}
    return [atom for atom in free_atoms(inference) if id(atom) in made]


def free_atoms(inference: Inference) -> list[Atom]:
    """Atoms of which inputs have dims and weights have none.

    Inner factors are the code's own, and an input of which the code reads the values would be another at another size.
    """
    input_atoms: dict[int, Atom] = {}
    fixed: set[int] = set()
    read = {guard.position for guard in inference.program.guards}
    for program_input, node in placeholders(inference):
        for axis in inference.axes[node][0]:
            if program_input.kind == "user":
                input_atoms.update((id(atom), atom) for atom in atoms(axis))
                fixed.update(map(id, atoms(axis) if program_input.target in read else _inner(axis)))
            elif program_input.kind != "constant":
                fixed.update(map(id, atoms(axis)))
    return [atom for key, atom in input_atoms.items() if key not in fixed]


def _results(inference: Inference) -> Iterator[Axis]:
    (output,) = inference.program.root.graph.find_nodes(op="output")
    for leaf in output.args[0]:
        yield from inference.axes[leaf][0]


def _inner(axis: Axis) -> Iterator[Atom]:
    """Atoms inside an axis that are not the outermost factor there: patches, steps, halves."""
    if isinstance(axis, Product):
        yield from _inner(axis.factors[0])
        for factor in axis.factors[1:]:
            yield from atoms(factor)
    elif isinstance(axis, Concat):
        for part in axis.parts:
            yield from _inner(part)


def _cut(tensor: torch.Tensor, axes: list[Axis], sizes: Sizes) -> torch.Tensor:
    for dim, axis in enumerate(axes):
        if any(id(atom) in sizes for atom in atoms(axis)):
            tensor = tensor.index_select(dim, _kept(axis, sizes).to(tensor.device))
    return tensor


def _kept(axis: Axis, sizes: Sizes) -> torch.Tensor:
    """The positions of an axis that are left."""
    if isinstance(axis, Product):
        kept = torch.zeros(1, dtype=torch.long)
        for factor in axis.factors:
            kept = (kept[:, None] * factor.size + _kept(factor, sizes)).flatten()
        return kept
    if isinstance(axis, Concat):
        starts = [sum(part.size for part in axis.parts[:at]) for at in range(len(axis.parts))]
        return torch.cat([start + _kept(part, sizes) for start, part in zip(starts, axis.parts, strict=True)])
    return torch.arange(sizes.get(id(axis), axis.size))
