"""The arithmetic of a mesh of ranks, and its process groups on real processes."""

from __future__ import annotations

import time

import procs
import pytest
import torch
import torch.distributed as dist

from xdit_compile.distributed.mesh import Mesh, is_simulated, simulated_members
from xdit_compile.errors import AgreementError, PlanError
from xdit_compile.kernels import collectives  # noqa: F401 - registers the ops
from xdit_compile.plan import Plan


def test_coordinates_count_row_major():
    found = [(mesh.coordinate("ring"), mesh.coordinate("ulysses")) for mesh in (mesh23(rank) for rank in range(6))]
    assert found == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]


def mesh23(rank):
    return Mesh(("ring", "ulysses"), (2, 3), rank)


def test_peers_differ_in_the_given_dimensions_only():
    mesh = mesh23(4)
    assert mesh.peers("ring") == mesh.peers(("ring",)) == [1, 4]
    assert mesh.peers("ulysses") == [3, 4, 5]
    assert mesh.peers(("ulysses", "ring")) == mesh.peers(("ring", "ulysses")) == [0, 1, 2, 3, 4, 5]
    assert mesh.peers(()) == [4]
    assert (mesh.index("ring"), mesh.index("ulysses"), mesh.index(("ring", "ulysses"))) == (1, 1, 4)
    assert (mesh.size("ring"), mesh.size(("ring", "ulysses")), mesh.size(())) == (2, 6, 1)


def test_other_dimensions_than_the_plan_knows_today():
    mesh = Mesh(("data", "cfg", "ring", "ulysses", "tensor"), (2, 2, 1, 3, 2), 17)
    assert [mesh.coordinate(name) for name in mesh.names] == [1, 0, 0, 2, 1]
    assert mesh.peers(("cfg", "tensor")) == [16, 17, 22, 23]


def test_every_rank_stands_in_one_group_of_each_kind():
    for names in ("ring", "ulysses", ("ring", "ulysses")):
        groups = {tuple(mesh23(rank).peers(names)) for rank in range(6)}
        assert sorted(rank for group in groups for rank in group) == list(range(6))


@pytest.mark.parametrize(
    "values",
    [
        (("a", "a"), (1, 2), 0),
        (("a", "b"), (1,), 0),
        (("a",), (0,), 0),
        (("a",), (2,), 2),
        (("a",), (2,), -1),
    ],
)
def test_a_mesh_that_cannot_be_is_refused(values):
    with pytest.raises(PlanError):
        Mesh(*values)


def test_unknown_dimensions_and_missing_groups_are_refused():
    with pytest.raises(PlanError, match="no dimension 'tensor'; it has ring, ulysses"):
        mesh23(0).peers("tensor")
    with pytest.raises(PlanError, match="no group over"):
        mesh23(0).group("ring")


def test_simulated_groups_tell_their_members():
    plan = Plan(ring=2, ulysses=3)
    mesh = Mesh.simulated(plan, 4)
    for names in ("ring", "ulysses", ("ulysses", "ring")):
        assert simulated_members(mesh.group(names)) == mesh.peers(names)
        for rank in mesh.peers(names):
            assert Mesh.simulated(plan, rank).group(names) == mesh.group(names)
    assert Mesh.simulated(Plan(ulysses=3), 1).group("ring") == ""
    with pytest.raises(PlanError, match="no simulated group"):
        simulated_members("3")


def test_a_simulated_group_carries_no_data():
    group = Mesh.simulated(Plan(ring=2), 0).group("ring")
    assert is_simulated(group)
    with pytest.raises(AgreementError, match="simulated"):
        torch.ops.xdit_compile.all_reduce(torch.ones(2), group)


def test_a_world_of_one_needs_no_process_group():
    mesh = Mesh.from_process_group(Plan())
    assert (mesh.world_size, mesh.rank, mesh.group(("ring", "ulysses"))) == (1, 0, "")
    with pytest.raises(PlanError, match="needs 2 processes but 1 is running"):
        Mesh.from_process_group(Plan(ring=2))


def sums(rank, plan):
    mesh = procs.connected(plan, 60)
    value = torch.tensor([float(10**rank)])
    ops = torch.ops.xdit_compile
    found = {names: ops.all_reduce(value, mesh.group(names)).item() for names in ("ring", "ulysses")}
    found["all"] = ops.all_reduce(value, mesh.group(("ring", "ulysses"))).item()
    return found


def test_groups_on_four_processes():
    found = procs.run(sums, 4, Plan(ring=2, ulysses=2))
    assert [rank["ring"] for rank in found] == [101, 1010, 101, 1010]
    assert [rank["ulysses"] for rank in found] == [11, 11, 1100, 1100]
    assert [rank["all"] for rank in found] == [1111] * 4


def one_never_comes(rank, late):
    if rank == 0:
        time.sleep(late)
        return None
    begun = time.monotonic()
    try:
        procs.connected(Plan(ring=2), 2)
    except AgreementError as error:
        return time.monotonic() - begun, str(error)
    return None


def test_a_rank_that_never_comes_is_noticed():
    waited, message = procs.run(one_never_comes, 2, 12)[1]
    assert waited < 10
    assert "ranks [0, 1] did not all answer within 2 s" in message and "\n" not in message


def fail_on_one(rank):
    if rank == 1:
        raise ValueError("this rank is unwell")
    dist.barrier()


def test_procs_reports_the_rank_that_raised():
    with pytest.raises(procs.RankFailed, match="this rank is unwell") as caught:
        procs.run(fail_on_one, 2, timeout=60)
    assert 1 in caught.value.errors


def sleep_on_one(rank):
    time.sleep(60 * rank)


@pytest.mark.slow
def test_procs_ends_ranks_that_are_late():
    begun = time.monotonic()
    with pytest.raises(procs.RankFailed, match="rank 1: did not finish"):
        procs.run(sleep_on_one, 2, timeout=15)
    assert time.monotonic() - begun < 30


def test_guidance_crosses_the_slow_link_once_and_tokens_stay_inside() -> None:
    """The example of docs/plans.md."""
    ranks = [Mesh.simulated(Plan(cfg=2, ulysses=3), rank) for rank in range(6)]
    assert [mesh.peers("ulysses") for mesh in ranks] == [[0, 1, 2]] * 3 + [[3, 4, 5]] * 3
    assert [mesh.peers("cfg") for mesh in ranks[:3]] == [[0, 3], [1, 4], [2, 5]]
    order = ("ulysses", "cfg", "ring", "data", "tensor")
    assert Mesh.simulated(Plan(cfg=2, ulysses=3, mesh_order=order), 0).peers("ulysses") == [0, 2, 4]
