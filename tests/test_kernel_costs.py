"""What ops that reach other ranks allocate, and how many operators they run: four pretended ranks in one process."""

from __future__ import annotations

import collections

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from xdit_compile.kernels.collectives import all_gather, gather_start, halo_exchange, halo_finish
from xdit_compile.kernels.ring import ring_attention
from xdit_compile.kernels.stale import stale_finish

VIEWS = ("view", "split", "narrow", "slice", "expand", "transpose", "unsqueeze", "detach", "select", "permute", "alias")


class Costs(TorchDispatchMode):
    """Bytes of new memory, and operators that are no views, by name."""

    def __init__(self):
        super().__init__()
        self.bytes, self.ran, self._seen = 0, collections.Counter(), {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self._know(args)
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.partition("::")[2]
        if not any(view in name for view in VIEWS) and not name.startswith("empty") and name != "new_empty":
            self.ran[name] += 1
        self.bytes += self._know(result)
        return result

    def _know(self, value):
        found = 0
        for x in torch.utils._pytree.tree_leaves(value):
            if isinstance(x, torch.Tensor) and (key := x.untyped_storage()._cdata) not in self._seen:
                self._seen[key] = x
                found += x.untyped_storage().nbytes()
        return found


@pytest.fixture
def four():
    """The name of a group of four ranks, of which this is the second; nothing is sent."""
    dist.init_process_group("fake", rank=1, world_size=4, store=FakeStore())
    try:
        yield dist.group.WORLD.group_name
    finally:
        dist.destroy_process_group()


def cost(fn, *args):
    with Costs() as costs:
        fn(*args)
    return costs


@pytest.mark.parametrize(("sizes", "dim", "wholes"), [((5, 5, 4, 4), 1, 2), ((5, 5, 5, 5), 1, 2), ((5, 5, 5, 5), 0, 1)])
def test_a_gather_has_one_buffer_and_its_result(four, sizes, dim, wholes):
    x = torch.randn(5, 3, 7) if dim == 0 else torch.randn(3, 5, 7)
    assert cost(all_gather, x, dim, list(sizes), four).bytes <= wholes * 4 * x.nbytes


def test_a_shard_that_lies_otherwise_is_copied_into_its_place(four):
    x = torch.randn(7, 5, 3).transpose(0, 2)
    assert cost(all_gather, x, 1, [5, 5, 5, 5], four).bytes == 2 * 4 * x.nbytes


@pytest.mark.parametrize("sizes", [(5, 5, 5, 5), (5, 5, 4, 4)])
def test_an_exchange_behind_a_step_holds_each_shard_once(four, sizes):
    x, state = torch.randn(2, 5, 7), torch.zeros(2, sum(sizes), 7)
    with Costs() as costs:
        arriving = gather_start(x, 1, list(sizes), four)
    assert costs.bytes == 4 * x.nbytes
    counts = [size * (rank != 1) for rank, size in enumerate(sizes)]
    with Costs() as costs:
        stale_finish(state, arriving, 1, counts, runs(sizes), 5, four)
    assert costs.bytes == 0


def runs(sizes):
    """Where the rows of all ranks but the second lie."""
    ends = [sum(sizes[: at + 1]) for at in range(len(sizes))]
    return [end for at, size in enumerate(sizes) if at != 1 for end in (ends[at] - size, ends[at])]


def test_rows_are_copied_once_where_they_leave_and_once_where_they_join(four):
    x = torch.randn(2, 6, 7)
    starts, stops = [0, 5, 11, 17], [7, 13, 19, 24]
    result = x.nbytes // 6 * 8
    assert cost(halo_exchange, x, 1, starts, stops, [6] * 4, 1, four).bytes == 2 * x.nbytes // 6 * 2 + result
    arriving, here = torch.randn(2 * 7), torch.randn(2, 2, 7)
    for before in (True, False):
        costs = cost(halo_finish, arriving, here, 1, 0, 1, before, 0, four)
        assert costs.ran == {"cat": 1} and costs.bytes == here.nbytes + arriving.nbytes


def hop(dtype):
    """Operators and bytes that one more rank in a ring costs each of them."""
    costs = []
    for ranks in (3, 4):
        dist.init_process_group("fake", rank=1, world_size=ranks, store=FakeStore())
        try:
            group = dist.group.WORLD.group_name
            q, k, v = (torch.zeros(1, 2, 5, 8, dtype=dtype) for _ in range(3))
            costs.append(cost(ring_attention, q, k, v, None, [5] * ranks, None, False, group, "auto"))
        finally:
            dist.destroy_process_group()
    return costs[1].ran - costs[0].ran, costs[1].bytes - costs[0].bytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_hop_of_a_ring_packs_nothing_and_merges_in_few_kernels(dtype):
    ran, size = hop(dtype)
    moved = [ran.pop(name) for name in ("send", "recv_", "_scaled_dot_product_flash_attention_for_cpu")]
    assert moved == [1, 1, 1]
    assert ran == collections.Counter(("sub", "nan_to_num_", "sigmoid_", "lerp_", "logaddexp")) + (
        collections.Counter(["_to_copy"]) if dtype == torch.bfloat16 else collections.Counter()
    )
    assert size <= 3 * 80 * dtype.itemsize + (80 * 4 if dtype == torch.bfloat16 else 0) + 3 * 10 * 4
