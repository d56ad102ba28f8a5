"""Bytes that calls send, counted in graphs, beside what the passes noted when they made these."""

from __future__ import annotations

import pytest
import torch
from splitting import captured, partition_all

from xdit_compile import Plan
from xdit_compile.cache.programs import program_from_plain, program_to_plain
from xdit_compile.distributed.mesh import Mesh
from xdit_compile.serving.ranks.traffic import sent_by


@pytest.mark.parametrize("plan", [Plan(ulysses=2), Plan(ring=2), Plan(tensor=2)], ids=["ulysses", "ring", "tensor"])
@pytest.mark.parametrize("name", ["flux", "pixart"])
def test_bytes_in_graphs_are_those_of_the_ledger(name: str, plan: Plan):
    for rank, made in enumerate(partition_all(captured(name).inference, plan)):
        mesh = Mesh.simulated(plan, rank)
        noted = sum(each.bytes for each in made.ledger.collectives)
        assert sent_by(made.program, mesh) == noted > 0
        plain, tensors = program_to_plain(made.program)
        assert sent_by(program_from_plain(plain, tensors, torch.device("cpu")), mesh) == noted
