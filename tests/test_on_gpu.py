"""What only a GPU shows; skipped elsewhere. Two ranks share one card over gloo: NCCL takes no two ranks on one."""
# ruff: noqa: E402 - nothing of the file can be imported without diffusers

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import procs
import pytest
import torch
import torch.distributed as dist

diffusers = pytest.importorskip("diffusers", reason="needs diffusers, whose pipelines run here")

from zoo.autoencoders import AUTOENCODERS
from zoo.pipelines import PIPELINES
from zoo.transformers import Draw

import xdit_compile
from tests.test_kernels_on_gpu import EXACT, difference, pytestmark  # noqa: F401 - the last is pytest's
from xdit_compile import Plan
from xdit_compile.capture.state.in_place import held
from xdit_compile.errors import AgreementError
from xdit_compile.ir.peak_memory import release_unused, with_reserve
from xdit_compile.passes.memory.on_meta import peak_of
from xdit_compile.plan.plan import COMPILE_MODES

METHODS: dict[str, dict[str, Any]] = {
    "ulysses": {"ulysses": 2},
    "ring": {"ring": 2},
    "tensor": {"tensor": 2},
    "cfg": {"cfg": 2},
    "pipefusion": {"pipefusion": 2, "warmup_steps": 3},
    "distrifusion": {"distrifusion": 2, "warmup_steps": 3},
    "vae": {"ulysses": 2, "vae": "patch"},
}


