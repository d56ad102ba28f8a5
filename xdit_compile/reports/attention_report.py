"""Which kernels compute the attention of a program, which others could, and why the rest cannot."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterator

import torch

import xdit_compile.kernels.ring  # noqa: F401 - registers its op
from xdit_compile.ir.arguments import node_of
from xdit_compile.ir.program import Program
from xdit_compile.kernels.attention import query_of
from xdit_compile.kernels.providers import AttentionQuery
from xdit_compile.kernels.registry import PROVIDERS, choose, inexact
from xdit_compile.passes.memory.on_meta import shapes_of

ATTENTION, RING = torch.ops.xdit_compile.attention.default, torch.ops.xdit_compile.ring_attention.default


def attention_lines(program: Program, device: torch.device) -> tuple[str, ...]:
    """What computes the attention of a program on a device, a line for each provider that does and each reason.

    Nothing where attention stays as the module has it, as on one rank with ``auto``.
    """
    by_name = collections.defaultdict(list)
    for name, query in _asked(program):
        by_name[name].append(dataclasses.replace(query, device=device.type, card=device.index))
    if not by_name:
        return ()
    queries = [query for some in by_name.values() for query in some]
    reasons = {name: _refused(name, queries) for name in PROVIDERS if name not in by_name}
    able = [name for name, reason in reasons.items() if not reason]
    unable = collections.defaultdict(list)
    for name, reason in reasons.items():
        if reason:
            unable[reason].append(name)
    lines = [_told(name, some) for name, some in sorted(by_name.items())]
    lines += [f"attention could be by {', '.join(map(_marked, able))}, too"] if able else []
    return (*lines, *(f"attention not by {', '.join(names)}: {reason}" for reason, names in unable.items()))


def attention_line(name: str) -> str:
    """Who computes attention, and whether that is exact."""
    return f"attention by {name}" + (f", not exact: {inexact(name)}" if inexact(name) else "")


def _asked(program: Program) -> Iterator[tuple[str, AttentionQuery]]:
    """What each attention asks, and of which provider."""
    graphs = (program.root, *program.structures().values())
    nodes = [node for graph in graphs for node in graph.graph.nodes if node.target in (ATTENTION, RING)]
    shapes = shapes_of(program) if nodes else {}
    for node in nodes:
        q, k, v, mask = (None if each is None else shapes[node_of(each)] for each in node.args[:4])
        ring = node.target is RING
        assert q is not None and k is not None and v is not None
        yield str(node.args[-1]), query_of(q, k, v, mask, not ring and bool(node.args[4]), lse=ring)


def _refused(name: str, queries: list[AttentionQuery]) -> str:
    """Why a provider cannot compute all of these; empty where it can."""
    return next((reason for query in queries if (reason := PROVIDERS[name].unsupported(query))), "")


def _told(name: str, queries: list[AttentionQuery]) -> str:
    if name == "auto":
        return f"attention by {', '.join(dict.fromkeys(choose(name, query).name for query in queries))} (auto)"
    reason = _refused(name, queries)
    return attention_line(name) + (f"; here it {reason}" if reason else "")


def _marked(name: str) -> str:
    return f"{name} (not exact)" if inexact(name) else name
