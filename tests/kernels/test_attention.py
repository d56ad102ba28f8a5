"""Every attention provider against the definition, over the shapes, masks and sizes that models use."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from xdit_compile.errors import ProviderUnavailable
from xdit_compile.kernels import chunked
from xdit_compile.kernels.attention import attended, attention_reference, query_of
from xdit_compile.kernels.merge_lse import merge
from xdit_compile.kernels.providers import AttentionQuery, Call, _aligned_bias
from xdit_compile.kernels.registry import BEST_FIRST, PROVIDERS, choose
from xdit_compile.plan.plan import ATTENTIONS

OPS = torch.ops.xdit_compile
ON_CPU = ("auto", "sdpa", "sdpa_math", "sdpa_flash", "chunked")
WITH_LSE = ("auto", "sdpa_math", "sdpa_flash", "chunked")
MASK_SHAPES = ((7, 11), (1, 11), (11,), (2, 1, 1, 11), (1, 5, 7, 11), (2, 5, 7, 11), (2, 1, 7, 1), (1, 1, 1, 1))


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """So that these few tokens are several chunks, which divide neither queries nor keys."""
    monkeypatch.setattr(chunked, "QUERIES", 3)
    monkeypatch.setattr(chunked, "KEYS", 4)


def qkv(q_shape=(2, 5, 7, 12), k_shape=(2, 5, 11, 12), v_dim=None, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    v_shape = (*k_shape[:-1], v_dim or k_shape[-1])
    return tuple(torch.randn(shape, generator=generator).to(dtype) for shape in (q_shape, k_shape, v_shape))


def masks(shape, kind, seed=3):
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(shape, generator=generator)
    if kind == "bool":
        return noise > -0.7
    return noise.masked_fill(noise < -0.7, -math.inf) if kind == "inf" else noise


def close(actual, expected, tolerance=2e-6):
    assert actual.shape == expected.shape
    torch.testing.assert_close(actual, expected.to(actual.dtype), atol=tolerance, rtol=tolerance)


def agree(provider, q, k, v, mask=None, is_causal=False, scale=None, gqa=False, tolerance=2e-6):
    """Output and log-sum-exp equal the definition's, and the output F.scaled_dot_product_attention's."""
    out, lse = attention_reference(q, k, v, mask, is_causal, scale, gqa)
    close(OPS.attention(q, k, v, mask, is_causal, scale, gqa, provider), out, tolerance)
    if mask is None or (mask.dim() > 1 and not is_causal):
        whole = F.scaled_dot_product_attention(q, k, v, mask, is_causal=is_causal, scale=scale, enable_gqa=gqa)
        close(OPS.attention(q, k, v, mask, is_causal, scale, gqa, provider), whole, tolerance)
    if provider in WITH_LSE:
        out_, lse_ = OPS.attention_lse(q, k, v, mask, is_causal, scale, gqa, provider)
        assert lse_.dtype == torch.float32 and out_.dtype == q.dtype
        close(out_, out, tolerance)
        close(lse_, lse, max(tolerance, 1e-5))


@pytest.mark.parametrize("provider", ON_CPU)
@pytest.mark.parametrize(
    ("q_shape", "k_shape", "v_dim"),
    [
        ((2, 5, 7, 12), (2, 5, 11, 12), None),
        ((1, 1, 1, 1), (1, 1, 1, 1), None),
        ((5, 7, 12), (5, 11, 12), None),
        ((7, 12), (11, 12), None),
        ((2, 3, 5, 7, 12), (2, 3, 5, 11, 12), None),
        ((2, 5, 7, 12), (2, 5, 11, 12), 9),
        ((2, 5, 7, 12), (2, 5, 11, 12), 20),
        ((2, 5, 7, 12), (1, 5, 11, 12), None),
        ((2, 5, 7, 12), (2, 1, 11, 12), None),
        ((1, 3, 65, 72), (1, 3, 129, 72), None),
    ],
)
def test_shapes(provider, q_shape, k_shape, v_dim):
    q, k, v = qkv(q_shape, k_shape, v_dim)
    agree(provider, q, k, v)
    agree(provider, q, k, v, scale=0.3)
    agree(provider, q, k, v, is_causal=True)


@pytest.mark.parametrize("provider", ON_CPU)
@pytest.mark.parametrize("kind", ["bool", "additive", "inf"])
@pytest.mark.parametrize("shape", MASK_SHAPES)
def test_masks_of_every_broadcast_shape(provider, kind, shape):
    agree(provider, *qkv(), masks(shape, kind))


@pytest.mark.parametrize("provider", ON_CPU)
@pytest.mark.parametrize("kind", ["bool", "additive"])
def test_mask_over_several_leading_dims(provider, kind):
    q, k, v = qkv((2, 3, 5, 7, 12), (2, 3, 5, 11, 12))
    agree(provider, q, k, v, masks((2, 1, 1, 1, 11), kind))
    agree(provider, q, k, v, masks((3, 5, 7, 11), kind))


def test_a_row_of_one_large_negative_number_counts_every_key_once():
    """In chunks of other lengths, too: a log-sum-exp of each would not tell four of these keys from three."""
    mask = torch.zeros(2, 1, 7, 11)
    mask[0, 0, 3] = mask[1] = torch.finfo(torch.float32).min
    q, k, v = qkv()
    close(OPS.attention(q, k, v, mask, provider="chunked")[1], v[1].mean(-2, keepdim=True).expand(5, 7, 12))


class Largest(TorchDispatchMode):
    """The most elements of any tensor that an operator makes."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        sizes = [x.numel() for x in pytree.tree_leaves(found) if isinstance(x, torch.Tensor)]
        self.elements = max(self.elements, *sizes, 0)
        return found


