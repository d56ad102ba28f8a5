"""Norm and rotation in one kernel: in Triton's interpreter and in PyTorch against float64, and compiled for cards.

As a script, in a process of its own, ``interpreted``, ``far``, ``compiled`` and ``launched`` print what was found.
"""

from __future__ import annotations

import itertools
import json
import mmap
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
import torch.nn.functional as F

from xdit_compile.kernels import norm_rope

ROOT = Path(__file__).resolve().parents[2]
OP = torch.ops.xdit_compile.norm_rope.default
EPS = 1e-5
EXACT = 2e-6
ROTATED = ([1], [0], [0, 1], [1, 0], [1, 1], [0, 0])
SIZES = ((14, 3), (64, 5), (72, 1), (128, 3), (64, 1))
"""Lanes and heads."""
PACKED_SIZES = ((14, 6), (24, 6), (32, 6))
TOKENS = ((23, 6), (1, 37), (9, 0), (0, 9), (16, 16))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
ARCHITECTURES = (80, 90, 100)
NO_RESERVE = 0x4000
"""What mmap of Linux takes for memory that nothing is set aside for; Python has a name for it from 3.13."""
needs_triton = pytest.mark.skipif(not norm_rope.TRITON, reason="needs Triton")

Arguments = tuple[Any, ...]


class Case(NamedTuple):
    """What the op is called with, and how it was chosen."""

    name: str
    arguments: Arguments


def cases(norm: str) -> Iterator[Case]:
    """Every number of lines, of sources and of rotated ones with every kind of pairs and of tables; the rest by lot.

    Then one or two sources with a plain line or without, and every number of groups.
    """
    lot = random.Random(norm)
    for lines, rotated in itertools.product((1, 2), ROTATED):
        kinds = itertools.product((False, True), (1, 2)) if any(rotated) else [(False, 1)]
        for halves, lanes_of_number in kinds:
            yield case(norm, lines, rotated, halves, lanes_of_number, lot)
    for rotated, plain, groups in itertools.product(([1], [0, 1]), (False, True), range(4)):
        if plain or groups:
            halves = (len(rotated) + plain + groups + norm_rope.NORMS.index(norm)) % 2 == 0
            yield case(norm, lot.choice((1, 2)), rotated, halves, lot.choice((1, 2)), lot, plain, groups)


