"""Ring attention on real processes against attention over the concatenated keys."""

from __future__ import annotations

import math
import time

import procs
import pytest
import torch
import torch.nn.functional as F

from xdit_compile.backends.inductor_order import pin_order
from xdit_compile.errors import AgreementError, ProviderUnavailable
from xdit_compile.kernels.attention import attention_reference
from xdit_compile.kernels.collectives.registration import simulate
from xdit_compile.kernels.ring import absorbed
from xdit_compile.plan import Plan

RING = torch.ops.xdit_compile.ring_attention.default
LEAST = torch.finfo(torch.float32).min


def case(name, lengths, queries=None, mask=None, heads=5, kv_heads=None, batch=(2,), v_dim=9, **other):
    return dict(
        name=name,
        lengths=lengths,
        queries=queries or lengths,
        mask=mask,
        heads=heads,
        kv_heads=heads if kv_heads is None else kv_heads,
        batch=batch,
        v_dim=v_dim,
        **{"scale": None, "dtype": torch.float32, "provider": "auto"} | other,
    )


def mask_of(kind, shape):
    """Masks over all queries and keys; ``shape`` says which dims are 1."""
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(7))
    seen = noise > -0.5
    if kind == "blind row":
        seen[..., 1, :] = False
    if kind == "blind part":
        seen[..., : shape[-1] // 2] = False
    if kind == "additive":
        return noise
    if kind in ("least", "ten thousand"):
        least = LEAST if kind == "least" else -10000.0
        mask = torch.zeros(shape).masked_fill(~seen, least)
        mask[..., 1, :] = least
        return mask
    return seen


def cases(ranks):
    lengths, total = [5, 3, 4][:ranks], sum([5, 3, 4][:ranks])
    yield case("plain", lengths)
    yield case("even", [4] * ranks)
    yield case("cross attention, other lengths", lengths, [2, 7, 1][:ranks])
    yield case("scale", lengths, scale=0.7)
    yield case("three dims", lengths, batch=())
    yield case("five dims", lengths, batch=(2, 3))
    yield case("grouped queries", lengths, heads=6, kv_heads=2, mask=("bool", (2, 6, total, total)))
    yield case("a rank without keys", [5, 0, 4][:ranks])
    yield case("a rank without queries", lengths, [6, 0, 2][:ranks])
    yield case("a rank with nothing, masked", [5, 0, 4][:ranks], mask=("bool", (2, 1, *[9 if ranks == 3 else 5] * 2)))
    yield case("no keys at all", [0] * ranks, [3] * ranks)
    yield case("no heads", lengths, heads=0)
    yield case("keys of length 1", [1] * ranks, mask=("bool", (1, 1, ranks, ranks)))
    for shape in ((2, 1, 1, total), (1, 5, total, total), (total, total), (1, total), (2, 1, total, 1), (1, 1, 1, 1)):
        for kind in ("bool", "additive"):
            yield case(f"{kind} mask {shape}", lengths, mask=(kind, shape))
    yield case("mask over five dims", lengths, batch=(2, 3), mask=("bool", (3, 1, 1, total)))
    for kind in ("blind row", "blind part", "least", "ten thousand"):
        yield case(kind, lengths, mask=(kind, (2, 1, total, total)))
    yield case("least for every key", lengths, mask=("least", (2, 1, 2, total)), queries=[2] * ranks)
    yield case("provider math", lengths, provider="sdpa_math", mask=("blind part", (2, 1, 1, total)))
    yield case("provider flash", lengths, provider="sdpa_flash", mask=("blind part", (2, 1, 1, total)))
    yield case("bfloat16", lengths, dtype=torch.bfloat16)
    yield case("float64", lengths, dtype=torch.float64)


def whole(spec):
    generator = torch.Generator().manual_seed(1)
    batch, keys, d = spec["batch"], sum(spec["lengths"]), 12
    q = torch.randn(*batch, spec["heads"], sum(spec["queries"]), d, generator=generator)
    k = torch.randn(*batch, spec["kv_heads"], keys, d, generator=generator)
    v = torch.randn(*batch, spec["kv_heads"], keys, spec["v_dim"], generator=generator)
    mask = None if spec["mask"] is None else mask_of(*spec["mask"])
    return *(x.to(spec["dtype"]) for x in (q, k, v)), mask


def expected_whole(spec):
    """By the definition; in fp64 where fp32 itself loses digits, since a mask of -10000 rounds the scores."""
    q, k, v, mask = whole(spec)
    if spec["name"] == "ten thousand":
        q, k, v, mask = (x.double() for x in (q, k, v, mask))
    gqa = spec["heads"] != spec["kv_heads"]
    rows = mask if mask is None or mask.shape[-2] in (1, q.shape[-2]) else mask.repeat(1, 1, len(spec["lengths"]), 1)
    return attention_reference(q, k, v, rows, False, spec["scale"], gqa)[0]


def local(spec, rank, group):
    """The arguments of one rank."""
    q, k, v, mask = whole(spec)
    rows = slice(sum(spec["queries"][:rank]), sum(spec["queries"][: rank + 1]))
    columns = slice(sum(spec["lengths"][:rank]), sum(spec["lengths"][: rank + 1]))
    if mask is not None and mask.shape[-2] == q.shape[-2] != 1:
        mask = mask[..., rows, :]
    gqa = spec["heads"] != spec["kv_heads"]
    k, v = k[..., columns, :].contiguous(), v[..., columns, :].contiguous()
    return q[..., rows, :], k, v, mask, list(spec["lengths"]), spec["scale"], gqa, group, spec["provider"]


def strides(x):
    """Those that say anything: of dims above 1, in a tensor that holds something."""
    return [stride for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1 and x.numel()]


def tolerance(spec):
    return {torch.bfloat16: 2e-2}.get(spec["dtype"], 2e-6)


def run_all(rank, ranks):
    group = procs.connected(Plan(ring=ranks), 60).group("ring")
    wrong = []
    for spec in cases(ranks):
        args = local(spec, rank, group)
        actual = RING(*args)
        simulated = simulate(RING, [local(spec, other, group) for other in range(ranks)])[rank]
        rows = slice(sum(spec["queries"][:rank]), sum(spec["queries"][: rank + 1]))
        expected = expected_whole(spec)[..., rows, :]
        for got, what in ((actual, "real"), (simulated, "simulated")):
            if spec["name"] == "ten thousand" and what == "simulated":
                continue
            limit = tolerance(spec) * max(1.0, expected.abs().max().item() if expected.numel() else 1.0)
            off = (got.double() - expected.double()).abs().max().item() if expected.numel() else 0.0
            if got.shape != expected.shape or got.dtype != spec["dtype"] or not off <= limit:
                wrong.append((spec["name"], what, off, tuple(got.shape)))
            fake = RING(*[x.to("meta") if isinstance(x, torch.Tensor) else x for x in args])
            if strides(got) != strides(fake):
                wrong.append((spec["name"], what, "strides", got.stride()))
    return wrong


@pytest.mark.parametrize("ranks", [2, 3])
def test_ring_equals_attention_over_all_keys(ranks):
    for rank, wrong in enumerate(procs.run(run_all, ranks, ranks)):
        assert not wrong, f"rank {rank}"


def compiled(rank, ranks, backend):
    pin_order()
    group = procs.connected(Plan(ring=ranks), 100).group("ring")
    fine = []
    for lengths in ([5, 3, 4][:ranks], [5, 0, 4][:ranks]):
        torch._dynamo.reset()
        args = local(case("compiled", lengths, mask=("bool", (2, 1, 1, sum(lengths)))), rank, group)

        def block(q, k, v, mask, rest=args[4:]):
            return RING(q * 3, k.sin(), v, mask, *rest).transpose(1, 2).flatten(2) + 1

        run = torch.compile(block, fullgraph=True, backend=backend)
        fine.append(torch.allclose(run(*args[:4]), block(*args[:4]), atol=1e-5))
    return fine


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_compiles_whole(backend):
    assert procs.run(compiled, 2, 2, backend, timeout=200) == [[True, True]] * 2


def test_alone_it_is_plain_attention():
    spec = case("alone", [7], mask=("bool", (2, 1, 7, 7)))
    q, k, v, mask = whole(spec)
    expected = F.scaled_dot_product_attention(q, k, v, mask)
    torch.testing.assert_close(RING(*local(spec, 0, "")), expected, atol=2e-6, rtol=2e-6)


def test_opcheck():
    torch.library.opcheck(RING, local(case("alone", [7], mask=("bool", (2, 1, 7, 7))), 0, ""))


def test_rows_of_large_negative_numbers_are_shifted():
    q = torch.randn(2, 5, 4, 12)
    mask = torch.randn(2, 1, 4, 6)
    same, kept = absorbed(q, mask)
    assert torch.equal(same, q) and torch.equal(kept, mask)
    mask[0, 0, 1], mask[0, 0, 2], mask[0, 0, 3] = LEAST, -10000.0, -math.inf
    q_, mask_ = absorbed(q, mask)
    assert (q_[0, :, 1] == 0).all() and torch.equal(q_[0, :, 2:], q[0, :, 2:]) and torch.equal(q_[1], q[1])
    assert (mask_[0, 0, 1:3] == 0).all() and (mask_[0, 0, 3] == -math.inf).all() and torch.equal(mask_[1], mask[1])


@pytest.mark.parametrize(
    ("lengths", "mask", "words"),
    [([4, 4], None, "5 keys here"), ([5, 3], (2, 1, 1, 5), "does not broadcast"), ([5, 3], (2, 1, 4, 8), "broadcast")],
)
def test_lengths_that_do_not_fit_are_refused(lengths, mask, words):
    q = k = v = torch.ones(2, 5, 5, 12)
    mask = None if mask is None else torch.ones(mask, dtype=torch.bool)
    for device in ("cpu", "meta"):
        with pytest.raises(ValueError, match=words):
            args = [x if x is None else x.to(device) for x in (q, k, v, mask)]
            RING(*args, lengths, None, False, "", "auto")


def refused(rank):
    group = procs.connected(Plan(ring=2), 20).group("ring")
    try:
        RING(*local(case("no lse", [5, 3], provider="sdpa"), rank, group))
    except ProviderUnavailable as error:
        return str(error)
    return "no error"


def test_a_provider_without_log_sum_exp_is_refused():
    for message in procs.run(refused, 2):
        assert "log-sum-exp" in message


def neighbour_stops(rank):
    group = procs.connected(Plan(ring=2), 3).group("ring")
    spec = case("stops", [5, 3])
    if rank == 1:
        time.sleep(8)
        return None
    try:
        RING(*local(spec, rank, group))
    except AgreementError as error:
        return str(error)
    return "no error"


def test_a_neighbour_that_does_not_answer_is_an_error_in_time():
    message = procs.run(neighbour_stops, 2, timeout=60)[0]
    assert message.startswith("ring attention over ranks [0, 1] failed on rank 0") and "\n" not in message