@pytest.mark.parametrize(("mask", "is_causal"), [(None, False), (None, True), ((1500,), False), ((700, 1), False)])
@pytest.mark.parametrize("provider", ["sdpa_math", "chunked"])
def test_chunks_make_no_tensor_of_all_scores(provider, mask, is_causal, monkeypatch):
    monkeypatch.undo()
    q, k, v = qkv((1, 2, 700, 8), (1, 2, 1500, 8))
    bias = None if mask is None else masks(mask, "additive")
    with Largest() as largest:
        attended(q, k, v, bias, is_causal, None, False, provider, lse=True)
    assert (largest.elements >= 2 * 700 * 1500) == (provider == "sdpa_math")
    assert provider == "sdpa_math" or largest.elements <= 2 * chunked.QUERIES * chunked.KEYS


def scattered(x):
    """The same tensor, its last dim outermost in memory."""
    return x.movedim(-1, 0).contiguous().movedim(0, -1)


@pytest.mark.parametrize("provider", ON_CPU)
def test_memory_in_another_order(provider):
    q, k, v = map(scattered, qkv())
    agree(provider, q, k, v)
    agree(provider, q, k, v, scattered(masks((2, 5, 7, 11), "additive")))
    agree(provider, *map(scattered, qkv((2, 1, 7, 12), (2, 1, 11, 12), 12)), scattered(masks((2, 1, 7, 11), "bool")))
    agree(provider, q, k[:, :, :, :1].expand_as(k), v)


@pytest.mark.parametrize("provider", ON_CPU)
def test_mask_and_causal_together(provider):
    agree(provider, *qkv(), masks((2, 1, 1, 11), "bool"), is_causal=True)
    agree(provider, *qkv(), masks((2, 1, 1, 11), "additive"), is_causal=True)


@pytest.mark.parametrize("provider", ON_CPU)
@pytest.mark.parametrize("mask", [None, "bool", "additive"])
@pytest.mark.parametrize("heads", [1, 2, 3])
def test_grouped_queries(provider, mask, heads):
    q, k, v = qkv((2, 6, 7, 12), (2, heads, 11, 12))
    agree(provider, q, k, v, None if mask is None else masks((2, 6, 7, 11), mask), gqa=True)


def blind_mask(kind):
    """Row 3 of the first entry and all of the second see no key."""
    mask = masks((2, 1, 7, 11), "bool")
    mask[0, 0, 3], mask[1] = False, False
    return mask if kind == "bool" else torch.zeros(mask.shape).masked_fill(~mask, -math.inf)