def case(
    norm: str, lines: int, rotated: list[int], halves: bool, lanes_of_number: int, lot: random.Random,
    plain: bool = False, groups: int = 0,
) -> Case:  # fmt: skip
    (width, heads), dtype = lot.choice(PACKED_SIZES if groups else SIZES), lot.choice(DTYPES)
    tokens, batch, layout = lot.choice(TOKENS)[: len(rotated)], lot.choice((1, 2)), lot.choice(list(LAYOUTS))
    parts, values_as_they_are = (
        [LAYOUTS[each](batch, count, heads, width, dtype) for _ in range(times) for count in tokens]
        for times, each in ((lines, layout), (plain, lot.choice(list(LAYOUTS))))
    )
    values = heads * width if norm.endswith("_all") else width

    def factors(there: bool) -> list[torch.Tensor]:
        kinds = lot.choice(((dtype,), (torch.float32,), (dtype, torch.float32)))
        return [torch.randn(values).to(lot.choice(kinds)) for _ in parts] if there else []

    weights = factors(norm != "none" and lot.random() < 0.8)
    biases = factors(norm.startswith("layer") and lot.random() < 0.8)
    turning = sum(each for each, turns in zip(tokens, rotated, strict=True) if turns)
    tables: list[torch.Tensor | None] = [None, None]
    if any(rotated):
        shape = (lot.choice((1, batch)), turning, width // lanes_of_number, 2)
        kind = lot.choice((torch.float32, torch.float32, torch.float64, dtype))
        both = torch.randn(shape).to(kind)
        tables = [each.contiguous() if lot.random() < 0.5 else each for each in both.unbind(-1)]
    name = (
        f"{norm} {lines} {rotated} {halves=} {lanes_of_number=} {plain=} {groups=} {width=} {heads=} {tokens} {dtype} "
        f"{batch=} {layout}"
    )
    last = (rotated, norm, EPS, lines, halves, values_as_they_are, groups)
    return Case(name, (parts, weights, biases, *tables, *last))


def _joined(batch: int, tokens: int, heads: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    """As queries and keys come from one product."""
    product = torch.randn(batch, tokens, 3 * heads * width).to(dtype)
    return product[..., heads * width : 2 * heads * width].unflatten(-1, (heads, width))


LAYOUTS: dict[str, Callable[..., torch.Tensor]] = {
    "contiguous": lambda *size: torch.randn(size[:4]).to(size[4]),
    "joined": _joined,
    "heads first": lambda b, t, h, d, dtype: torch.randn(b, h, t, d).to(dtype).transpose(1, 2),
    "lanes apart": lambda b, t, h, d, dtype: torch.randn(b, t, h, 2 * d).to(dtype)[..., ::2],
}


def by_formula(arguments: Arguments) -> list[torch.Tensor]:
    """In float64: norms by PyTorch, rotation lane by lane, groups element by element."""
    parts, weights, biases, cos, sin, rotated, norm, eps, lines, halves, plain, groups = arguments
    width = parts[0].shape[-1]
    lane = torch.arange(width)
    partner, pair = ((lane + width // 2) % width, lane % (width // 2)) if halves else (lane ^ 1, lane // 2)
    sign = torch.where(lane < partner, -1, 1)

    def table_of(table: torch.Tensor, rows: slice) -> torch.Tensor:
        each_lane = table if table.shape[-1] == width else table[..., pair]
        return each_lane[:, rows, None].double()

    results = []
    for line in range(lines):
        row, done = 0, []
        for source, turns in enumerate(rotated):
            at = line * len(rotated) + source
            x = parts[at].double()
            flat = x.flatten(2) if norm.endswith("_all") else x
            factors = [each[at].double() if each else None for each in (weights, biases)]
            if norm.startswith("rms"):
                flat = F.rms_norm(flat, flat.shape[-1:], factors[0], eps)
            if norm.startswith("layer"):
                flat = F.layer_norm(flat, flat.shape[-1:], *factors, eps)
            x = flat.reshape(x.shape)
            if turns:
                rows = slice(row, row := row + x.shape[1])
                x = x * table_of(cos, rows) + sign * x[..., partner] * table_of(sin, rows)
            done.append(x)
        results.append(torch.cat(done, 1))
    if plain:
        results.append(torch.cat(plain, 1).double())
    return [in_groups(torch.stack(results), groups)] if groups else results


def in_groups(lines: torch.Tensor, groups: int) -> torch.Tensor:
    """Every element of [lines, batch, tokens, heads, lanes] where it lies in the buffer."""
    count, batch, tokens, heads, width = lines.shape
    line, sample, token, head, lane = (
        torch.arange(size).view(-1, *[1] * (4 - dim)) for dim, size in enumerate(lines.shape)
    )
    held = heads // groups
    row = (head // held * tokens + token) * batch + sample
    place = row * (count * held * width) + line * held * width + head % held * width + lane
    return torch.full((lines.numel(),), torch.nan).double().index_put((place,), lines)


def wrong(each: Case, run: Callable[..., list[torch.Tensor]]) -> str | None:
    """What is wrong with the results of a case: float32 by the largest error, others by what one rounding does."""
    dtype = each.arguments[0][0].dtype
    exact, found = by_formula(each.arguments), run(*each.arguments)
    if len(found) != len(exact):
        return f"{each.name}: {len(found)} results"
    for result, right in zip(found, exact, strict=True):
        if not (result.shape == right.shape and result.is_contiguous() and result.dtype == dtype):
            return f"{each.name}: {result.shape} {result.stride()} {result.dtype}"
        error = (result.double() - right).abs()
        if not error.numel():
            continue
        if dtype == torch.float32:
            size, bound = error.max().item(), EXACT * right.abs().max().item()
        else:
            size = error.square().mean().sqrt().item()
            bound = 1.01 * (right.to(dtype).double() - right).square().mean().sqrt().item()
        if not size <= bound:
            return f"{each.name}: off by {size}, {bound} at most"
    return None


def all_wrong(norm: str, run: Callable[..., list[torch.Tensor]]) -> tuple[int, list[str]]:
    """How many cases there were, and what is wrong."""
    torch.manual_seed(0)
    found = [wrong(each, run) for each in cases(norm)]
    return len(found), [each for each in found if each]


def poisoned(*args: Any, make: Any = torch.empty, **kwargs: Any) -> torch.Tensor:
    return make(*args, **kwargs).fill_(float("nan"))


def rounded(data: Any, source: Any, target: Any, mode: Any) -> Any:
    """Between float32 and bfloat16 as a card does it; the interpreter cuts digits off."""
    import numpy
    import triton.language as tl

    if source == tl.float32 and target == tl.bfloat16:
        return torch.from_numpy(numpy.array(data)).bfloat16().view(torch.int16).numpy().view(numpy.uint16)
    return (data.astype(numpy.uint32) << 16).view(numpy.float32)


def interpreted() -> dict[str, tuple[int, list[str]]]:
    """What is wrong with the kernel, by norm."""
    from triton.runtime import interpreter

    with mock.patch.object(interpreter, "_convert_float", rounded), mock.patch.object(torch, "empty", poisoned):
        return {norm: all_wrong(norm, norm_rope._launch) for norm in norm_rope.NORMS}


def far() -> list[bool]:
    """Whether tokens come out right that are 2^30 elements apart, heads normalized together, and groups of heads."""
    count, width = 2**30, 16
    base = nothing(3 * count + 2**12)
    found = []
    for norm, stride in (("rms", (0, count, width, 1)), ("rms_all", (0, width, count, 1))):
        x = base.as_strided((1, 4, 4, width), stride)
        x.copy_(torch.randn(x.shape))
        arguments = ([x], [], [], None, None, [0], norm, EPS, 1, False, [], 0)
        (result,), (expected,) = norm_rope._launch(*arguments), norm_rope.norm_rope_reference(*arguments)
        found.append(torch.allclose(result, expected, atol=1e-3, rtol=1e-3))
    return found + [far_groups(norm) for norm in ("rms", "rms_all")]


def far_groups(norm: str) -> bool:
    """The same of results in groups, 2^31 elements apart: the first source of a call whose second is not done."""
    heads, width, some = 4, 16, 3
    parts = [torch.randn(1, tokens, heads, width).half() for tokens in (some, 1)]
    arguments = (parts, [], [], None, None, [0, 0], norm, EPS, 1, False, [], 2)
    kernel, group = recorded(arguments), 2**31
    tokens = group // (heads // 2 * width)
    out = nothing(group + some * width * heads)
    kernel.kernel[(1, 1)](**kernel.arguments | {"tokens1": tokens - some, "out0": out})
    expected = norm_rope.norm_rope_reference(parts[:1], *arguments[1:5], [0], *arguments[6:])[0].view(2, -1)
    result = out.as_strided(expected.shape, (group, 1))
    return torch.allclose(result, expected, atol=1e-3, rtol=1e-3)


def nothing(count: int) -> torch.Tensor:
    """Elements of float16 that take no memory before they are written."""
    memory = mmap.mmap(-1, 2 * count, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NO_RESERVE)
    return torch.frombuffer(memory, dtype=torch.float16)


class Recorded:
    """In place of a kernel that is launched: what it is launched with."""

    def __init__(self, kernel: Any):
        self.kernel, self.arguments = kernel, dict[str, Any]()

    def __getitem__(self, grid: tuple[int, ...]) -> Recorded:
        return self

    def __call__(self, *args: Any, num_warps: int, **kwargs: Any) -> None:
        self.warps, self.arguments = num_warps, dict(zip(self.kernel.arg_names, args, strict=False)) | kwargs

    def compile(self, architecture: int) -> Any:
        """As Triton does at a launch: of numbers it knows whether they are 1, and multiples of 16."""
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        signature, constants, multiples = {}, {}, {}
        for at, parameter in enumerate(self.kernel.params):
            value = self.arguments[parameter.name]
            if parameter.is_constexpr or (isinstance(value, int) and value == 1):
                signature[parameter.name], constants[(at,)] = "constexpr", value
                continue
            tensor = isinstance(value, torch.Tensor)
            signature[parameter.name] = f"*{NAMES[value.dtype]}" if tensor else "i32"
            if tensor or value % 16 == 0:
                multiples[(at,)] = [["tt.divisibility", 16]]
        source = ASTSource(self.kernel, signature, constants, multiples)
        return triton.compile(source, GPUTarget("cuda", architecture, 32), {"num_warps": self.warps})


def recorded(arguments: Arguments) -> Recorded:
    kernels: list[Recorded] = []

    def wrap(kernel: Any) -> Recorded:
        kernels.append(Recorded(kernel))
        return kernels[-1]

    with mock.patch.object(norm_rope, "wrap_triton", wrap):
        norm_rope._launch(*arguments)
    return kernels[0]


def real_size(
    norm: str, heads: int, width: int, halves: bool, lanes_of_number: int, groups: int
) -> Arguments:  # fmt: skip
    """Two lines of two sources in bfloat16 from products of both, with float32 tables, without memory.

    With groups a plain line comes along.
    """
    with torch.device("meta"):
        products = [torch.empty(2, tokens, 3, heads, width, dtype=torch.bfloat16) for tokens in (512, 4096)]
        *parts, plain, other = [product[:, :, line] for line in range(3) for product in products]
        values = heads * width if norm.endswith("_all") else width
        weights = [torch.empty(values, dtype=torch.bfloat16) for _ in parts]
        tables = [torch.empty(1, 4608, width // lanes_of_number) for _ in range(2)]
    last = [plain, other] if groups else [], groups
    return (parts, weights, [], *tables, [1, 1], norm, EPS, 2, halves, *last)


def compiled() -> dict[str, dict[str, int]]:
    """Registers, bytes of stack and of shared memory, and accesses of 16 bytes of each kernel for each card.

    Loads of a plain line are those before the code branches.
    """
    from xdit_compile.backends.target.pretend_card import _resources

    sizes = [
        ("rms", 24, width, halves, each, 0) for width, halves, each in itertools.product((64, 128), (0, 1), (1, 2))
    ]
    sizes += [("rms_all", 40, 128, halves, each, 0) for halves, each in ((0, 1), (0, 2), (1, 1))]
    sizes += [("rms", 24, 128, 0, 1, 8), ("rms", 24, 128, 1, 2, 8), ("rms_all", 40, 128, 0, 1, 8)]
    found = {}
    for norm, heads, width, halves, each, groups in sizes:
        launch = recorded(real_size(norm, heads, width, bool(halves), each, groups))
        kind = f"{norm} {width} {'halves' if halves else 'neighbours'} tables of {width // each} {groups=}"
        for architecture in ARCHITECTURES:
            code = launch.compile(architecture)
            registers, stack = _resources(code.asm["cubin"])
            found[f"sm_{architecture} {kind}"] = {
                "registers": registers,
                "stack": stack,
                "shared": code.metadata.shared,
                "warps": code.metadata.num_warps,
                "loads": code.asm["ptx"].count("ld.global.v4.b32"),
                "plain": code.asm["ptx"].partition("bra")[0].count("ld.global"),
                "stores": code.asm["ptx"].count("st.global.v4.b32"),
            }
    return found


def launched() -> list[tuple[int, ...]]:
    """Kernels, launches, products and bytes of stack of graphs by inductor: with one line, two, and a plain one.

    The last goes into groups.
    """
    from torch import fx
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    from xdit_compile.backends.target.cards import CARDS
    from xdit_compile.backends.target.pretend_card import DEVICE, pretend_card
    from xdit_compile.reports.counting.count import count

    found = []
    for lines, plain, groups in ((1, 0, 0), (2, 0, 0), (2, 1, 0), (2, 1, 2)):

        def graph(
            x: Any, y: Any, weight: Any, factors: Any, cos: Any, sin: Any, lines: int = lines, plain: int = plain,
            groups: int = groups,
        ) -> Any:  # fmt: skip
            products = [torch.ops.aten.mm(each, weight) for each in (x, y)]
            heads = [torch.ops.aten.view(each, [2, -1, 3, 4, 64]) for each in products]
            parts = [torch.ops.aten.select(each, 2, line) for line in range(lines + plain) for each in heads]
            there = 2 * lines
            last = (lines, False, parts[there:], groups)
            results = OP(parts[:there], [factors] * there, [], cos, sin, [0, 1], "rms", EPS, *last)
            if groups:
                return results[0]
            return tuple(torch.ops.aten.transpose(results[line], 1, 2) for line in range(lines + plain))

        with FakeTensorMode(shape_env=ShapeEnv()):
            shapes = (16, 256), (48, 256), (256, 768), (64,), (1, 24, 64), (1, 24, 64)
            args = [torch.empty(shape, device=DEVICE, dtype=torch.bfloat16) for shape in shapes]
        with pretend_card(CARDS["sm_90"]) as binaries:
            names = {"lines": lines, "plain": plain, "groups": groups}
            code = count(fx.symbolic_trace(graph, names), args, binaries, CARDS["sm_90"])
        found.append((len(code.kernels), code.launches, code.products, code.stack))
    return found


def in_a_process(what: str, folder: Path, **environment: str) -> Any:
    given = {"TRITON_CACHE_DIR": str(folder), "OMP_NUM_THREADS": "1"} | environment
    command = [sys.executable, "-W", "ignore", __file__, what]
    done = subprocess.run(command, env=os.environ | given, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return in_a_process("interpreted", tmp_path_factory.mktemp("triton"), TRITON_INTERPRET="1")


@needs_triton
@pytest.mark.parametrize("norm", norm_rope.NORMS)
def test_the_kernel_equals_the_formula(kernel: Any, norm: str) -> None:
    count, failures = kernel[norm]
    assert count == 50 and failures == []


@pytest.mark.parametrize("norm", norm_rope.NORMS)
def test_the_op_on_the_cpu_equals_the_formula(norm: str) -> None:
    assert all_wrong(norm, OP) == (50, [])


@needs_triton
def test_offsets_have_64_bits(tmp_path: Path) -> None:
    assert in_a_process("far", tmp_path, TRITON_INTERPRET="1") == [True] * 4


@needs_triton
def test_cards_need_no_memory_for_what_registers_do_not_hold(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    found = in_a_process("compiled", tmp_path)
    for name, code in found.items():
        record_property(name, code)
    assert len(found) == 42
    assert {name: code for name, code in found.items() if code["stack"] or code["registers"] > 128} == {}
    narrow = {name: code for name, code in found.items() if not (code["loads"] and code["stores"])}
    assert narrow == {}, "16 bytes at a time"
    plain = [code["plain"] == code["stores"] for name, code in found.items() if "groups=8" in name]
    assert plain == [True] * 9, "a plain line is loaded and stored"


@needs_triton
def test_inductor_launches_it_once_and_copies_nothing(tmp_path: Path) -> None:
    assert in_a_process("launched", tmp_path) == [[1, 1, 2, 0]] * 4


SMALL = [[torch.randn(2, 5, 3, 8)], [torch.ones(8)], [], torch.randn(1, 5, 4), torch.randn(1, 5, 4)]


@pytest.mark.parametrize(("norm", "at"), [("rms", 33), ("layer_all", -1)])
def test_the_op_keeps_the_rules_of_operators(norm: str, at: int) -> None:
    torch.manual_seed(0)
    torch.library.opcheck(OP, list(cases(norm))[at].arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({6: "batch"}, "of norm batch"),
        ({2: [torch.ones(8)]}, "of norm rms"),
        ({5: [1, 1]}, "of 1 parts"),
        ({8: 2}, "of 1 parts"),
        ({0: [torch.randn(2, 5, 3, 7)]}, "of lanes in pairs of 7"),
        ({0: [torch.randn(2, 5, 3, 8), torch.randn(2, 5, 3, 8).half()], 8: 2}, "of parts of several shapes or dtypes"),
        ({1: [torch.ones(24)]}, "of other weights or biases"),
        ({5: [0]}, "with tables of other tokens"),
        ({4: None}, "with tables of other tokens"),
        ({3: torch.randn(1, 6, 8)}, r"with a table of \(1, 6, 8\)"),
        ({11: 2}, "of 3 heads in 2 groups"),
        ({11: -1}, "of 3 heads in -1 groups"),
        ({10: [torch.randn(2, 5, 3, 8)] * 2}, "of 2 plain parts"),
        ({10: [torch.randn(2, 5, 3, 6)]}, "of parts of several shapes or dtypes"),
    ],
)
def test_arguments_that_do_not_fit_together(change: dict[int, Any], message: str) -> None:
    arguments = dict(enumerate([*SMALL, [1], "rms", EPS, 1, False, [], 0])) | change
    for run in (OP, norm_rope.norm_rope_reference):
        with pytest.raises(ValueError, match=message):
            run(*arguments.values())


WITHOUT_TRITON = """
import sys

sys.modules["triton"] = None
import torch

from xdit_compile.kernels import norm_rope

ones = [torch.ones(1, 2, 1, 4)]
(out,) = torch.ops.xdit_compile.norm_rope(ones, [], [], None, None, [0], "rms", 0.0, 1, False, ones, 1)
assert not norm_rope.TRITON and out.shape == (16,) and out.eq(1).all()
"""


def test_without_triton_there_is_the_formula() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT_TRITON], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps({run.__name__: run for run in (interpreted, far, compiled, launched)}[sys.argv[1]]()))
