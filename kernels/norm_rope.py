"""Normalizing and rotating queries and keys of several sources, and joining them along the tokens, in one kernel.

Values may come along as they are, and all of it may go into the buffer of an all-to-all of heads.
"""

from __future__ import annotations

import math
from itertools import accumulate

import torch
from torch.library import custom_op, register_fake, register_kernel, triton_op, wrap_triton

from .reference import accumulation_dtype
from .triton_jit import TRITON, jit, tl

NORMS = ("none", "rms", "layer", "rms_all", "layer_all")
"""Over nothing, over the lanes of a head, and over those of all heads of a token."""
MOST = 2
"""Lines, and sources of each, that one kernel takes."""
_TILE = 2048
"""Values that a program holds, unless one row has more."""
_MOST_ROWS = 2**31 - _TILE
"""Rows are counted in 32 bits, elements in 64."""


def norm_rope_reference(
    parts: list[torch.Tensor], weights: list[torch.Tensor], biases: list[torch.Tensor], cos: torch.Tensor | None,
    sin: torch.Tensor | None, rotated: list[int], norm: str, eps: float, lines: int, halves: bool,
    plain: list[torch.Tensor], groups: int,
) -> list[torch.Tensor]:  # fmt: skip
    """Every line's sources normalized, some of them rotated (RoFormer, arXiv:2104.09864), and joined along the tokens.

    All is computed in float32 (float64 where the parts are), and rounded once, at the end.

    Args:
        parts: [B, T_s, H, D] each, of one dtype and any strides; the sources of the first line, then of the second.
            A source has as many tokens in every line.
        weights: none, or one for each part: [D], and [H * D] for norms of all heads; of any floating dtype.
        biases: as ``weights``; only of layer norms.
        cos, sin: [1 or B, sum of T_s of rotated sources, D], or of D / 2, one for each pair; of any floating dtype and
            strides. None where nothing is rotated.
        rotated: for each source, whether it is.
        norm: a name of ``NORMS``.
        eps: added to the mean of squares.
        lines: how many are normalized.
        halves: a pair is (i, i + D / 2), not (2i, 2i + 1).
        plain: none, or the sources of one more line, the last, that are only joined; as ``parts``.
        groups: 0, or into how many groups of consecutive heads the results go.

    Returns:
        For each line a new contiguous tensor [B, sum of T_s, H, D] of the dtype of the parts. With groups one flat
        tensor of all: [groups, sum of T_s, B, lines, H / groups, D].

    Raises:
        ValueError: when the arguments do not fit together.
    """
    _check(parts, weights, biases, cos, sin, rotated, norm, lines, plain, groups)
    sources, done = len(rotated), []
    ends = list(accumulate(part.shape[1] if turns else 0 for part, turns in zip(parts, rotated, strict=False)))
    for at, part in enumerate(parts):
        x = _normalized(part, weights[at] if weights else None, biases[at] if biases else None, norm, eps)
        if cos is not None and sin is not None and rotated[at % sources]:
            rows = slice(ends[at % sources] - part.shape[1], ends[at % sources])
            x = _turned(x, cos[:, rows], sin[:, rows], halves)
        done.append(x.to(part.dtype))
    done += plain
    joined = [torch.cat(done[at : at + sources], 1).contiguous() for at in range(0, len(done), sources)]
    return [_packed(joined, groups)] if groups else joined


