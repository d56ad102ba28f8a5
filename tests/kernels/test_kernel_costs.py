"""What ops that reach other ranks allocate, and how many operators they run: four pretended ranks in one process."""

from __future__ import annotations

import collections

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from xdit_compile.ir.peak_memory import peak_bytes
from xdit_compile.kernels.collectives.all_gather import all_gather, gather_start
from xdit_compile.kernels.collectives.halo import halo_exchange, halo_finish
from xdit_compile.kernels.ring import ring_attention
from xdit_compile.kernels.stale_rows import stale_finish

FREE = ("view", "split", "narrow", "slice", "expand", "transpose", "unsqueeze", "detach", "alias", "unbind", "empty")


class Ran(TorchDispatchMode):
    """Counts operators that do something."""

    def __init__(self):
        super().__init__()
        self.names = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.partition("::")[2]
        self.names[name] += not any(word in name for word in FREE)
        return func(*args, **(kwargs or {}))


def ran(fn, *args):
    with Ran() as mode:
        fn(*args)
    return +mode.names


def pretend(ranks):
    """The name of a group of so many ranks, of which this is the second; nothing is sent."""
    dist.init_process_group("fake", rank=1, world_size=ranks, store=FakeStore())
    return dist.group.WORLD.group_name


@pytest.fixture
def four():
    try:
        yield pretend(4)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    ("shape", "sizes", "copied", "wholes"),
    [
        ((3, 5, 7), (5, 5, 4, 4), ["cat"], 2),
        ((3, 4, 7), (5, 4, 4, 4), ["copy_", "cat"], 2.5),
        ((3, 5, 7), (5, 5, 5, 5), ["cat"], 2),
        ((1, 5, 7), (5, 5, 5, 5), [], 1),
    ],
)
def test_a_gather_sends_from_one_place_and_copies_once(four, shape, sizes, copied, wholes):
    x, sizes = torch.randn(shape), list(sizes)
    assert ran(all_gather, x, 1, sizes, four) == collections.Counter(["_allgather_base_", *copied])
    assert peak_bytes(all_gather, x, 1, sizes, four) <= wholes * 4 * x.nbytes


def test_a_shard_that_lies_otherwise_is_copied_into_its_place(four):
    x = torch.randn(7, 5, 3).transpose(0, 2)
    assert ran(all_gather, x, 1, [5, 5, 5, 5], four) == {"copy_": 1, "_allgather_base_": 1, "cat": 1}


@pytest.mark.parametrize("sizes", [(5, 5, 5, 5), (5, 5, 4, 4)])
def test_an_exchange_behind_a_step_holds_each_shard_once(four, sizes):
    x, state = torch.randn(2, 5, 7), torch.zeros(2, sum(sizes), 7)
    assert peak_bytes(gather_start, x, 1, list(sizes), four) == 4 * x.nbytes
    arriving, ends = torch.randn(4 * x.numel()), [sum(sizes[:at]) for at in range(5)]
    counts = [size * (rank != 1) for rank, size in enumerate(sizes)]
    runs = [end for rank in (0, 2, 3) for end in ends[rank : rank + 2]]
    assert ran(stale_finish, state, arriving, 1, counts, runs, 5, four) == {"copy_": 3, "set_": 1}
    assert arriving.untyped_storage().nbytes() == 0, "the room for this step's rows, while the next step's is filled"
    assert not ran(stale_finish, state, arriving, 1, counts, runs, 5, four)


def test_rows_are_copied_once_where_they_leave_and_once_where_they_join(four):
    x = torch.randn(2, 6, 7)
    row = x.nbytes // 6
    result = peak_bytes(halo_exchange, x, 1, [0, 5, 11, 17], [7, 13, 19, 24], [6] * 4, 1, four)
    assert result <= (2 + 2 + 8) * row
    arriving, here = torch.randn(2 * 7), torch.randn(2, 2, 7)
    for before in (True, False):
        assert ran(halo_finish, arriving, here, 1, 0, 1, before, 0, four) == {"cat": 1}
        assert peak_bytes(halo_finish, arriving, here, 1, 0, 1, before, 0, four) == 3 * row


def ring(ranks, dtype, measure):
    try:
        group = pretend(ranks)
        q, k, v = (torch.zeros(1, 2, 5, 8, dtype=dtype) for _ in range(3))
        return measure(ring_attention, q, k, v, None, [5] * ranks, None, False, group, "auto")
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_hop_of_a_ring_packs_nothing_and_merges_in_few_kernels(dtype):
    hop = ring(4, dtype, ran) - ring(3, dtype, ran)
    moved = [hop.pop(name) for name in ("send", "recv_", "_scaled_dot_product_flash_attention_for_cpu")]
    assert moved == [1, 1, 1]
    merged = ["sub", "nan_to_num_", "sigmoid_", "lerp_", "logaddexp", *["_to_copy"] * (dtype == torch.bfloat16)]
    assert hop == collections.Counter(merged)
    assert ring(4, dtype, peak_bytes) == ring(3, dtype, peak_bytes)
