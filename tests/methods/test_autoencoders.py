"""Autoencoders split by rows: exact, without gathers, on simulated meshes and on processes."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import procs
import pytest
import torch
from splitting import partition_rows
from torch import nn
from zoo.autoencoders import AUTOENCODERS, CALLS, run
from zoo.pipelines import PIPELINES

import xdit_compile
from xdit_compile import Plan
from xdit_compile.capture.capture import capture
from xdit_compile.capture.state.in_place import held
from xdit_compile.errors import PlanError, ProviderUnavailable, UsageError
from xdit_compile.ir.results import tensors_of
from xdit_compile.passes.axes.infer import Inference, infer
from xdit_compile.passes.rules.registry import rulebook
from xdit_compile.runtime.verify.simulated_mesh import run_simulated

SMALL = ("kl", "wan", "dc")


@functools.lru_cache(maxsize=1)
def typed(name: str, method: str) -> tuple[nn.Module, torch.Tensor, torch.Tensor, Inference]:
    case = AUTOENCODERS[name]
    module, given = case.build(), case.given(method)
    with torch.no_grad():
        expected = run(module, method, given)
    program = capture(module, (given,), {}, forward=lambda x: run(module, method, x))
    return module, given, expected, infer(program, rulebook())


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    assert found.shape == expected.shape
    return ((found - expected).abs().max() / expected.abs().max()).item()


def split_by_rows(name: str, method: str, parts: int) -> None:
    module, given, expected, inference = typed(name, method)
    ranks = partition_rows(inference, Plan(ring=parts), gather=False)
    strips = run_simulated([rank.program for rank in ranks], module, (given,), {})
    assert [gather.reason for rank in ranks for gather in rank.ledger.gathers] == []
    assert all(rank.ledger.flops_replicated < 0.02 * rank.ledger.flops for rank in ranks)
    assert difference(torch.cat(strips, -2), expected) < 2e-5


def assert_alike(found: Any, expected: Any) -> None:
    """Two results of one method called as it is by default, the second from the module itself."""
    assert type(found) is type(expected) and list(found) == list(expected)
    ours, own = (getattr(result, "latent_dist", result) for result in (found, expected))
    assert type(ours) is type(own) and vars(ours).keys() == vars(own).keys()
    for name, value in vars(own).items():
        mine = vars(ours)[name]
        assert difference(mine, value) < 2e-5 if isinstance(value, torch.Tensor) else mine == value
    assert found[0] is next(iter(vars(found).values()))
    if ours is not found:
        samples = [distribution.sample(torch.Generator().manual_seed(1)) for distribution in (ours, own)]
        assert difference(*samples) < 2e-5 and difference(ours.mode(), own.mode()) < 2e-5


@pytest.mark.parametrize("name", ["kl", "tiny", "dc", "qwen", "mochi"])
def test_default_calls_return_what_the_module_returns(name):
    case = AUTOENCODERS[name]
    module = case.build()
    given = {method: case.given(method) for method in ("decode", "encode")}
    with torch.no_grad():
        expected = {method: getattr(module, method)(x) for method, x in given.items()}
    xdit_compile.parallelize(module, Plan(vae="patch", backend="eager"))
    for method, x in given.items():
        first, second = (getattr(module, method)(x) for _ in range(2))
        assert_alike(first, expected[method])
        assert_alike(second, expected[method])
        assert not {id(tensor) for tensor in tensors_of(first)} & {id(tensor) for tensor in tensors_of(second)}


@pytest.mark.parametrize(
    ("name", "method"), [pytest.param(*call, marks=pytest.mark.slow if call[0] == "wan" else ()) for call in CALLS]
)
def test_every_class_is_exact_and_gathers_nothing(name, method):
    for parts in (3, 8):
        split_by_rows(name, method, parts)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "method"), CALLS)
def test_every_class_on_two_and_four(name, method):
    for parts in (2, 4):
        split_by_rows(name, method, parts)


def coded(rank: int, count: int, name: str, backend: str) -> list[Any]:
    """Both methods on this rank: how far from the module's own, and the rows of a call that does not gather."""
    found: list[Any] = []
    for method in ("decode", "encode"):
        case = AUTOENCODERS[name]
        module, given = case.build(), case.given(method)
        with torch.no_grad():
            expected = run(module, method, given)
        attributes = dict(vars(module))
        xdit_compile.parallelize(module, Plan(ring=count, vae="patch", backend=backend))
        first, second = run(module, method, given), run(module, method, given + 0)
        assert torch.equal(first, second)
        strip = getattr(module, method)(given, return_dict=False, gather=False)[0]
        rows = getattr(strip, "parameters", strip).shape[-2]
        report = str(xdit_compile.explain(module))
        xdit_compile.restore(module)
        assert vars(module) == attributes
        found.append((difference(first, expected), rows, expected.shape[-2], f"{count} ranks" in report))
    return found