def _check(
    parts: list[torch.Tensor], weights: list[torch.Tensor], biases: list[torch.Tensor], cos: torch.Tensor | None,
    sin: torch.Tensor | None, rotated: list[int], norm: str, lines: int, plain: list[torch.Tensor], groups: int,
) -> None:  # fmt: skip
    """Raises ValueError with what does not fit."""
    sources = len(rotated)
    batch, _, heads, width = parts[0].shape
    values = heads * width if norm.endswith("_all") else width
    table = [part.shape[1] for part, turns in zip(parts, rotated, strict=False) if turns]
    sizes = [(batch, parts[at % sources].shape[1], heads, width) for at in range(len(parts + plain))]
    problems = {
        f"of norm {norm}": norm not in NORMS or bool(biases) and not norm.startswith("layer"),
        f"of {len(parts)} parts": len(parts) != lines * sources or not {lines, sources} <= set(range(1, MOST + 1)),
        f"of {len(plain)} plain parts": len(plain) not in (0, sources),
        f"of {heads} heads in {groups} groups": groups < 0 or groups > 0 and heads % groups != 0,
        f"of lanes in pairs of {width}": width % 2 != 0,
        "of parts of several shapes or dtypes": [part.shape for part in parts + plain] != sizes
        or len({part.dtype for part in parts + plain}) > 1,
        "of other weights or biases": any(
            each and [weight.shape for weight in each] != [(values,)] * len(parts) for each in (weights, biases)
        ),
        "with tables of other tokens": any((each is None) != (not table) for each in (cos, sin)),
    }
    for each in (cos, sin):
        if each is not None:
            fits = each.dim() == 3 and each.shape[0] in (1, batch) and each.shape[2] in (width, width // 2)
            problems[f"with a table of {tuple(each.shape)}"] = not fits or each.shape[1] != sum(table)
    if wrong := [problem for problem, there in problems.items() if there]:
        raise ValueError(f"norm_rope {', '.join(wrong)}")


def _normalized(
    x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, norm: str, eps: float
) -> torch.Tensor:
    """In the dtype of sums."""
    exact = accumulation_dtype(x.dtype)
    if norm == "none":
        return x.to(exact)
    wide = (x.flatten(2) if norm.endswith("_all") else x).to(exact)
    if norm.startswith("layer"):
        wide = wide - wide.mean(-1, keepdim=True)
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        wide = wide * weight.to(exact)
    if bias is not None:
        wide = wide + bias.to(exact)
    return wide.view(x.shape)


def _turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, halves: bool) -> torch.Tensor:
    width = x.shape[-1]

    def pairs(lanes: torch.Tensor) -> tuple[torch.Tensor, ...]:
        wide = lanes.to(x.dtype)
        if lanes.shape[-1] < width:
            return wide, wide
        return wide.chunk(2, -1) if halves else wide.unflatten(-1, (-1, 2)).unbind(-1)

    (first, second), (c, d), (s, t) = pairs(x), pairs(cos.unsqueeze(2)), pairs(sin.unsqueeze(2))
    turned = [first * c - second * s, second * d + first * t]
    return torch.cat(turned, -1) if halves else torch.stack(turned, -1).flatten(-2)


def _packed(lines: list[torch.Tensor], groups: int) -> torch.Tensor:
    batch, tokens, heads, width = lines[0].shape
    sizes = tokens, batch, groups, heads // groups * width
    return torch.cat([x.permute(1, 0, 2, 3).reshape(sizes).permute(2, 0, 1, 3) for x in lines], 3).reshape(-1)


def _fake(
    parts: list[torch.Tensor], weights: list[torch.Tensor], biases: list[torch.Tensor], cos: torch.Tensor | None,
    sin: torch.Tensor | None, rotated: list[int], norm: str, eps: float, lines: int, halves: bool,
    plain: list[torch.Tensor], groups: int,
) -> list[torch.Tensor]:  # fmt: skip
    """New tensors for the results."""
    _check(parts, weights, biases, cos, sin, rotated, norm, lines, plain, groups)
    first, count = parts[0], lines + bool(plain)
    shape = (first.shape[0], sum(part.shape[1] for part in parts[: len(rotated)]), *first.shape[2:])
    shapes = [(count * math.prod(shape),)] if groups else [shape] * count
    return [torch.empty(each, dtype=first.dtype, device=first.device) for each in shapes]


@jit
def _pick(first, second, third, fourth, fifth, sixth, slot, PLAIN: tl.constexpr):
    """What belongs to a source of a line; the last two are those of the plain line."""
    picked = tl.where(slot < 2, tl.where(slot == 0, first, second), tl.where(slot == 2, third, fourth))
    if PLAIN:
        picked = tl.where(slot < 4, picked, tl.where(slot == 4, fifth, sixth))
    return picked


