"""Autoencoders that take or draw more than a latent: exact on simulated meshes and on processes."""

from __future__ import annotations

from typing import Any

import procs
import pytest
import torch
from diffusers.models import autoencoders
from splitting import partition_rows
from zoo.autoencoders import AUTOENCODERS
from zoo.autoencoders_more import MORE, WHOLE, beside
from zoo.transformers import Draw

import xdit_compile
from xdit_compile import Plan
from xdit_compile.capture.capture import capture, relative_difference
from xdit_compile.errors import CaptureError
from xdit_compile.ir.results import tensors_of
from xdit_compile.kernels.draws import Draws, drawing
from xdit_compile.passes.axes.infer import infer
from xdit_compile.passes.rules.registry import rulebook
from xdit_compile.runtime.methods.autoencoder import cut_small
from xdit_compile.runtime.methods.draws import Drawn
from xdit_compile.runtime.verify.simulated_mesh import run_simulated

CALLS = [(name, method) for name in MORE for method in ("decode", "encode")]


def worst(found: Any, expected: Any) -> float:
    """Greatest difference of two results, each tensor's relative to its own greatest value; 0 where both are 0."""
    pairs = zip(tensors_of(found), tensors_of(expected), strict=True)
    return max(relative_difference(one, other) for one, other in pairs)


def split(name: str, method: str, parts: tuple[int, ...]) -> None:
    """Exact over so many ranks, and nothing gathered but the result where that is known to be possible."""
    module, given, more = MORE[name].build(), MORE[name].given(method), beside(name, method)

    def compute(*args: Any, **kwargs: Any) -> list[torch.Tensor]:
        with Drawn(()):
            return tensors_of(getattr(module, method)(*args, **kwargs))

    with torch.no_grad(), drawing(Draws((), lambda state: state)):
        expected = compute(given, **more)
        inference = infer(capture(module, (given,), more, forward=compute), rulebook())
        for count in parts:
            ranks = partition_rows(inference, Plan(ring=count))
            results = run_simulated([rank.program for rank in ranks], module, (given,), more)
            assert all(worst(result, expected) < 2e-5 for result in results)
            reasons = {gather.reason for rank in ranks for gather in rank.ledger.gathers}
            assert (name, method) in WHOLE or reasons == {"the result"}


@pytest.mark.parametrize(
    ("name", "method"), [pytest.param("ltx_noise", "decode", marks=pytest.mark.slow), ("asymmetric", "decode")]
)
def test_noise_and_masks_are_split(name, method):
    split(name, method, (3, 8))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "method"), CALLS)
def test_every_other_class(name, method):
    split(name, method, (2, 3, 5, 8))


def test_every_class_of_diffusers_is_known():
    """A new one must be tried: those that are not here are no autoencoders of rows, or told below why not."""
    known = {case.cls for case in [*AUTOENCODERS.values(), *MORE.values()]}
    coders = [name for name, kind in vars(autoencoders).items() if hasattr(kind, "encode") and hasattr(kind, "decode")]
    assert set(coders) - known == {"AutoencoderKLAllegro", "RFD4ProteinaAutoencoder"}


def noisy(rank: int, count: int, backend: str = "eager") -> None:
    """Random numbers are those of one process, from generators that are given and from the default ones."""
    for name, rows in (("consistency", 11), ("consistency", 19), ("ltx_noise", 11)):
        module = MORE[name].build()
        given = Draw(5).normal(*MORE[name].latent[:-2], rows, MORE[name].latent[-1])
        more = beside(name, "decode")

        def decoded(seed: int, module: Any = module, given: Any = given, more: Any = more) -> list[Any]:
            generator = torch.Generator().manual_seed(seed)
            named = {} if more else {"generator": generator}
            torch.manual_seed(seed)
            with torch.no_grad():
                results = [module.decode(given, **named, **more) for _ in range(2)]
            return [*results, generator.get_state(), torch.get_rng_state()]

        expected = decoded(3)
        assert worst(*expected[:2]) > 1e-3
        xdit_compile.parallelize(module, Plan(ring=count, vae="patch", backend=backend))
        found = decoded(3)
        assert max(worst(*pair) for pair in zip(found[:2], expected[:2], strict=True)) < 2e-5
        assert all(torch.equal(*pair) for pair in zip(found[2:], expected[2:], strict=True))
        torch.manual_seed(rank)
        assert worst(module.decode(given, **more)[0], by_first_rank(name, given, more)) < 2e-5


def by_first_rank(name: str, given: torch.Tensor, more: dict[str, Any]) -> torch.Tensor:
    module = MORE[name].build()
    torch.manual_seed(0)
    with torch.no_grad():
        return module.decode(given, **more)[0]


@pytest.mark.slow
def test_random_numbers_are_those_of_one_process():
    procs.run(noisy, 2, 2, timeout=300)


@pytest.mark.slow
def test_random_numbers_are_those_of_one_process_when_compiled():
    procs.run(noisy, 2, 2, "inductor", timeout=900)


def test_numbers_that_no_op_stands_for_are_refused_by_name():
    module = MORE["vq"].build()
    own = module.post_quant_conv.forward
    module.post_quant_conv.forward = lambda x: own(x + torch.normal(0.0, 1.0, x.shape))
    xdit_compile.parallelize(module, Plan(vae="patch", backend="eager"))
    with pytest.raises(CaptureError, match="draws random numbers by normal, which ranks cannot share"):
        module.decode(MORE["vq"].given("decode"))


def test_inputs_are_cut_alike():
    latent, image, other = (torch.zeros(1, 2, rows, 6) for rows in (37, 4 * 37, 40))
    (small, number), more = cut_small(((latent, 3), {"image": image, "other": other}), 16)
    assert small.shape[-2:] == (21, 6) and number == 3
    assert more["image"].shape[-2] == 84 and more["other"].shape[-2] == 40


def test_a_mask_is_rehearsed_with_its_latent():
    module, more = MORE["asymmetric"].build(), beside("asymmetric", "decode", 37, 6)
    given = Draw(5).normal(1, 4, 37, 6)
    with torch.no_grad():
        expected = module.decode(given, **more)
    xdit_compile.parallelize(module, Plan(vae="patch", backend="eager"))
    assert worst(module.decode(given, **more), expected) < 2e-5
