"""Bytes that one node of inductor's scheduler reads from a card's memory and writes to it, each element once.

Inductor has such a number itself, but counts all of a buffer where a kernel reads a part of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import sympy
from torch._inductor import ir
from torch._inductor.dependencies import MemoryDep, StarDep
from torch._inductor.scheduler import BaseSchedulerNode, ExternKernelSchedulerNode, FusedSchedulerNode, SchedulerNode
from torch._inductor.virtualized import V

from .own_ops import some_rows, written_in_triton

INTEGERS = {
    "ModularIndexing": lambda value, divisor, modulus: value // divisor % modulus,
    "FloorDiv": lambda value, divisor: value // divisor,
}
"""Inductor's own functions of positions."""


def moved_bytes(node: BaseSchedulerNode) -> int:
    """Bytes read and written; of operators that are called, what they are given and make, or the rows they touch."""
    if isinstance(node.node, ir.UserDefinedTritonKernel):
        return written_in_triton(node.node)
    if (rows := some_rows(node.node)) is not None:
        return rows
    writes = node.get_read_write_buffer_accesses(include_reads=False, include_writes=True)
    if isinstance(node, ExternKernelSchedulerNode):
        return sum(writes.values()) + (0 if isinstance(node.node, ir.MultiOutput) else _given(node.node))
    accesses = node.get_read_write_buffer_accesses(include_reads=True, include_writes=False)
    inside = node.get_buffer_names() if isinstance(node, FusedSchedulerNode) else ()
    reads = [name for name in accesses if name not in inside and not _only_kept(name, node)]
    return sum(min(writes[name], _written(name, node)) for name in writes) + sum(
        min(accesses[name], _parts(name, node.read_writes.reads)) for name in reads
    )


def _written(name: str, node: BaseSchedulerNode) -> int:
    """Bytes of a buffer that a node writes; positions that it looks up are taken for different ones."""
    made = _parts(name, node.read_writes.writes)
    makers = [
        each
        for each in node.get_nodes()
        if isinstance(each, SchedulerNode)
        and any(
            isinstance(dep, MemoryDep) and dep.name == name and dep.is_indirect() for dep in each.read_writes.writes
        )
    ]
    stored = sum(_elements(each.get_ranges()[0]) for each in makers) * int(_buffer(name).get_dtype().itemsize)
    return min(made, stored) if makers else made


def _only_kept(name: str, node: BaseSchedulerNode) -> bool:
    """Whether a node writes to positions of a buffer and reads none: that the rest stays is all it takes of it."""
    written = {each for buffer in node.get_outputs() for each in buffer.get_mutations()}
    return name in written and all(isinstance(dep, StarDep) for dep in node.read_writes.reads if dep.name == name)


def _given(kernel: Any) -> int:
    """Bytes of the tensors that an operator is given, views by what they show."""
    seen = {}
    for each in _flat(getattr(kernel, "inputs", ())):
        name = each.get_name()
        whole = _bytes(_buffer(name).get_size(), each)
        seen[name, str(each.get_layout().offset)] = min(_bytes(each.get_size(), each), whole)
    return sum(seen.values())


def _parts(name: str, deps: Iterable[Any]) -> int:
    """Bytes of the parts of a buffer that are read or written, each element once; its dims may lie in any order."""
    buffer = _buffer(name)
    whole, item = _elements(buffer.get_size()), buffer.get_dtype().itemsize
    here = {dep for dep in deps if dep.name == name}
    if not all(isinstance(dep, MemoryDep) for dep in here) or int(buffer.get_layout().storage_size()) != whole:
        return whole * item
    if any(dep.is_indirect() for dep in here):
        return whole * item
    if len(here) == 1 and _elements([next(iter(here)).get_numel()]) == whole:
        return whole * item
    touched = np.zeros(whole, dtype=bool)
    for dep in here:
        positions = _positions(dep)
        touched[positions[(positions >= 0) & (positions < whole)]] = True
    return int(touched.sum()) * item


def _positions(dep: MemoryDep) -> np.ndarray:
    """Where a buffer is read; what is read under a condition may seem to lie before or behind it."""
    names, sizes = dep.var_names, [int(size) for size in dep.size]
    function = sympy.lambdify(names, dep.index.expand(identity=True), modules=[INTEGERS, "numpy"])
    grids = np.meshgrid(*map(np.arange, sizes), indexing="ij", sparse=True)
    return np.broadcast_to(np.asarray(function(*grids)), sizes).reshape(-1)


def _flat(inputs: Any) -> Iterable[Any]:
    for each in inputs:
        if isinstance(each, list | tuple):
            yield from _flat(each)
        elif hasattr(each, "get_size") and hasattr(each, "get_layout"):
            yield each


def _buffer(name: str) -> Any:
    """A buffer by its name, or by one that it has after something wrote to it."""
    real = V.graph.scheduler.mutation_real_name.get(name, name)
    return V.graph.name_to_buffer.get(real) or V.graph.graph_inputs[real]


def _bytes(sizes: Iterable[Any], like: Any) -> int:
    return _elements(sizes) * like.get_dtype().itemsize


def _elements(sizes: Iterable[Any]) -> int:
    return math.prod(int(size) for size in sizes)
