"""Collectives on real processes, eager and compiled, against what their simulation says they do."""

from __future__ import annotations

import itertools
import re

import procs
import pytest
import torch
import torch.distributed as dist
from torch._inductor.utils import run_and_get_code

from xdit_compile.backends.inductor_order import pin_order
from xdit_compile.distributed.mesh import Mesh
from xdit_compile.errors import AgreementError
from xdit_compile.kernels.collectives.registration import collective, elements_sent, ordered_ops, simulate
from xdit_compile.plan import Plan

OPS = torch.ops.xdit_compile
DTYPES = (torch.float32, torch.bfloat16, torch.int64, torch.bool)


def tensor(shape, rank, dtype=torch.float32):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(100 + rank)) * 8
    return values > 0 if dtype == torch.bool else values.to(dtype)


def all_to_all_case(name, splits, dtype=torch.float32):
    """``splits[i][j]`` elements go from rank i to rank j."""

    def args(rank, group):
        out_splits = [row[rank] for row in splits]
        return tensor((sum(splits[rank]),), rank, dtype), out_splits, list(splits[rank]), group

    return name, len(splits), OPS.all_to_all.default, args


def all_gather_case(name, sizes, dim, others=(3, 5), dtype=torch.float32, transposed=False):
    def args(rank, group):
        place = dim % (len(others) + 1)
        x = tensor((*others[:place], sizes[rank], *others[place:]), rank, dtype)
        return (x.transpose(0, 1).contiguous().transpose(0, 1) if transposed else x), dim, list(sizes), group

    return name, len(sizes), OPS.all_gather.default, args


def all_reduce_case(name, ranks, shape, *op, dtype=torch.float32):
    def args(rank, group):
        return (tensor(shape, rank, dtype).transpose(0, -1), group, *op)

    return name, ranks, OPS.all_reduce.default, args


def scatter_case(name, sizes, dim, others=(3, 5), dtype=torch.float32):
    def args(rank, group):
        place = dim % (len(others) + 1)
        return tensor((*others[:place], sum(sizes), *others[place:]), rank, dtype), dim, list(sizes), rank, group

    return name, len(sizes), OPS.reduce_scatter.default, args


def halo_case(name, sizes, before, after, dim=1, others=(2, 3), dtype=torch.float32):
    def args(rank, group):
        place = dim % (len(others) + 1)
        x = tensor((*others[:place], sizes[rank], *others[place:]), rank, dtype)
        return x, dim, *around(sizes, before, after), list(sizes), rank, group

    return name, len(sizes), OPS.halo_exchange.default, args


def rows_case(name, sizes, rows):
    def args(rank, group):
        starts, stops = ([row[k] for row in rows] for k in range(2))
        return tensor((2, sizes[rank], 3), rank, torch.float32), 1, starts, stops, list(sizes), rank, group

    return name, len(sizes), OPS.halo_exchange.default, args


def around(sizes, before, after):
    """The rows of every rank with some before and after; none for a rank without rows."""
    ends = list(itertools.accumulate(sizes))
    rows = [
        (max(e - n - before, 0), min(e + after, sum(sizes))) if n else (0, 0) for n, e in zip(sizes, ends, strict=True)
    ]
    return [a for a, _ in rows], [b for _, b in rows]