def both_ways(count: int, name: str, backend: str = "eager") -> None:
    every = procs.run(coded, count, count, name, backend, timeout=500)
    for of_method in zip(*every, strict=True):
        assert all(far < 2e-5 and reported for far, _, _, reported in of_method)
        rows = [rows for _, rows, _, _ in of_method]
        assert sum(rows) == of_method[0][2] and max(rows) < of_method[0][2]


QUICK = ("kl", "dc")


@pytest.mark.parametrize("name", QUICK)
def test_two_processes(name):
    both_ways(2, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in AUTOENCODERS if name not in QUICK])
def test_two_processes_for_the_others(name):
    both_ways(2, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["kl", "hunyuan", "qwen"])
def test_compiled(name):
    both_ways(2, name, "inductor")


def default_calls(rank: int, count: int) -> None:
    for name, method in (("kl", "encode"), ("dc", "encode"), ("dc", "decode")):
        case = AUTOENCODERS[name]
        module, given = case.build(), case.given(method)
        with torch.no_grad():
            expected = getattr(module, method)(given)
        xdit_compile.parallelize(module, Plan(ring=count, vae="patch", backend="eager"))
        assert_alike(getattr(module, method)(given), expected)


def test_default_calls_on_two_processes():
    procs.run(default_calls, 2, 2)


@contextmanager
def counted(module: nn.Module) -> Iterator[list[str]]:
    """The calls that are made meanwhile of what a module holds directly."""
    calls: list[str] = []
    handles = [child.register_forward_hook(lambda *_: calls.append("")) for child in module.children()]
    yield calls
    for handle in handles:
        handle.remove()


def tiled(rank: int, count: int, name: str) -> list[Any]:
    found = []
    for method in ("decode", "encode"):
        case = AUTOENCODERS[name]
        module, given = case.build(), case.given(method)
        with torch.no_grad(), counted(module) as whole:
            run(module, method, given)
        case.small_tiles(module)
        with torch.no_grad(), counted(module) as calls:
            expected = run(module, method, given)
        assert len(calls) > len(whole)
        xdit_compile.parallelize(module, Plan(ring=count, vae="patch", backend="eager"))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found.append(difference(run(module, method, given), expected))
            run(module, method, given)
        with pytest.raises(UsageError, match="tiling"):
            getattr(module, method)(given, gather=False)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", ["kl"])
def test_tiles_are_split_while_tiling_is_on(name):
    for rank in procs.run(tiled, 2, 2, name, timeout=300):
        assert max(rank) < 2e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dc", "wan", "hunyuan", "ltx", "qwen", "cogvideox", "mochi"])
def test_tiles_of_the_others(name):
    test_tiles_are_split_while_tiling_is_on(name)


def test_slicing_stays():
    case = AUTOENCODERS["kl"]
    module, given = case.build(), torch.cat([case.given("decode")] * 2) * torch.tensor([1.0, 0.5]).view(2, 1, 1, 1)
    with torch.no_grad():
        expected = run(module, "decode", given)
    module.enable_slicing()
    xdit_compile.parallelize(module, Plan(vae="patch", backend="eager"))
    assert difference(run(module, "decode", given), expected) < 2e-5


def test_a_large_input_is_rehearsed_small():
    """The module never sees the whole: one device may not have the memory."""
    case = AUTOENCODERS["kl"]
    module, given = case.build(), torch.randn(1, 4, 37, 21)
    with torch.no_grad():
        expected = run(module, "decode", given)
    seen = set()
    module.decoder.register_forward_pre_hook(
        lambda module, args: seen.add(args[0].shape[-2:]) if type(args[0]) is torch.Tensor else None
    )
    xdit_compile.parallelize(module, Plan(vae="patch", backend="eager"))
    for _ in range(2):
        assert difference(run(module, "decode", given), expected) < 2e-5
    assert seen == {(16 + 37 % 16, 21)}


def test_a_generator_that_nothing_reads_is_no_new_program():
    case = AUTOENCODERS["kl"]
    module, given = case.build(), case.given("decode")
    xdit_compile.parallelize(module, Plan(vae="patch", backend="eager"))
    results = [module.decode(given, return_dict=False, generator=torch.Generator())[0] for _ in range(2)]
    assert torch.equal(*results)
    (rows,) = [held(module)["decode"]]
    assert sum(len(runner.calls) for runner in (rows._checked, *rows._trusting.values())) == 1