@contextmanager
def full_precision() -> Iterator[None]:
    """Without TF32, which rounds what is compared to ten bits."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def pipeline(name: str, dtype: torch.dtype = torch.float32) -> Any:
    return PIPELINES[name].build().to("cuda", dtype)


def call(pipe: Any, name: str, dtype: torch.dtype = torch.float32, output: str = "latent", **more: Any) -> torch.Tensor:
    """A generation on the card; embeddings lie where a text encoder of the pipeline would have left them."""
    case = PIPELINES[name]
    given = case.arguments(Draw(0, "cuda", dtype))
    return case.call(pipe, 0, 3, output, **given, **more).float().cpu()


# ---- one rank


@pytest.mark.parametrize("backend", ["eager", "inductor"])
@pytest.mark.parametrize("name", ["flux", "sd3", "pixart", "sd15", "wan", "cogvideox"])
def test_one_rank(name: str, backend: str) -> None:
    with full_precision():
        expected = call(pipeline(name), name)
        pipe = xdit_compile.parallelize(pipeline(name), Plan(backend=backend))
        assert difference(call(pipe, name), expected) < 5 * EXACT
        assert difference(call(pipe, name), expected) < 5 * EXACT


@pytest.mark.parametrize("mode", COMPILE_MODES)
def test_modes_of_inductor(mode: str) -> None:
    with full_precision():
        expected = call(pipeline("sd3"), "sd3")
        pipe = xdit_compile.parallelize(pipeline("sd3"), Plan(backend="inductor", compile_mode=mode))
        assert difference(call(pipe, "sd3"), expected) < 5 * EXACT


@pytest.mark.parametrize("name", ["flux", "sd3"])
def test_one_rank_in_bfloat16(name: str) -> None:
    """A graph is as far from fp32 as the module itself."""
    with full_precision():
        exact = call(pipeline(name), name)
        own = difference(call(pipeline(name, torch.bfloat16), name, torch.bfloat16), exact)
        pipe = xdit_compile.parallelize(pipeline(name, torch.bfloat16), Plan(backend="inductor"))
        assert difference(call(pipe, name, torch.bfloat16), exact) < 1.5 * own


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_patches_on_one_rank(backend: str) -> None:
    with full_precision():
        expected = call(pipeline("sd3"), "sd3")
        plan = Plan(patches=3, warmup_steps=3, backend=backend)
        assert difference(call(xdit_compile.parallelize(pipeline("sd3"), plan), "sd3"), expected) < 5 * EXACT


def test_a_pipeline_on_the_cpu_beside_a_card() -> None:
    expected = PIPELINES["sd3"].call(PIPELINES["sd3"].build())
    pipe = xdit_compile.parallelize(PIPELINES["sd3"].build(), Plan(backend="eager"))
    assert difference(PIPELINES["sd3"].call(pipe), expected) < EXACT


def test_offload() -> None:
    with full_precision():
        expected = call(pipeline("sd3"), "sd3")
        pipe = PIPELINES["sd3"].build()
        pipe.enable_model_cpu_offload()
        xdit_compile.parallelize(pipe, Plan(backend="eager"))
        assert difference(call(pipe, "sd3"), expected) < EXACT


def test_autoencoder_rows_on_one_rank() -> None:
    with full_precision():
        case = AUTOENCODERS["kl"]
        module = case.build().cuda()
        given = case.given("decode").cuda()
        expected = module.decode(given).sample
        xdit_compile.parallelize(module, Plan(vae="patch", backend="eager"))
        assert difference(module.decode(given).sample, expected) < EXACT


REAL_CODER = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decoding_fits_into_what_is_counted(dtype: torch.dtype) -> None:
    """Activations, workspaces of convolutions and what the allocator keeps, at the sizes of real autoencoders.

    Where there is more, cuDNN takes larger workspaces.
    """
    with torch.device("cuda"):
        module = diffusers.AutoencoderKL(**REAL_CODER).eval().requires_grad_(False).to(dtype)
    latent = torch.randn(1, 4, 64, 64, device="cuda", dtype=dtype)
    xdit_compile.parallelize(module, Plan(vae="patch", vae_memory="1TiB", backend="eager"))
    module.decode(latent)
    release_unused(latent.device)
    before, allocated = torch.cuda.memory_reserved(), torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    module.decode(latent)
    taken = torch.cuda.max_memory_allocated() - allocated
    counted = peak_of(held(module)["decode"].latest().program, latent.device)
    assert counted / 4 < taken
    release_unused(latent.device)
    total = torch.cuda.get_device_properties(latent.device).total_memory
    torch.cuda.set_per_process_memory_fraction((before + with_reserve(counted, latent.device)) / total)
    try:
        module.decode(latent)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


# ---- several ranks


def on_nccl(rank: int) -> float:
    dist.destroy_process_group()
    store = dist.HashStore()
    dist.init_process_group("nccl", store=store, rank=0, world_size=1, device_id=torch.device("cuda", 0))
    return on_one_card(rank, "sd3", Plan(backend="eager", vae="patch"))


def test_nccl_with_one_rank() -> None:
    assert max(procs.run(on_nccl, 1, method="spawn")) < EXACT


def on_one_card(rank: int, name: str, plan: Plan) -> float:
    with full_precision():
        output = "np" if plan.vae == "patch" else "latent"
        expected = call(pipeline(name), name, output=output)
        pipe = xdit_compile.parallelize(pipeline(name), plan)
        first, second = (call(pipe, name, output=output) for _ in range(2))
        xdit_compile.restore(pipe)
        third = call(pipe, name, output=output)
    return max(difference(each, expected) for each in (first, second, third))


@pytest.mark.parametrize("backend", ["eager", "inductor"])
@pytest.mark.parametrize("name", ["sd3", "flux", "sd15"])
@pytest.mark.parametrize("method", sorted(METHODS))
def test_two_ranks_on_one_card(method: str, name: str, backend: str) -> None:
    if (name, method) in (("flux", "cfg"), ("sd15", "pipefusion")):
        pytest.skip("has no branch of guidance, or convolutions over all patches")
    if backend == "inductor" and name != "sd3":
        pytest.skip("one pipeline is compiled")
    plan = Plan(**METHODS[method], backend=backend, timeout_s=60)
    found = procs.run(on_one_card, 2, name, plan, timeout=240, method="spawn")
    assert max(found) < 5 * EXACT


def offloaded(rank: int) -> float:
    with full_precision():
        expected = call(pipeline("sd3"), "sd3")
        pipe = PIPELINES["sd3"].build()
        pipe.enable_model_cpu_offload(device=xdit_compile.local_device())
        xdit_compile.parallelize(pipe, Plan(ulysses=2, backend="eager", timeout_s=60))
        return difference(call(pipe, "sd3"), expected)


def test_two_ranks_of_offloaded_models() -> None:
    assert max(procs.run(offloaded, 2, timeout=240, method="spawn")) < 5 * EXACT


@pytest.mark.parametrize("method", ["distrifusion", "pipefusion"])
def test_patches_on_a_stream_of_the_users(method: str) -> None:
    """Stale values are the previous step's whatever stream computes them."""
    plan = Plan(**{method: 2}, warmup_steps=1, backend="eager", timeout_s=60)
    assert max(procs.run(on_two_streams, 2, plan, timeout=240, method="spawn")) < EXACT


def on_two_streams(rank: int, plan: Plan) -> float:
    pipe, found = xdit_compile.parallelize(pipeline("sd3"), plan), []
    for stream in (torch.cuda.current_stream(), torch.cuda.Stream()):
        with full_precision(), torch.cuda.stream(stream):
            found.append(call(pipe, "sd3"))
    return difference(found[1], found[0])


def raising(rank: int) -> str:
    pipe = xdit_compile.parallelize(pipeline("sd3"), Plan(ulysses=2, backend="eager", timeout_s=30))

    def fail(*given: Any) -> dict[str, Any]:
        if rank == 1:
            raise torch.OutOfMemoryError("here")
        return {}

    try:
        call(pipe, "sd3", callback_on_step_end=fail)
    except (torch.OutOfMemoryError, AgreementError) as error:
        first = str(error)
    return f"{first} {difference(call(pipe, 'sd3'), call(pipeline('sd3'), 'sd3')) < EXACT}"


def test_a_rank_that_fails_is_named() -> None:
    first, second = procs.run(raising, 2, method="spawn")
    assert "rank 1 failed: OutOfMemoryError" in first and first.endswith("True") and second.endswith("True")
