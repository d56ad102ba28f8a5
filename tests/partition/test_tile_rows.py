"""Convolutions in strips: the same numbers from less memory."""

from __future__ import annotations

import gc

import diffusers
import procs
import pytest
import torch
from splitting import partition_rows
from zoo.autoencoders import AUTOENCODERS, run

import xdit_compile
from tests.methods.test_autoencoders import difference, typed
from xdit_compile import Plan
from xdit_compile.capture.capture import capture
from xdit_compile.capture.state.in_place import held
from xdit_compile.ir import peak_memory as memory
from xdit_compile.ir.inline_calls import flatten
from xdit_compile.ir.peak_memory import peak_bytes, with_reserve
from xdit_compile.ir.program import Program
from xdit_compile.passes.axes.infer import infer
from xdit_compile.passes.memory.on_meta import peak_of
from xdit_compile.passes.memory.tile_rows import cut_into, in_strips
from xdit_compile.passes.rules.registry import rulebook
from xdit_compile.runtime.methods import autoencoder
from xdit_compile.runtime.verify.simulated_mesh import run_simulated

LESS = (("kl", "decode"), ("wan_residual", "encode"), ("qwen", "decode"))
"""At these sizes rows at the seams do not outweigh what strips save."""
PUT = torch.ops.xdit_compile.put_rows.default


def programs(inference, parts: int) -> list[Program]:
    plan = Plan(ring=parts, vae="patch", vae_memory="1kB")
    return [rank.program for rank in partition_rows(inference, plan)]


@pytest.mark.parametrize(
    ("name", "method"),
    [
        *(("kl", "decode"), ("kl", "encode")),
        *(pytest.param(*each, marks=pytest.mark.slow) for each in [*LESS[1:], ("wan", "decode")]),
    ],
)
def test_autoencoders_are_exact_and_most_hold_less(name, method):
    module, given, expected, inference = typed(name, method)
    for parts in (1, 2, 3):
        plain = programs(inference, parts)
        cut = [cut_into(program, 5, 0) for program in plain]
        assert all(any(node.target is PUT for node in flatten(program.root).graph.nodes) for program in cut)
        for found in run_simulated(cut, module, (given,), {}):
            assert difference(found, expected) < 2e-5
        if (name, method) in LESS:
            assert all(peak_of(one) < peak_of(other) for one, other in zip(cut, plain, strict=True))


class Frequencies(torch.nn.Module):
    """What a convolution is given was made by operators that no strip was ever told of: their rules are enough."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(6, 3, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(torch.fft.fft(x.flip(1).softmax(1), dim=3).abs().cumsum(1))


def test_strips_follow_the_rules_of_operators():
    torch.manual_seed(0)
    module, x = Frequencies().eval(), torch.randn(1, 6, 37, 5)
    program = capture(module, (x,), {})
    cut = cut_into(program, 4, 0)
    names = [str(node.target) for node in flatten(cut.root).graph.nodes if node.op == "call_function"]
    for name in ("flip", "softmax", "fft", "abs", "cumsum", "conv2d"):
        assert sum(name in each for each in names) == 4, name
    (found,) = run_simulated([cut], module, (x,), {})
    assert difference(found, module(x)) < 2e-5 and peak_of(cut) < peak_of(program)


def test_what_fits_is_left_alone():
    *_, inference = typed("kl", "decode")
    (program,) = programs(inference, 1)
    assert in_strips(program, peak_of(program)) is program
    less = peak_of(program) - 1
    assert peak_of(in_strips(program, less)) <= less


def test_an_accelerator_takes_more_than_activations(monkeypatch):
    """A convolution's workspace is as large as its operand and result, and the allocator keeps gaps."""
    card = torch.device("cuda", 1)
    monkeypatch.setattr(memory, "WORKSPACE", 0)
    module, x = torch.nn.Conv2d(2, 3, 3, padding=1).eval(), torch.randn(1, 2, 8, 8)
    program = capture(module, (x,), {})
    assert peak_of(program) == 3 * 64 * 4
    assert peak_of(program, card) == 3 * 64 * 4 + (2 + 3) * 64 * 4
    *_, inference = typed("kl", "decode")
    (program,) = programs(inference, 1)
    needed = with_reserve(peak_of(program, card), card)
    assert in_strips(program, needed, card) is program
    cut = in_strips(program, needed - 1, card)
    assert cut is not program and in_strips(program, needed - 1) is program
    assert with_reserve(peak_of(cut, card), card) < needed == peak_of(program, card) * 9 // 8