def unfit(rank: int, count: int) -> list[str]:
    case = AUTOENCODERS["kl"]
    module, given = case.build(), case.given("decode")
    with torch.no_grad():
        few = run(module, "decode", given[:, :, :1])
    xdit_compile.parallelize(module, Plan(ring=count, vae="patch", backend="eager", timeout_s=60))
    said = []
    spoilt = given.clone()
    spoilt[0, 1, 2, 3] = torch.nan
    for bad in (spoilt, torch.cat([given, given[:, :1]], 1)):
        with pytest.raises((UsageError, RuntimeError)) as caught:
            module.decode(bad)
        said.append(str(caught.value))
    with pytest.warns(UserWarning, match="1 rows, so 1 of 2 ranks have nothing to do"):
        found = run(module, "decode", given[:, :, :1])
    assert difference(found, few) < 2e-5
    assert difference(run(module, "decode", given), case_result(given)) < 2e-5
    return said


def case_result(given: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return run(AUTOENCODERS["kl"].build(), "decode", given)


def test_bad_input_is_refused_or_split_less_on_every_rank():
    for nan, channels in procs.run(unfit, 2, 2, timeout=300):
        assert "NaN" in nan and "decode" in nan
        assert "5 channels" in channels and "4 channels" in channels


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        (Plan(vae="tiles"), "vae='tiles' is unknown; choose one of whole, patch"),
        (Plan(vae="patch", vae_degree=0), "vae_degree=0 must be a whole number"),
        (Plan(vae_degree=2), "no use with vae='whole'"),
        (Plan(ring=4, data=2, vae="patch", vae_degree=3), "must divide the 4 ranks"),
    ],
)
def test_plans_that_cannot_be(plan, words):
    with pytest.raises(PlanError, match=words):
        plan.check()


def test_a_module_that_does_not_decode_has_no_rows():
    with pytest.raises(UsageError, match="no autoencoder"):
        xdit_compile.parallelize(nn.Linear(2, 2).eval(), Plan(vae="patch"))


def some_of_the_ranks(rank: int, count: int, degree: int, data: int) -> tuple[float, int]:
    case = AUTOENCODERS["kl"]
    module, given = case.build(), torch.cat([case.given("decode") * (1 + image) for image in range(data)])
    with torch.no_grad():
        expected = run(module, "decode", given)
    plan = Plan(ulysses=count // data, data=data, vae="patch", vae_degree=degree, backend="eager")
    xdit_compile.parallelize(module, plan)
    return difference(run(module, "decode", given), expected), held(module)["decode"].team.place.mesh.world_size


@pytest.mark.parametrize(("degree", "data", "expected"), [(2, 1, 2), (None, 2, 4), (1, 2, 2)])
def test_a_chosen_number_of_ranks_shares_rows_and_data_ranks_the_batch(degree, data, expected):
    for far, size in procs.run(some_of_the_ranks, 4, 4, degree, data, timeout=300):
        assert far < 2e-5 and size == expected


def pictures(rank: int, count: int, plan: Plan) -> float:
    """Greatest difference of a picture and its latent from what the pipeline makes by itself."""
    pipe = PIPELINES["pixart"].build()
    with torch.no_grad():
        expected = PIPELINES["pixart"].call(pipe, output="np")
    inner = pipe.vae.decoder
    xdit_compile.parallelize(pipe, plan)
    found = PIPELINES["pixart"].call(pipe, output="np")
    xdit_compile.restore(pipe)
    assert pipe.vae.decoder is inner and "decode" not in vars(pipe.vae)
    again = PIPELINES["pixart"].call(pipe, output="np")
    assert torch.equal(again, expected)
    return (found - expected).abs().max().item()


@pytest.mark.parametrize("vae", ["patch", "distvae"])
def test_a_whole_pipeline(vae):
    plan = Plan(ulysses=2, vae=vae, backend="eager")
    assert max(procs.run(pictures, 2, 2, plan, timeout=300)) < 2e-5


def test_distvae_says_what_it_does_not_know():
    module = AUTOENCODERS["dc"].build()
    with pytest.raises(ProviderUnavailable, match="no adapter for the decoder of a AutoencoderDC"):
        xdit_compile.parallelize(module, Plan(vae="distvae", backend="eager"))