CASES = [
    all_to_all_case("even", ((3, 3), (3, 3))),
    all_to_all_case("uneven", ((3, 1), (4, 2))),
    all_to_all_case("uneven, 3", ((3, 1, 2), (0, 2, 5), (4, 0, 1))),
    all_to_all_case("nothing from one", ((0, 0), (4, 2))),
    all_to_all_case("nothing at all", ((0, 0), (0, 0))),
    *(all_to_all_case(f"{dtype}", ((3, 1, 2), (0, 2, 5), (4, 0, 1)), dtype) for dtype in DTYPES),
    all_gather_case("even", (4, 4), 0),
    all_gather_case("even along 1", (4, 4, 4), 1),
    all_gather_case("uneven along 1", (4, 3), 1),
    all_gather_case("uneven along -1", (4, 3, 3), -1),
    all_gather_case("one has nothing", (4, 0, 3), 1),
    all_gather_case("none has anything", (0, 0), 1),
    all_gather_case("other dims empty", (2, 3), 1, (0, 5)),
    all_gather_case("not contiguous", (4, 3), 1, transposed=True),
    *(all_gather_case(f"{dtype}", (3, 2), 1, dtype=dtype) for dtype in DTYPES),
    *(all_gather_case(f"{dtype}, even", (2, 2), 1, dtype=dtype) for dtype in DTYPES),
    all_reduce_case("sum", 2, (3, 5)),
    all_reduce_case("sum, named", 3, (3, 5), "sum"),
    all_reduce_case("max", 3, (3, 5), "max"),
    all_reduce_case("empty", 2, (0, 5)),
    all_reduce_case("bfloat16", 2, (3, 5), dtype=torch.bfloat16),
    all_reduce_case("int64", 2, (3, 5), dtype=torch.int64),
    scatter_case("scattered evenly", (4, 4), 1),
    scatter_case("scattered, uneven", (2, 0, 3), 0),
    scatter_case("scattered, bfloat16", (3, 2), -1, dtype=torch.bfloat16),
    halo_case("one row", (4, 4, 4), 1, 1),
    halo_case("uneven", (5, 4, 4), 1, 2),
    halo_case("before only", (5, 4), 2, 0, dim=0),
    halo_case("after only", (5, 4), 0, 2, dim=-1),
    halo_case("wider than a neighbour", (4, 1, 4), 3, 2),
    halo_case("a rank without rows", (4, 0, 4), 2, 2),
    halo_case("wider than everything", (2, 1), 9, 9),
    halo_case("no halo", (2, 3), 0, 0),
    rows_case("rows of others alone", (3, 2, 4), [(5, 8), (0, 0), (1, 9)]),
    halo_case("bfloat16", (3, 2), 1, 1, dtype=torch.bfloat16),
]


def run_all(rank, ranks, backend):
    """Every case of that many ranks: its result, or None where it matches the simulation run on this very rank."""
    group = procs.connected(Plan(ulysses=ranks), 60).group("ulysses")
    wrong = []
    for name, count, op, args in CASES:
        if count != ranks:
            continue
        torch._dynamo.reset()
        run = op if backend is None else torch.compile(wrapped(op), fullgraph=True, backend=backend)
        expected = simulate(op, [args(other, group) for other in range(ranks)])[rank]
        mine = args(rank, group)
        actual = run(*mine)
        expected, tail = (expected * 2, 1) if backend and expected.dtype != torch.bool else (expected, 0)
        same = actual.shape == expected.shape and actual.dtype == expected.dtype
        same = same and torch.allclose(actual.float(), expected.float(), rtol=1e-2 if tail else 1e-6)
        if not same or (not tail and actual.stride() != expected.stride()):
            wrong.append((op.name(), name, actual, expected))
    return wrong + ([] if backend else behind_a_step(rank, ranks, group))


def behind_a_step(rank, ranks, group):
    """What ranks leave one another of a tensor that each has all of, once it was waited for; None where it is right."""
    wrong = []
    for sizes in ([3] * ranks, [5, 4, 4][:ranks], [4, 0, 3][:ranks], [0] * ranks):
        shards = [tensor((2, size, 3), other) for other, size in enumerate(sizes)]
        arriving = OPS.gather_start(shards[rank], 1, sizes, group)
        whole, state = torch.cat(shards, 1), torch.zeros(2, sum(sizes), 3)
        ends = [0, *itertools.accumulate(sizes)]
        state[:, ends[rank] : ends[rank + 1]] = shards[rank]
        counts = [size * (other != rank) for other, size in enumerate(sizes)]
        runs = [end for other in range(ranks) if counts[other] for end in ends[other : other + 2]]
        OPS.stale_finish(state, arriving, 1, counts, runs, max(sizes), group)
        if not torch.equal(state, whole):
            wrong.append((sizes, state, whole))
    return wrong


def wrapped(op):
    """The op between others, so that the compiler has something to do around it."""

    def between(x, *rest):
        out = op(x.clone(), *rest)
        return out * 2 if out.dtype != torch.bool else out

    return between


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("backend", [None, "eager"])
def test_what_they_do_is_what_the_simulation_says(ranks, backend):
    for rank, wrong in enumerate(procs.run(run_all, ranks, ranks, backend)):
        assert not wrong, f"rank {rank}"