@jit
def _load_pairs(
    rows, there, head, lane, WIDTH: tl.constexpr, VALUES: tl.constexpr, PAIRS: tl.constexpr, HALVES: tl.constexpr
):
    """First and second lanes, [ROWS, PAIRS] each, of rows whose pointers are [ROWS, 1].

    ``head`` and ``lane`` are the strides of these.
    """
    if HALVES:
        pair = tl.arange(0, PAIRS)[None, :]
        half: tl.constexpr = WIDTH // 2
        at = rows + (pair // half).to(tl.int64) * head + pair % half * lane
        there = there & (pair < VALUES // 2)
        first, second = tl.load(at, there, 0.0), tl.load(at + half * lane, there, 0.0)
    else:
        value = tl.arange(0, 2 * PAIRS)[None, :]
        at = rows + (value // WIDTH).to(tl.int64) * head + value % WIDTH * lane
        both = tl.load(at, there & (value < VALUES), 0.0)
        first, second = tl.split(tl.reshape(both, (both.shape[0], PAIRS, 2)))
    return first, second


@jit
def _load_table(
    rows, there, lane, WIDTH: tl.constexpr, VALUES: tl.constexpr, PAIRS: tl.constexpr, HALVES: tl.constexpr,
    OF_LANES: tl.constexpr,
):  # fmt: skip
    """`_load_pairs` of what all heads of a token share, in float32: a number for each lane, or one for each pair."""
    if OF_LANES:
        first, second = _load_pairs(rows, there, 0, lane, WIDTH, VALUES, PAIRS, HALVES)
    else:
        pair = tl.arange(0, PAIRS)[None, :]
        first = tl.load(rows + pair % (WIDTH // 2) * lane, there & (pair < VALUES // 2), 0.0)
        second = first
    return first.to(tl.float32), second.to(tl.float32)


@jit
def _store_pairs(
    rows, there, first, second, entries, WIDTH: tl.constexpr, VALUES: tl.constexpr, PAIRS: tl.constexpr,
    HALVES: tl.constexpr, SPAN: tl.constexpr, ENTRY: tl.constexpr,
):  # fmt: skip
    """The opposite of `_load_pairs`, ``SPAN`` values side by side and the next ``entries`` of size ``ENTRY`` on."""
    half: tl.constexpr = WIDTH // 2
    if HALVES:
        pair = tl.arange(0, PAIRS)[None, :]
        value = pair // half * WIDTH + pair % half
    else:
        value = tl.arange(0, 2 * PAIRS)[None, :]
    at, there = rows + value, there & (value < VALUES)
    if SPAN < VALUES:
        at = rows + (value // SPAN).to(tl.int64) * ENTRY * entries + value % SPAN
    if HALVES:
        tl.store(at, first, there)
        tl.store(at + half, second, there)
    else:
        tl.store(at, tl.reshape(tl.join(first, second), (first.shape[0], 2 * PAIRS)), there)


@jit
def _normalize(
    first, second, weight, bias, EPS: tl.constexpr, WIDTH: tl.constexpr, VALUES: tl.constexpr, PAIRS: tl.constexpr,
    HALVES: tl.constexpr, CENTERED: tl.constexpr, WEIGHTED: tl.constexpr, BIASED: tl.constexpr,
):  # fmt: skip
    """Normalized rows in float32. Weights are on their way before the rows are summed up."""
    start = tl.zeros((1, 1), tl.int32)
    always = start == 0
    if WEIGHTED:
        weights = _load_pairs(weight + start, always, WIDTH, 1, WIDTH, VALUES, PAIRS, HALVES)
    if BIASED:
        biases = _load_pairs(bias + start, always, WIDTH, 1, WIDTH, VALUES, PAIRS, HALVES)
    if CENTERED:
        known = tl.arange(0, PAIRS)[None, :] < VALUES // 2
        mean = tl.sum(first + second, 1, keep_dims=True) / VALUES
        first, second = tl.where(known, first - mean, 0.0), tl.where(known, second - mean, 0.0)
    scale = tl.rsqrt(tl.sum(first * first + second * second, 1, keep_dims=True) / VALUES + EPS)
    first, second = first * scale, second * scale
    if WEIGHTED:
        first, second = first * weights[0].to(tl.float32), second * weights[1].to(tl.float32)
    if BIASED:
        first, second = first + biases[0].to(tl.float32), second + biases[1].to(tl.float32)
    return first, second


@jit
def _place(
    line, head, token, sample, batch, tokens, HEADS: tl.constexpr, WIDTH: tl.constexpr, COUNT: tl.constexpr,
    GROUPS: tl.constexpr,
):  # fmt: skip
    """Where a row begins in a result of one line, or of ``COUNT`` in groups."""
    if GROUPS:
        each: tl.constexpr = HEADS // GROUPS
        entry = head // each * (tokens * batch) + token * batch + sample
        place = entry.to(tl.int64) * (COUNT * each * WIDTH) + (line * each + head % each) * WIDTH
    else:
        place = (sample * tokens + token).to(tl.int64) * (HEADS * WIDTH) + head * WIDTH
    return place


@jit
def _norm_rope_kernel(
    x0, x1, x2, x3, x4, x5, weight0, weight1, weight2, weight3, bias0, bias1, bias2, bias3, cos, sin, out0, out1, out2,
    x0_batch, x1_batch, x2_batch, x3_batch, x4_batch, x5_batch, x0_token, x1_token, x2_token, x3_token, x4_token,
    x5_token, x0_head, x1_head, x2_head, x3_head, x4_head, x5_head, cos_batch, cos_token, cos_lane, sin_batch,
    sin_token, sin_lane, batch, tokens0, tokens1, LINES: tl.constexpr, PLAIN: tl.constexpr, GROUPS: tl.constexpr,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, VALUES: tl.constexpr, NORMED: tl.constexpr, CENTERED: tl.constexpr,
    WEIGHTED: tl.constexpr, BIASED: tl.constexpr, TURNS0: tl.constexpr, TURNS1: tl.constexpr, HALVES: tl.constexpr,
    COS_OF_LANES: tl.constexpr, SIN_OF_LANES: tl.constexpr, PAIRS: tl.constexpr, ROWS: tl.constexpr,
    EPS: tl.constexpr,
):  # fmt: skip
    """A program does ``ROWS`` rows of one source of one line; names end in a source, or in line * 2 + source.

    A row is one head of a token or all of them, ``VALUES`` values; ``PAIRS`` is half of that or the next power of two.
    """
    tile, line = tl.program_id(0), tl.program_id(1)
    splits: tl.constexpr = HEADS * WIDTH // VALUES
    tiles0 = tl.cdiv(batch * tokens0 * splits, ROWS)
    source = (tile >= tiles0).to(tl.int32)
    tokens = tl.where(source == 0, tokens0, tokens1)
    row = (tile - source * tiles0) * ROWS + tl.arange(0, ROWS)[:, None]
    rows = batch * tokens * splits
    there, head = row < rows, row % splits
    token, sample = row // splits % tokens, row // splits // tokens
    far_token, far_sample = token.to(tl.int64), sample.to(tl.int64)
    slot = tl.where(line < LINES, 2 * line, 4) + source
    head_stride = _pick(x0_head, x1_head, x2_head, x3_head, x4_head, x5_head, slot, PLAIN)
    x = _pick(x0, x1, x2, x3, x4, x5, slot, PLAIN) + head.to(tl.int64) * head_stride
    x += far_sample * _pick(x0_batch, x1_batch, x2_batch, x3_batch, x4_batch, x5_batch, slot, PLAIN)
    x += far_token * _pick(x0_token, x1_token, x2_token, x3_token, x4_token, x5_token, slot, PLAIN)
    first, second = _load_pairs(x, there, head_stride, 1, WIDTH, VALUES, PAIRS, HALVES)
    if not PLAIN or line < LINES:
        one, other = first.to(tl.float32), second.to(tl.float32)
        if TURNS0 or TURNS1:
            turns = row < rows * tl.where(source == 0, TURNS0, TURNS1)
            entry = far_token + source * tokens0 * TURNS0
            cosines = cos + far_sample * cos_batch + entry * cos_token
            c, d = _load_table(cosines, turns, cos_lane, WIDTH, VALUES, PAIRS, HALVES, COS_OF_LANES)
            sines = sin + far_sample * sin_batch + entry * sin_token
            s, t = _load_table(sines, turns, sin_lane, WIDTH, VALUES, PAIRS, HALVES, SIN_OF_LANES)
        if NORMED:
            weight = _pick(weight0, weight1, weight2, weight3, weight0, weight0, slot, 0)
            bias = _pick(bias0, bias1, bias2, bias3, bias0, bias0, slot, 0)
            one, other = _normalize(
                one, other, weight, bias, EPS, WIDTH, VALUES, PAIRS, HALVES, CENTERED, WEIGHTED, BIASED
            )  # fmt: skip
        if TURNS0 or TURNS1:
            turned, partner = one * c - other * s, other * d + one * t
            one, other = tl.where(turns, turned, one), tl.where(turns, partner, other)
        first, second = one.to(first.dtype), other.to(second.dtype)
    count: tl.constexpr = LINES + PLAIN
    tokens, token = tokens0 + tokens1, source * tokens0 + token
    place = _place(line, head, token, sample, batch, tokens, HEADS, WIDTH, count, GROUPS)
    out = out0
    if count > 1 and not GROUPS:
        out = tl.where(line == 1, out1, out)
    if count > 2 and not GROUPS:
        out = tl.where(line == 2, out2, out)
    span: tl.constexpr = HEADS * WIDTH // GROUPS if GROUPS else HEADS * WIDTH
    _store_pairs(out + place, there, first, second, tokens * batch, WIDTH, VALUES, PAIRS, HALVES, span, count * span)


def _launch(
    parts: list[torch.Tensor], weights: list[torch.Tensor], biases: list[torch.Tensor], cos: torch.Tensor | None,
    sin: torch.Tensor | None, rotated: list[int], norm: str, eps: float, lines: int, halves: bool,
    plain: list[torch.Tensor], groups: int,
) -> list[torch.Tensor]:  # fmt: skip
    """`norm_rope_reference` by the kernel."""
    outs = _fake(parts, weights, biases, cos, sin, rotated, norm, eps, lines, halves, plain, groups)
    batch, _, heads, width = parts[0].shape
    tokens = [part.shape[1] for part in parts[: len(rotated)]]
    values = heads * width if norm.endswith("_all") else width
    pairs = 1 << (values // 2 - 1).bit_length()
    rows = max(1, _TILE // (2 * pairs))
    counts = [batch * each * heads * width // values for each in tokens]
    if not sum(counts):
        return outs
    if sum(counts) > _MOST_ROWS:
        raise ValueError(f"norm_rope of {sum(counts)} rows, of {_MOST_ROWS} at most")
    xs = [part if part.stride(3) == 1 else part.contiguous() for part in parts + plain]
    xs = [*_slots(xs[: len(parts)], lines), xs[-len(rotated)], xs[-1]]
    tables = [xs[0] if each is None else each for each in (cos, sin)]
    wrap_triton(_norm_rope_kernel)[(sum(-(-count // rows) for count in counts), lines + bool(plain))](
        *xs, *_slots(_alike(weights) or parts, lines), *_slots(_alike(biases) or parts, lines), *tables,
        *[*outs, xs[0], xs[0]][: MOST + 1],
        *(x.stride(dim) for dim in range(3) for x in xs),
        *(table.stride(dim) if table.shape[dim] > 1 else 0 for table in tables for dim in range(3)),
        batch, tokens[0], sum(tokens[1:]),
        LINES=lines, PLAIN=int(bool(plain)), GROUPS=groups, HEADS=heads, WIDTH=width, VALUES=values,
        NORMED=norm != "none", CENTERED=norm.startswith("layer"), WEIGHTED=bool(weights), BIASED=bool(biases),
        TURNS0=int(bool(rotated[0])), TURNS1=int(bool(rotated[-1])), HALVES=halves,
        COS_OF_LANES=tables[0].shape[-1] == width, SIN_OF_LANES=tables[1].shape[-1] == width,
        PAIRS=pairs, ROWS=rows, EPS=eps, num_warps=min(16, max(4, 2 * pairs // 512)),
    )  # fmt: skip
    return outs


def _slots(tensors: list[torch.Tensor], lines: int) -> list[torch.Tensor]:
    """One for each source of each line; those that are not there repeat others."""
    sources = len(tensors) // lines
    return [
        tensors[min(line, lines - 1) * sources + min(source, sources - 1)]
        for line in range(MOST)
        for source in range(MOST)
    ]


def _alike(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Contiguous, and of one dtype."""
    dtype = torch.float32 if len({each.dtype for each in tensors}) > 1 else None
    return [each.to(dtype or each.dtype).contiguous() for each in tensors]


def _norm_rope(
    parts: list[torch.Tensor], weights: list[torch.Tensor], biases: list[torch.Tensor], cos: torch.Tensor | None,
    sin: torch.Tensor | None, rotated: list[int], norm: str, eps: float, lines: int, halves: bool,
    plain: list[torch.Tensor], groups: int,
) -> list[torch.Tensor]:  # fmt: skip
    """The kernel on CUDA; inductor sees what is called here."""
    run = _launch if parts[0].is_cuda and parts[0].dtype != torch.float64 else norm_rope_reference
    return run(parts, weights, biases, cos, sin, rotated, norm, eps, lines, halves, plain, groups)


if TRITON:
    triton_op("xdit_compile::norm_rope", _norm_rope, mutates_args={})
    register_kernel("xdit_compile::norm_rope", "cpu", norm_rope_reference)
else:
    custom_op("xdit_compile::norm_rope", norm_rope_reference, mutates_args={})
register_fake("xdit_compile::norm_rope", _fake)
