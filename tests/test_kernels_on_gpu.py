"""What only a GPU shows of the operators and of process groups, without pipelines; skipped elsewhere."""

from __future__ import annotations

import datetime
import functools
import itertools
import math
import threading
import time
from collections.abc import Iterator
from typing import Any

import procs
import pytest
import torch
import torch.distributed as dist
from torch.nn import functional as F
from torch.utils import _pytree as pytree

import xdit_compile
import xdit_compile.kernels.attention
import xdit_compile.kernels.linears
import xdit_compile.kernels.stale_rows  # noqa: F401 - registers its op
from xdit_compile.cache.environment import environment
from xdit_compile.distributed.devices import backend_for
from xdit_compile.distributed.mesh import Mesh, connect
from xdit_compile.distributed.seats import Seat, card_of
from xdit_compile.distributed.watchdog import lenient
from xdit_compile.errors import AgreementError
from xdit_compile.kernels.collectives.process_groups import Groups, carrier, complete
from xdit_compile.kernels.merge_lse import merge
from xdit_compile.kernels.norm_rope import norm_rope_reference
from xdit_compile.kernels.providers import AttentionQuery
from xdit_compile.kernels.reference import attention_reference
from xdit_compile.kernels.registry import PROVIDERS
from xdit_compile.runtime.verify.inexact import Moved

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that torch.cuda sees"),
]
EXACT = 2e-5
OPS = torch.ops.xdit_compile


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max()).item()


def near(found: torch.Tensor, expected: torch.Tensor, bound: float, provider: str) -> bool:
    """Within a bound of the greatest value; where a provider is not exact, within what verification lets pass."""
    if PROVIDERS[provider].inexact:
        return Moved.of(found, expected).allowed
    return difference(found.double(), expected) < bound