def chained(rank, group_size):
    """Whether independent collectives in one compiled graph give what they give eagerly, and the order they run in."""
    pin_order()
    group = procs.connected(Plan(ulysses=group_size), 100).group("ulysses")
    sizes = [5, 4, 4][:group_size]

    def block(x, y):
        arriving = OPS.halo_start(x.cos(), 1, *around(sizes, 1, 1), sizes, rank, group)
        whole = OPS.all_gather(x * 2, 1, sizes, group)
        other = OPS.all_reduce(y.sin(), group)
        most = OPS.all_reduce(y.cos(), op="max", group=group)
        halo = OPS.halo_exchange(x, 1, *around(sizes, 1, 1), sizes, rank, group)
        splits = [6] * group_size
        part = OPS.all_to_all(x[:, :group_size].transpose(0, 1).reshape(-1), splits, splits, group)
        near = x[:, :2] if rank else x[:, -2:]
        joined = OPS.halo_finish(arriving, near, 1, 0, 1, rank > 0, 1, group)
        return whole + 1, other.mean() + halo, part.relu() * most.sum(), joined * 2

    x, y = tensor((2, sizes[rank], 3), rank), tensor((4, 4), rank)
    expected = block(x, y)
    actual, (code,) = run_and_get_code(torch.compile(block, fullgraph=True), x, y)
    same = all(torch.allclose(a, b, atol=1e-5) for a, b in zip(actual, expected, strict=True))
    return same, ops_called(code)


def ops_called(code):
    return re.findall(r"torch\.ops\.xdit_compile\.(\w+)\.default\(", code)


@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_inductor_compiles_them_whole_and_in_one_order(ranks):
    """Left to itself inductor moves the last before the first, and the third to last elsewhere on every rank."""
    order = ["halo_start", "all_gather", "all_reduce", "all_reduce", "halo_exchange", "all_to_all", "halo_finish"]
    assert procs.run(chained, ranks, ranks, timeout=200) == [(True, order)] * ranks


@pytest.mark.parametrize(("name", "count", "op", "args"), CASES, ids=[f"{c[2].name()} {c[0]}" for c in CASES])
def test_fakes_have_the_shapes_of_the_simulation(name, count, op, args):
    plan = Plan(ulysses=count)
    groups = [Mesh.simulated(plan, rank).group("ulysses") for rank in range(count)]
    every = [args(rank, group) for rank, group in enumerate(groups)]
    for mine, expected in zip(every, simulate(op, every), strict=True):
        fake = op(mine[0].to("meta"), *mine[1:])
        assert (fake.shape, fake.stride(), fake.dtype) == (expected.shape, expected.stride(), expected.dtype)


def test_a_compiler_drops_none():
    def block(x, y):
        OPS.all_reduce(y.cos(), "", "max")
        nothing = OPS.all_to_all(x[:0], [0], [0], "")
        return OPS.all_gather(y.sin(), 0, [4], ""), nothing + 1, OPS.all_reduce(x * 2, "")

    pin_order()
    _, (code,) = run_and_get_code(torch.compile(block, fullgraph=True), torch.randn(6), torch.randn(4))
    assert ops_called(code) == ["all_reduce", "all_to_all", "all_gather", "all_reduce"]


def test_every_op_that_reaches_other_ranks_or_draws_is_ordered():
    met = "all_to_all all_to_all_start all_gather gather_start all_reduce reduce_scatter halo_exchange halo_start "
    met = (met + "ring_attention").split()
    assert {op for op in ordered_ops() if collective(op)} == {getattr(OPS, name).default for name in met}
    others = "halo_finish halo_finish_both all_to_all_finish all_to_all_settle draw".split()
    assert {op for op in ordered_ops() if not collective(op)} == {getattr(OPS, name).default for name in others}


def test_alone_they_copy():
    x = torch.randn(2, 3).t()
    for result in (
        OPS.all_gather(x, 0, [3], ""),
        OPS.all_reduce(x, ""),
        OPS.halo_exchange(x, 0, [0], [3], [3], 0, ""),
        OPS.all_to_all(x.reshape(-1), [6], [6], "").view(3, 2),
    ):
        assert torch.equal(result, x) and result.data_ptr() != x.data_ptr() and result.is_contiguous()


def test_opcheck():
    x = torch.randn(6)
    for op, args in (
        (OPS.all_to_all, (x, [6], [6], "")),
        (OPS.all_to_all_start, (x, [6], [6], "")),
        (OPS.all_to_all_finish, (x, x, "")),
        (OPS.all_gather, (x, 0, [6], "")),
        (OPS.all_reduce, (x, "")),
        (OPS.halo_exchange, (x, 0, [0], [6], [6], 0, "")),
        (OPS.halo_start, (x, 0, [0], [6], [6], 0, "")),
        (OPS.halo_finish, (x[:4], x.view(2, 3), 0, 0, 1, True, 2, "")),
        (OPS.halo_finish, (x, x.view(1, 3, 2, 1).transpose(1, 3), 1, 0, 1, True, 2, "")),
        (OPS.halo_finish_both, (x[:4], x.view(2, 3), x.view(2, 3), 1, [0, 2], [1, 1], [2, 2], "")),
        (OPS.gather_start, (x, 0, [6], "")),
    ):
        torch.library.opcheck(op.default, args)