@pytest.mark.parametrize("provider", ON_CPU)
@pytest.mark.parametrize("kind", ["bool", "additive"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_that_see_no_key_are_zero_in_every_kernel(provider, kind, dtype):
    mask = blind_mask(kind) if kind == "bool" else blind_mask(kind).to(dtype)
    out = OPS.attention(*qkv(dtype=dtype), mask, provider=provider)
    assert (out[0, :, 3] == 0).all() and (out[1] == 0).all() and out.isfinite().all()
    agree(provider, *qkv(dtype=dtype), mask, tolerance=2e-6 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("kind", ["bool", "additive"])
@pytest.mark.parametrize("name", ["sdpa_efficient", "sdpa_cudnn"])
def test_what_a_fused_kernel_says_of_rows_that_see_no_key_does_not_count(name, kind, monkeypatch):
    mask = blind_mask(kind)

    def fused(call):
        out, lse = attention_reference(call.q, call.k, call.v, call.mask, scale=call.scale)
        return torch.where(lse.unsqueeze(-1) == -math.inf, math.nan, out), lse.nan_to_num(neginf=0.0) * call.lse

    monkeypatch.setitem(PROVIDERS, name, dataclasses.replace(PROVIDERS[name], run=fused, refusals=()))
    out, lse = attention_reference(*qkv(), mask)
    close(OPS.attention(*qkv(), mask, provider=name), out)
    for found, expected in zip(OPS.attention_lse(*qkv(), mask, provider=name), (out, lse), strict=True):
        close(found, expected, 1e-5)


@pytest.mark.parametrize("provider", WITH_LSE)
@pytest.mark.parametrize("kind", ["bool", "additive"])
def test_rows_that_see_no_key(provider, kind):
    mask = blind_mask(kind)
    agree(provider, *qkv(), mask)
    out, lse = OPS.attention_lse(*qkv(), mask, provider=provider)
    assert (lse[0, :, 3] == -math.inf).all() and (lse[1] == -math.inf).all() and lse[0, :, 2].isfinite().all()
    assert (out[1] == 0).all()


@pytest.mark.parametrize("provider", ON_CPU)
@pytest.mark.parametrize(
    ("q_shape", "k_shape"),
    [
        ((2, 5, 0, 12), (2, 5, 11, 12)),
        ((2, 5, 7, 12), (2, 5, 0, 12)),
        ((2, 0, 7, 12), (2, 0, 11, 12)),
        ((0, 5, 7, 12), (0, 5, 11, 12)),
        ((5, 7, 12), (5, 0, 12)),
    ],
)
def test_empty_tensors(provider, q_shape, k_shape):
    agree(provider, *qkv(q_shape, k_shape))


@pytest.mark.parametrize("provider", ON_CPU)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float16, 3e-3), (torch.float64, 2e-6)])
def test_dtypes(provider, dtype, tolerance):
    q, k, v = qkv(dtype=dtype)
    agree(provider, q, k, v, tolerance=tolerance)
    agree(provider, q, k, v, masks((2, 1, 1, 11), "bool"), tolerance=tolerance)
    agree(provider, q, k, v, masks((2, 1, 7, 11), "additive").to(dtype), tolerance=tolerance)


@pytest.mark.parametrize("provider", ON_CPU)
@pytest.mark.parametrize("q_shape", [(2, 5, 7, 12), (5, 7, 12), (2, 3, 5, 7, 12), (7, 12), (2, 5, 0, 12)])
def test_the_fake_has_the_layout_of_the_real_one(provider, q_shape):
    q, k, v = qkv(q_shape, (*q_shape[:-2], 11, 12), 9)
    fakes = [torch.empty_like(x, device="meta") for x in (q, k, v)]
    pairs = [(OPS.attention(*fakes), OPS.attention(q, k, v, provider=provider))]
    if provider in WITH_LSE:
        pairs += zip(OPS.attention_lse(*fakes), OPS.attention_lse(q, k, v, provider=provider), strict=True)
    for fake, real in pairs:
        assert (fake.shape, fake.stride(), fake.dtype) == (real.shape, real.stride(), real.dtype)


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_compiles_whole(backend):
    def block(q, k, v, mask):
        out, lse = OPS.attention_lse(q.transpose(1, 2), k, v, mask, False, None, False, "auto")
        return OPS.attention(out * 2, k, v).transpose(1, 2).flatten(2) + 1, lse.exp()

    q, k, v = qkv((2, 7, 5, 12), (2, 5, 11, 12))
    mask = masks((2, 1, 1, 11), "bool")
    compiled = torch.compile(block, fullgraph=True, backend=backend)
    for actual, expected in zip(compiled(q, k, v, mask), block(q, k, v, mask), strict=True):
        close(actual, expected)


