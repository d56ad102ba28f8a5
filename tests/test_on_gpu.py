"""What only a GPU shows; skipped elsewhere. Two ranks share one card over gloo: NCCL takes no two ranks on one."""

from __future__ import annotations

import datetime
import functools
import math
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import diffusers
import procs
import pytest
import torch
import torch.distributed as dist
from zoo import Draw
from zoo_autoencoders import AUTOENCODERS
from zoo_pipelines import PIPELINES

import xdit_compile
import xdit_compile.kernels.attention
from xdit_compile import Plan
from xdit_compile.devices import backend_for
from xdit_compile.errors import AgreementError
from xdit_compile.in_place import held
from xdit_compile.kernels.groups import Groups, carrier, complete
from xdit_compile.kernels.merge import merge
from xdit_compile.kernels.providers import AttentionQuery
from xdit_compile.kernels.reference import attention_reference
from xdit_compile.kernels.registry import PROVIDERS
from xdit_compile.memory import release_unused, with_reserve
from xdit_compile.mesh import Mesh, connect
from xdit_compile.passes.strips import peak_of
from xdit_compile.seats import Seat, card_of
from xdit_compile.watchdog import lenient

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that torch.cuda sees"),
]
EXACT = 2e-5
OPS = torch.ops.xdit_compile
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


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max()).item()


# ---- attention


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
            assert difference(found.double(), expected) < bound
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
            assert difference(merge(parts)[0].double(), expected) < bound
    if reason is not None:
        pytest.skip(reason)


# ---- one rank


@pytest.mark.parametrize("backend", ["eager", "inductor"])
@pytest.mark.parametrize("name", ["flux", "sd3", "pixart", "sd15", "wan", "cogvideox"])
def test_one_rank(name: str, backend: str) -> None:
    with full_precision():
        expected = call(pipeline(name), name)
        pipe = xdit_compile.parallelize(pipeline(name), Plan(backend=backend))
        assert difference(call(pipe, name), expected) < 5 * EXACT
        assert difference(call(pipe, name), expected) < 5 * EXACT


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
def test_decoding_takes_no_more_than_is_counted(dtype: torch.dtype) -> None:
    """Activations, workspaces of convolutions and what the allocator keeps, at the sizes of real autoencoders."""
    with torch.device("cuda"):
        module = diffusers.AutoencoderKL(**REAL_CODER).eval().requires_grad_(False).to(dtype)
    latent = torch.randn(1, 4, 64, 64, device="cuda", dtype=dtype)
    xdit_compile.parallelize(module, Plan(vae="patch", vae_memory="1TiB", backend="eager"))
    module.decode(latent)
    release_unused(latent.device)
    before = torch.cuda.memory_reserved()
    torch.cuda.reset_peak_memory_stats()
    module.decode(latent)
    taken = torch.cuda.max_memory_reserved() - before
    counted = peak_of(held(module)["decode"].latest().program, latent.device)
    assert counted / 4 < taken <= with_reserve(counted, latent.device)


# ---- several ranks


def on_nccl(rank: int) -> float:
    dist.destroy_process_group()
    store = dist.HashStore()
    dist.init_process_group("nccl", store=store, rank=0, world_size=1, device_id=torch.device("cuda", 0))
    return on_one_card(rank, "sd3", Plan(backend="eager", vae="patch"))


def test_nccl_with_one_rank() -> None:
    assert max(procs.run(on_nccl, 1, method="spawn")) < EXACT


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