@pytest.mark.parametrize(
    ("op", "args", "words"),
    [
        ("all_to_all", ((5,), [3, 2], [3, 3]), "6 elements"),
        ("all_to_all", ((6,), [3], [3, 3]), "one split per rank"),
        ("all_gather", ((6,), 0, [3, 3]), "shard of 6"),
        ("all_gather", ((6,), 1, [6]), "along dim 1"),
        ("halo_exchange", ((6,), 0, [0, 5], [7, 11], [6, 5], 1), "6 rows at position 1"),
        ("halo_exchange", ((6,), 2, [0, 5], [7, 11], [6, 5], 0), "along dim 2"),
        ("halo_exchange", ((6,), 0, [0], [7], [6, 5], 0), "as many starts"),
        ("halo_exchange", ((6,), 0, [0, 5], [7, 12], [6, 5], 0), "5. to .7, 12. where there are 11"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(op, args, words):
    x = torch.ones(args[0])
    for device in ("cpu", "meta"):
        with pytest.raises(ValueError, match=words):
            getattr(OPS, op)(x.to(device), *args[1:], "")
    with pytest.raises(ValueError, match="sum, max"):
        OPS.all_reduce(x, "", "mean")


def test_a_simulation_refuses_ranks_that_disagree():
    x = torch.ones(3)
    with pytest.raises(ValueError, match="all_gather sizes on rank 1"):
        simulate(OPS.all_gather.default, [(x, 0, [3, 3], "g"), (x, 0, [3, 2], "g")])
    with pytest.raises(ValueError, match="all_to_all splits on rank 0"):
        simulate(OPS.all_to_all.default, [(x, [2, 2], [1, 2], "g"), (x, [1, 2], [2, 1], "g")])
    with pytest.raises(ValueError, match="halo_exchange index on rank 1"):
        simulate(OPS.halo_exchange.default, [(x, 0, [0, 2], [4, 6], [3, 3], 0, "g")] * 2)
    with pytest.raises(ValueError, match="all_reduce on rank 1"):
        simulate(OPS.all_reduce.default, [(x, "g"), (x, "g", "max")])


def test_elements_that_leave_a_rank():
    x = torch.ones(2, 6, 4)
    assert elements_sent(OPS.all_to_all.default, (torch.ones(9), [1, 1, 1], [2, 3, 4], "g"), 3, 1) == 6
    assert elements_sent(OPS.all_gather.default, (x, 1, [6, 5, 5], "g"), 3, 0) == 2 * 48
    assert elements_sent(OPS.all_reduce.default, (x, "g"), 4, 0) == 72
    assert (
        elements_sent(OPS.halo_exchange.default, (x, 1, *around([3, 6, 4], 2, 1), [3, 6, 4], 1, "g"), 3, 1)
        == (1 + 2) * 8
    )
    assert elements_sent(OPS.halo_exchange.default, (x, 1, *around([3, 6, 4], 9, 0), [3, 6, 4], 1, "g"), 3, 1) == 6 * 8
    k, v = torch.ones(2, 5, 6, 4), torch.ones(2, 5, 6, 3)
    ring = (k, k, v, None, [6, 5, 4], None, False, "g", "auto")
    assert elements_sent(OPS.ring_attention.default, ring, 3, 0) == (6 + 4) * 10 * 7
    assert elements_sent(OPS.all_gather.default, (x, 1, [6], ""), 1, 0) == 0


def one_dies(rank):
    group = procs.connected(Plan(ulysses=2), 20).group("ulysses")
    if rank == 1:
        dist.destroy_process_group()
        return None
    try:
        OPS.all_reduce(torch.ones(2), group)
    except AgreementError as error:
        return str(error)
    return "no error"


def test_a_peer_that_dies_is_an_error_on_the_others():
    message = procs.run(one_dies, 2)[0]
    assert message.startswith("an all-reduce over ranks [0, 1] failed on rank 0") and "\n" not in message