def test_opcheck():
    q, k, v = qkv()
    for op in (OPS.attention.default, OPS.attention_lse.default):
        torch.library.opcheck(op, (q, k, v, masks((2, 1, 1, 11), "bool"), False, None, False, "auto"))


@pytest.mark.parametrize(
    ("shapes", "mask", "gqa", "words"),
    [
        (((2, 5, 7, 12), (2, 5, 11, 8)), None, False, "does not fit"),
        (((2, 5, 7, 12), (2, 5, 11, 12)), (2, 1, 1, 10), False, "does not broadcast"),
        (((2, 5, 7, 12), (2, 5, 11, 12)), (3, 2, 1, 1, 11), False, "does not broadcast"),
        (((2, 5, 7, 12), (2, 2, 11, 12)), None, True, "5 query heads cannot share 2"),
    ],
)
def test_what_does_not_fit_is_refused(shapes, mask, gqa, words):
    q, k, v = qkv(*shapes)
    mask = None if mask is None else torch.ones(mask, dtype=torch.bool)
    with pytest.raises((ValueError, RuntimeError), match=words):
        OPS.attention(q, k, v, mask, False, None, gqa, "auto")


def test_a_plan_names_exactly_the_providers():
    assert set(ATTENTIONS) == {"auto", *PROVIDERS}
    assert set(BEST_FIRST) == {name for name, provider in PROVIDERS.items() if not provider.inexact}


CPU = AttentionQuery("cpu", torch.float32, 5, 5, 7, 11, 12, 12)
CUDA = AttentionQuery("cuda", torch.bfloat16, 8, 8, 64, 64, 64, 64)


def changed(query, **values):
    return dataclasses.replace(query, **values)


@pytest.mark.parametrize(
    ("name", "query", "words"),
    [
        ("nonsense", CPU, "unknown.*sdpa_flash"),
        ("sdpa", changed(CPU, lse=True), "log-sum-exp.*sdpa_flash"),
        ("sdpa_efficient", CPU, "runs on cuda, not on cpu"),
        ("sdpa_cudnn", CPU, "runs on cuda, not on cpu"),
        ("sdpa_flash", changed(CUDA, mask="bool"), "no mask"),
        ("sdpa_flash", changed(CUDA, dtype=torch.float32), "float16, bfloat16.*not float32"),
        ("sdpa_flash", changed(CUDA, head_dim=512, v_head_dim=512), "up to 256"),
        ("sdpa_flash", changed(CUDA, is_causal=True, q_tokens=3), "causal"),
        ("sdpa_efficient", changed(CUDA, head_dim=12), "multiples of 8"),
        ("sdpa", changed(CPU, dtype=torch.int64), "floating point.*int64"),
    ],
)
def test_a_provider_that_cannot_says_why(name, query, words):
    with pytest.raises(ProviderUnavailable, match=words):
        choose(name, query)


@pytest.mark.parametrize(("name", "command"), [("flash_attn", "pip install flash-attn"), ("yunchang", "pip install")])
def test_an_uninstalled_provider_says_how_to_get_it(name, command):
    reason = PROVIDERS[name].unsupported(CUDA)
    if reason is None:
        pytest.skip(f"{name} is installed")
    assert command in reason


@pytest.mark.parametrize(
    ("query", "name"),
    [
        (CPU, "sdpa"),
        (changed(CPU, lse=True), "sdpa_flash"),
        (changed(CPU, lse=True, mask="bool"), "sdpa_flash"),
        (changed(CUDA, lse=True, mask="bool"), "sdpa_efficient"),
        (changed(CUDA, lse=True, dtype=torch.float32, head_dim=12, v_head_dim=12), "sdpa_math"),
    ],
)
def test_auto_takes_the_best_that_can(query, name):
    assert choose("auto", query).name == name