def masked(kind: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor | None:
    seen = torch.rand(shape, device="cuda") < 0.7
    seen[..., 0] = True
    if kind == "none":
        return None
    return seen if kind == "bool" else torch.where(seen, 0.0, -1e4).to(dtype)


@pytest.mark.parametrize("kind", ["none", "bool", "additive"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("provider", sorted(PROVIDERS))
def test_attention_of_every_provider(provider: str, dtype: torch.dtype, kind: str) -> None:
    """Also in two parts that are merged; keys in numbers that no kernel has as its step."""
    torch.manual_seed(0)
    reason = None
    for heads, kv, tokens, keys, width in ((4, 4, 96, 77, 64), (6, 2, 33, 577, 64), (2, 2, 130, 592, 40)):
        q = torch.randn(2, tokens, heads, width, device="cuda", dtype=dtype).transpose(1, 2)
        k, v = (torch.randn(2, kv, keys, width, device="cuda", dtype=dtype) for _ in range(2))
        mask = masked(kind, (2, 1, tokens, keys), dtype)
        query = AttentionQuery("cuda", dtype, heads, kv, tokens, keys, width, width, kind, lse=True)  # type: ignore[arg-type]
        wide = [x.double() for x in (q, k, v)]
        bias = mask if mask is None or mask.dtype == torch.bool else mask.double()
        expected = attention_reference(*wide, bias, False, 1 / math.sqrt(width), heads != kv)[0]
        bound = EXACT if dtype == torch.float32 else 2e-2
        reason = PROVIDERS[provider].unsupported(query)
        if PROVIDERS[provider].unsupported(AttentionQuery(**{**vars(query), "lse": False})) is None:
            found = OPS.attention(q, k, v, mask, False, None, heads != kv, provider)
            assert near(found, expected, bound, provider)
        if reason is None:
            cut = keys // 3
            columns = (slice(0, cut), slice(cut, keys))
            parts = [
                OPS.attention_lse(
                    q, k[:, :, at], v[:, :, at], None if mask is None else mask[..., at], False, None, heads != kv,
                    provider,
                )
                for at in columns
            ]  # fmt: skip
            assert near(merge(parts)[0], expected, bound, provider)
    if reason is not None:
        pytest.skip(reason)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("provider", ["flash_attn", "flash_attn_3", "flash_attn_4", "sage", "yunchang"])
def test_attention_of_other_packages(provider: str, dtype: torch.dtype, causal: bool) -> None:
    """A log-sum-exp to the natural base, of keys whose mean is not 0; a scale of our own; shared key heads."""
    torch.manual_seed(0)
    query = AttentionQuery("cuda", dtype, 6, 2, 200, 200, 64, 64, is_causal=causal, lse=True)
    if reason := PROVIDERS[provider].unsupported(query):
        pytest.skip(reason)
    q, k, v = (torch.randn(2, 200, heads, 64, device="cuda", dtype=dtype).transpose(1, 2) for heads in (6, 2, 2))
    k = k + 0.5
    expected = attention_reference(q.double(), k.double(), v.double(), None, causal, 0.2, True)
    out, lse = OPS.attention_lse(q, k, v, None, causal, 0.2, True, provider)
    assert near(out, expected[0], 2e-2, provider)
    assert difference(lse.double(), expected[1]) < (5e-2 if PROVIDERS[provider].inexact else 1e-3)
    torch.testing.assert_close(OPS.attention(q, k, v, None, causal, 0.2, True, provider), out)


def given_up(rank: int) -> list[Any]:
    """Communicators that another thread aborts while this one waits for the card, and new ones after that."""
    dist.destroy_process_group()
    with lenient():
        dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    groups, found = Groups(lambda: {"all": dist.new_group([0])}), []
    for broken in (True, False):
        groups.open()
        group, total = groups.find("all"), torch.ones(1, device="cuda")
        assert group is not None
        dist.all_reduce(total, group=group)
        torch.cuda.synchronize()
        torch.cuda._sleep(10**9)
        with groups.running():
            start = functools.partial(dist.all_reduce, total, group=group, async_op=True)
            complete(group, "a sum", start, total.device)
        if broken:
            threading.Timer(0.1, groups.give_up, [AgreementError("rank 1 failed")]).start()
        found += [groups.come_at_once, groups.failure()]
        torch.cuda.synchronize()
        time.sleep(3)  # NCCL's watchdog looks once a second
        try:
            groups.refuse()
            found.append(total.item())
        except AgreementError as error:
            found.append(str(error))
        groups.close(broken)
    return found


def test_an_abort_of_nccl_spares_the_process_and_new_groups_work() -> None:
    found = procs.run(given_up, 1, method="spawn")
    assert found == [[True, None, "rank 1 failed", True, None, 1.0]]


def on_both(rank: int) -> list[float]:
    """NCCL refuses two ranks on one card, so there is one; it sends from the CPU by gloo, from the card by NCCL."""
    dist.destroy_process_group()
    device = xdit_compile.local_device()
    dist.init_process_group(backend_for(device), store=dist.HashStore(), rank=0, world_size=1)
    group = connect(Mesh(("ring",), (1,), 0, {("ring",): "role"}), datetime.timedelta(seconds=60))["role"]
    sums = [torch.ones(1, device=where) for where in ("cpu", device)]
    for value in sums:
        assert carrier(value.device, group) == value.device
        dist.all_reduce(value, group=group)
    assert Seat.of(device, "").backend == "nccl" and len(card_of(device).split()) > 1
    return [value.item() for value in sums]


def test_a_group_that_carries_from_the_cpu_and_from_the_card() -> None:
    assert procs.run(on_both, 1, method="spawn") == [[1.0, 1.0]]


def behind(rank: int, nccl: bool, aside: bool) -> list[bool]:
    """Exchanges begun while the queue is full, whose operands are overwritten at once and whose results come a step
    later; on a stream of the user's where ``aside``."""
    if nccl:
        dist.destroy_process_group()
        dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    ranks = dist.get_world_size()
    groups = Groups(lambda: {"all": dist.new_group(list(range(ranks)))})
    groups.open()
    with groups.running(), torch.cuda.stream(torch.cuda.Stream() if aside else torch.cuda.current_stream()):
        found = list(exchanged(rank, [300, 170][:ranks]))
    groups.close(broken=False)
    return found


def exchanged(rank: int, sizes: list[int]) -> Iterator[bool]:
    """Whether what comes is right, of each step but the last."""
    ends = [0, *itertools.accumulate(sizes)]
    runs = [end for pair in itertools.pairwise(ends) for end in pair]
    before: tuple[torch.Tensor, torch.Tensor] | None = None
    for step in range(6):
        whole = torch.cat([torch.full((2, size, 64), 10.0 * step + at) for at, size in enumerate(sizes)], 1).cuda()
        x = whole.split(sizes, 1)[rank].clone()
        torch.cuda._sleep(10**8)
        arriving = OPS.gather_start(x, 1, sizes, "all")
        x.fill_(-1)
        torch.empty_like(arriving).fill_(-2)
        if before is not None:
            state = torch.zeros_like(before[0])
            OPS.stale_finish(state, before[1], 1, sizes, runs, max(sizes), "all")
            torch.empty_like(arriving).fill_(-3)
            yield torch.equal(state, before[0])
        before = whole, arriving


@pytest.mark.parametrize("aside", [False, True])
@pytest.mark.parametrize("nccl", [False, True])
def test_exchanges_that_nobody_waits_for(nccl: bool, aside: bool) -> None:
    ranks = 1 if nccl else 2
    assert procs.run(behind, ranks, nccl, aside, timeout=240, method="spawn") == [[True] * 5] * ranks


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "inductor"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_operators_of_fusion_passes(dtype: torch.dtype, compiled: bool) -> None:
    """As near to float64 as the operators that they stand for, but for one more rounding of sums."""
    torch.manual_seed(0)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device="cuda", dtype=dtype)

    products = [drawn(2, tokens, 3 * 5 * 72) for tokens in (33, 130)]
    parts = [each[..., at : at + 5 * 72].unflatten(-1, (5, 72)) for at in (0, 5 * 72) for each in products]
    angles = torch.rand(1, 130, 72, device="cuda")
    heads = (parts, [drawn(72) for _ in parts], [], angles.cos(), angles.sin(), [0, 1], "rms", 1e-6, 2)
    x, weight, bias = drawn(2, 33, 64), drawn(96, 64) / 8, drawn(96)
    pieces, wide, small = [drawn(2, 33, 24), drawn(2, 33, 72)], drawn(64, 96) / 10, drawn(64) / 10
    cases: list[tuple[Any, Any, tuple[Any, ...]]] = [
        (OPS.norm_rope, norm_rope_reference, (*heads, False, [], 0)),
        (OPS.norm_rope, norm_rope_reference, (*heads, True, [drawn(2, tokens, 5, 72) for tokens in (33, 130)], 5)),
        (OPS.linear_gelu, lambda *given: [F.gelu(F.linear(*given), approximate="tanh")], (x, weight, bias)),
        (
            OPS.linear_of_parts,
            lambda some, *given: [F.linear(torch.cat(some, -1), *given)],
            (pieces, wide, small),
        ),
    ]
    for op, plain, given in cases:
        wide_given = pytree.tree_map_only(torch.Tensor, lambda tensor: tensor.double(), given)
        run = torch.compile(lambda *args, op=op: op(*args), dynamic=False) if compiled else op
        found, own, expected = (pytree.tree_leaves(each) for each in (run(*given), plain(*given), plain(*wide_given)))
        for one, other, like in zip(found, own, expected, strict=True):
            errors = [(each.double() - like).square().mean().sqrt().item() for each in (one, other)]
            slack = 1.6 if op is OPS.linear_of_parts else 1.05  # sums are rounded for each part, cut products once more
            assert errors[0] <= (slack * errors[1] if dtype == torch.bfloat16 else 1e-5 * like.abs().max().item())


def compiled_before(rank: int) -> dict[str, Any]:
    """What counts for the cache and another compilation of this process, with none of it kept, has changed."""
    device = xdit_compile.local_device()
    with torch._inductor.utils.fresh_cache():
        before = environment(device)
        weight = torch.randn(64, 64, device=device)
        torch.compile(lambda x: F.gelu(F.layer_norm(x @ weight, (64,))).softmax(-1))(weight)
        after = environment(device)
    return {name: (before[name], after[name]) for name in after if before[name] != after[name]}


def test_a_compilation_of_others_changes_no_key() -> None:
    assert procs.run(compiled_before, 1, timeout=240, method="spawn") == [{}]