def test_memory_is_given_back_before_decoding(monkeypatch):
    module, given, *_ = typed("kl", "decode")
    said = []
    xdit_compile.parallelize(module, Plan(vae="patch", backend="eager"))
    monkeypatch.setattr(autoencoder, "release_unused", said.append)
    monkeypatch.setattr(autoencoder.RowMethod, "_coded", lambda *_: said.append("decoded"))
    module.decode(given)
    assert said == [torch.device("cpu"), "decoded"]
    xdit_compile.restore(module)


def test_what_does_not_fit_is_said():
    *_, inference = typed("kl", "decode")
    (program,) = programs(inference, 1)
    with pytest.warns(UserWarning, match="vae_memory is 0 MiB but this rank needs .* more ranks"):
        in_strips(program, 1000)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:vae_memory")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("parts", [1, 4])
def test_the_real_sizes_of_an_autoencoder(parts, dtype):
    """Splitting alone brings the peak to 1/N of the plain decode, strips to less than 3/4 of that."""
    config = {
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "block_out_channels": (128, 256, 512, 512),
        "layers_per_block": 2,
    }
    with torch.device("meta"):
        module = diffusers.AutoencoderKL(**config).eval().to(dtype)
    latent = torch.empty(1, 4, 64, 64, device="meta", dtype=dtype)
    with torch.no_grad():
        plain = peak_bytes(module.decode, latent, return_dict=False)
    inference = infer(capture(module, (latent,), {}, forward=lambda z: run(module, "decode", z)), rulebook())
    for program in programs(inference, parts):
        assert peak_of(program) <= 1.15 * plain / parts
        assert peak_of(in_strips(program, 1000)) <= 0.75 * plain / parts


def test_live_storages_are_counted_to_their_last_tensor():
    x = torch.ones(1000)

    def work() -> torch.Tensor:
        a = x * 2
        b = a[:10]
        c = b + 1
        del a, b
        return c.sum() + (x + 1).sum()

    assert peak_bytes(work) == 4000 + 40 + 4 + 4
    gc.collect()
    assert peak_bytes(lambda: x.view(10, 100).t()) == 0


def test_a_flat_graph_computes_the_same():
    module, given, expected, inference = typed("kl", "decode")
    program = inference.program
    names = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    values = {"user": lambda _: given, "constant": program.constants.get}
    tensors = [values.get(spec.kind, names.get)(spec.target) for spec in program.inputs]
    with torch.no_grad():
        (found,) = flatten(program.root)(*tensors)
    assert difference(found, expected) < 2e-5


def test_put_rows():
    out = torch.zeros(2, 5, 3)
    torch.ops.xdit_compile.put_rows(out, torch.ones(2, 2, 3), 1, 3)
    assert out[:, 3:].eq(1).all() and out[:, :3].eq(0).all()
    torch.library.opcheck(PUT, (torch.zeros(2, 5, 3), torch.ones(2, 2, 3), 1, 3))
    with pytest.raises(RuntimeError):
        torch.ops.xdit_compile.put_rows(out, torch.ones(2, 3, 3), 1, 3)


def within(rank: int, count: int, backend: str) -> list[float]:
    found = []
    for method in ("decode", "encode"):
        case = AUTOENCODERS["kl"]
        module, given = case.build(), case.given(method)
        with torch.no_grad():
            expected = run(module, method, given)
        plan = Plan(ring=count, vae="patch", vae_memory="24kB", backend=backend)
        xdit_compile.parallelize(module, plan)
        found.append(difference(run(module, method, given), expected))
        (runner,) = [held(module)[method]._checked]
        (compiled_call,) = runner.calls
        assert any(node.target is PUT for node in flatten(compiled_call.program.root).graph.nodes) or method == "encode"
    return found


@pytest.mark.filterwarnings("ignore:vae_memory")
def test_on_one_process():
    assert max(within(0, 1, "eager")) < 2e-5


def test_on_two_processes():
    assert all(max(far) < 2e-5 for far in procs.run(within, 2, 2, "eager", timeout=200))


@pytest.mark.slow
def test_compiled_on_two_processes():
    assert all(max(far) < 2e-5 for far in procs.run(within, 2, 2, "inductor", timeout=500))