@pytest.mark.parametrize(
    ("dtype", "mask", "v_dim", "repeated"),
    [
        (torch.bfloat16, None, 64, False),
        (torch.bfloat16, (1, 1, 1, 11), 64, True),
        (torch.float32, None, 64, True),
        (torch.bfloat16, None, 32, True),
    ],
)
def test_shared_key_heads_reach_a_fused_kernel(dtype, mask, v_dim, repeated, monkeypatch):
    """On CUDA flash attention alone shares them; PyTorch takes plain matrix products else."""
    asked = []
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, k, v, **rest: asked.append((k, v, rest)) or q)
    with FakeTensorMode():
        q, k, v = (torch.empty(1, h, 11, d, dtype=dtype, device="cuda") for h, d in ((8, 64), (2, 64), (2, v_dim)))
        bias = None if mask is None else torch.empty(mask, dtype=dtype, device="cuda")
        PROVIDERS["sdpa"].run(Call(q, k, v, bias, False, 1.0, False))
        PROVIDERS["sdpa"].run(Call(*(x.to("cpu") for x in (q, k, v)), None, False, 1.0, False))
    (k, v, rest), on_cpu = asked
    assert k.shape[1] == v.shape[1] == (8 if repeated else 2) and rest["enable_gqa"] == (not repeated)
    assert on_cpu[0].shape[1] == 2 and on_cpu[2]["enable_gqa"]


@pytest.mark.parametrize("kind", [None, "bool"])
def test_on_the_cpu_shared_key_heads_are_fused(kind):
    q, k, v = qkv((1, 8, 64, 64), (1, 2, 64, 64))
    mask = None if kind is None else masks((1, 1, 64, 64), kind)
    chosen = torch._fused_sdp_choice(q, k, v, mask, enable_gqa=True)
    assert chosen == torch.nn.attention.SDPBackend.FLASH_ATTENTION.value


def test_query_of_reads_the_call():
    q, k, v = qkv((2, 6, 7, 12), (2, 3, 11, 12), 9)
    assert query_of(q, k, v, masks((11,), "bool"), lse=True) == AttentionQuery(
        "cpu", torch.float32, 6, 3, 7, 11, 12, 9, "bool", False, True
    )


@pytest.mark.parametrize("cuts", [(11,), (4, 11), (0, 3, 3, 11), (5, 6, 11)])
@pytest.mark.parametrize("kind", [None, "bool", "blind"])
def test_merging_parts_of_the_keys_gives_the_whole(cuts, kind):
    q, k, v = qkv()
    mask = None if kind is None else masks((2, 1, 7, 11), "bool")
    if kind == "blind":
        mask[0, 0, 2], mask[1, 0, 3, :6], mask[1, 0, 4, 5:] = False, False, False
    starts = (0, *cuts[:-1])
    parts = [
        OPS.attention_lse(q, k[:, :, a:b], v[:, :, a:b], None if mask is None else mask[..., a:b])
        for a, b in zip(starts, cuts, strict=True)
    ]
    for actual, expected in zip(merge(parts), attention_reference(q, k, v, mask), strict=True):
        close(actual, expected)


def test_merging_far_apart_log_sum_exps_is_safe():
    one, two = torch.full((1, 4), 1.0), torch.full((1, 4), 2.0)
    out, lse = merge([(one, torch.tensor([1e4])), (two, torch.tensor([-1e4]))])
    assert torch.equal(out, one) and lse.item() == 1e4
    with pytest.raises(ValueError, match="at least one"):
        merge([])


@pytest.mark.parametrize(("columns", "at"), [(577, (0, 192)), (577, (192, 577)), (592, (8, 584)), (1, (0, 1))])
def test_masks_lie_as_cuda_kernels_want_them(columns, at):
    """Whatever part of a mask a rank has: fused kernels refuse other strides and places."""
    q, k, v = qkv((2, 3, 5, 8), (2, 3, max(at[1] - at[0], 7), 8))
    bias = torch.randn(2, 1, 5, columns)[..., slice(*at)]
    found = _aligned_bias(Call(q, k, v, bias, False, 1.0, False))
    assert torch.equal(found, bias.expand(2, 3, 5, k.shape[2])) and found.stride(-1) == 1
    assert all(place % 16 == 0 for place in (*found.stride()[:-1], found.storage_offset()))
