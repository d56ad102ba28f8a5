"""Which device a rank computes on, on a machine that has none: accelerators, cards and backends are pretended."""

from __future__ import annotations

import datetime
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses import FakeTensorMode

import xdit_compile
from xdit_compile import Plan, api
from xdit_compile.api import loading
from xdit_compile.backends.registry import find_backend
from xdit_compile.cli.options.request import Request
from xdit_compile.cli.running import pipeline_call
from xdit_compile.distributed import devices, mesh, seats
from xdit_compile.distributed.mesh import Mesh
from xdit_compile.distributed.seats import Seat
from xdit_compile.distributed.world import World
from xdit_compile.errors import ProviderUnavailable, UsageError
from xdit_compile.kernels import draws
from xdit_compile.kernels.collectives import process_groups as groups
from xdit_compile.runtime.methods import pipefusion
from xdit_compile.runtime.request_facts import share_random_state
from xdit_compile.runtime.session import Session

TWO = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


class Cards:
    """Cards of which one is current; ``said`` is what was done, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, count: int, current: int = 0):
        self.current, self.said = current, []
        accelerator = {
            "current_accelerator": lambda check_available=False: torch.device("cuda"),
            "is_available": lambda: True,
            "device_count": lambda: count,
            "current_device_index": lambda: self.current,
            "set_device_index": self._set,
            "synchronize": lambda: self.said.append("waited"),
        }
        for name, value in accelerator.items():
            monkeypatch.setattr(torch.accelerator, name, value)
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
        monkeypatch.setattr(dist, "is_backend_available", lambda backend: True)
        for name in ("RANK", "WORLD_SIZE", *devices.VISIBLE):
            monkeypatch.delenv(name, raising=False)

    def _set(self, index: int) -> None:
        self.current = index
        self.said.append(index)


class Stop(Exception):
    """Raised where a test has seen enough."""


def launched(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)


def hooked(device: Any, *, inner: bool = False) -> nn.Module:
    """A module on the CPU that a hook of accelerate brings to a device while it runs."""
    module = nn.Linear(2, 2).eval()
    hook = SimpleNamespace(execution_device=device)
    module._hf_hook = SimpleNamespace(hooks=[SimpleNamespace(), hook]) if inner else hook  # type: ignore[assignment]
    return module


def on(device: str) -> nn.Module:
    """A module whose weights are on a device."""
    module = nn.Linear(2, 2).eval()
    with FakeTensorMode():
        module.weight = nn.Parameter(torch.empty(2, 2, device=device))
    return module


# ---- one rank


@pytest.mark.parametrize(
    ("environment", "count", "expected"),
    [
        ({"RANK": "9", "LOCAL_RANK": "1"}, 8, 1),
        ({"RANK": "9"}, 8, 1),
        ({"RANK": "9", "SLURM_PROCID": "9", "SLURM_LOCALID": "3"}, 8, 3),
        ({"RANK": "9", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}, 8, 1),
        ({"RANK": "9", "OMPI_COMM_WORLD_RANK": "9", "OMPI_COMM_WORLD_LOCAL_RANK": "5"}, 8, 5),
        ({"RANK": "9", "PMI_RANK": "9", "MPI_LOCALRANKID": "6"}, 8, 6),
        ({"RANK": "3", "LOCAL_RANK": "3", "CUDA_VISIBLE_DEVICES": "3"}, 1, 0),
        ({"RANK": "3", "SLURM_PROCID": "3", "SLURM_LOCALID": "3", "CUDA_VISIBLE_DEVICES": "0"}, 1, 0),
    ],
)
def test_a_rank_s_number_on_its_host_chooses_its_card(environment: dict[str, str], count: int, expected: int) -> None:
    world = World.from_environment({"WORLD_SIZE": "16", **environment})
    assert devices.local_index(world, count, environment) == expected


@pytest.mark.parametrize("count", [1, 4])
def test_more_ranks_than_cards_are_refused(count: int) -> None:
    with pytest.raises(UsageError, match=f"number 4 on its host, counted from 0, and sees {count} accelerators"):
        devices.local_index(World(4, 4, 8, True), count, {})


def test_a_rank_makes_its_device_current(monkeypatch: pytest.MonkeyPatch) -> None:
    cards = Cards(monkeypatch, 4)
    launched(monkeypatch, TWO)
    assert xdit_compile.local_device() == torch.device("cuda", 1) and cards.said == [1]
    cards.current = 3
    assert xdit_compile.local_device() == torch.device("cuda", 3)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: None)
    assert xdit_compile.local_device() == torch.device("cpu")


def test_a_device_has_an_index_and_is_current(monkeypatch: pytest.MonkeyPatch) -> None:
    cards = Cards(monkeypatch, 4)
    launched(monkeypatch, TWO)
    assert devices.resolve("cuda") == torch.device("cuda", 1) and cards.current == 1
    assert devices.resolve("cuda:2") == torch.device("cuda", 2) and cards.current == 2
    assert devices.resolve("cpu") == torch.device("cpu") and cards.said == [1, 2]
    for wrong, why in (("cuda:4", "only 4 are visible"), ("xpu", "there is no xpu here; take cuda")):
        with pytest.raises(UsageError, match=why):
            devices.resolve(wrong)


def test_loading_begins_with_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    cards, given = Cards(monkeypatch, 4), []

    def weights(*args: Any) -> Any:
        given.append(args[-1])
        raise Stop

    launched(monkeypatch, TWO)
    monkeypatch.setattr(loading, "_folder", lambda *args: cards.said.append("loads"))
    monkeypatch.setattr(loading, "_denoisers", lambda folder: {"denoiser": nn.Linear})
    monkeypatch.setattr(loading, "_weights", weights)
    with pytest.raises(Stop):
        loading.from_pretrained("folder", device="cuda")
    assert cards.said == [1, "loads"] and given == [torch.device("cuda", 1)]


def test_where_a_module_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    Cards(monkeypatch, 4, current=2)
    cuda = torch.device("cuda", 1)
    assert devices.execution_device(nn.Linear(2, 2)) == torch.device("cpu")
    assert devices.execution_device(on("cuda:1")) == cuda
    for device in (cuda, "cuda:1", 1):
        assert devices.execution_device(hooked(device)) == cuda
    assert devices.execution_device(nn.Sequential(hooked("cuda", inner=True))) == torch.device("cuda", 2)
    with torch.device("meta"):
        assert devices.execution_device(nn.Linear(2, 2), cuda) == cuda


@pytest.mark.parametrize(
    ("found", "current", "problem"),
    [
        (["cpu"], 0, ""),
        (["cuda:1", "cpu"], 0, ""),
        (["cuda:0"], 0, ""),
        (["cuda:3"], 3, ""),
        (["cuda:0"], 1, "its weights are on cuda:0 but its current device is cuda:1; call"),
        (["cuda:2"], 0, "its weights are on cuda:2 but its current device is cuda:0; call"),
        (["xpu:0"], 0, "its weights are on xpu:0, which torch.accelerator does not know"),
        (["cuda:1", "cuda:0"], 1, "what is to be split is on cuda:1 and cuda:0"),
    ],
)
def test_weights_are_on_the_current_device(
    monkeypatch: pytest.MonkeyPatch, found: list[str], current: int, problem: str
) -> None:
    cards = Cards(monkeypatch, 4, current)
    device, why = devices.settle(map(torch.device, found), World(1, 1, 2, True))
    assert device == torch.device(found[0]) and problem in why and bool(why) == bool(problem)
    assert cards.current == (current if why or device.type == "cpu" else device.index)


def test_modules_that_move_after_ranks_met(monkeypatch: pytest.MonkeyPatch) -> None:
    Cards(monkeypatch, 4)
    for module in (on("cuda:1"), on("cpu"), hooked("cuda:1")):
        devices.refuse_moved("denoiser", module, torch.device("cuda", 1))
    for module in (on("cuda:0"), hooked("cuda")):
        for met in ("cpu", "cuda:1"):
            with pytest.raises(
                UsageError, match=f"denoiser computes on cuda:0, but ranks met to compute on {met}: call"
            ):
                devices.refuse_moved("denoiser", module, torch.device(met))


def test_requests_of_any_thread_run_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    cards, plan = Cards(monkeypatch, 4), Plan(backend="eager")
    session = Session(plan, Mesh.from_process_group(plan), find_backend("eager"), torch.device("cuda", 2))
    with session.request({}):
        assert cards.current == 2
    assert cards.current == 0


def test_a_time_is_taken_when_the_device_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    cards = Cards(monkeypatch, 1)
    pipeline_call.call_pipeline(lambda: cards.said.append("called"), {}, 0)
    assert cards.said == ["waited", "called", "waited"]
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    devices.finish()
    assert cards.said[3:] == []


def test_what_a_read_of_all_patches_costs_is_timed_until_it_was_said(monkeypatch: pytest.MonkeyPatch) -> None:
    cards, drains = Cards(monkeypatch, 1), pipefusion._Drains()
    drains.between(1)
    drains.took(0.0)
    with pytest.warns(UserWarning, match="all patches were read between two steps"):
        drains.between(1)
    drains.took(0.0)
    assert cards.said == ["waited"] and drains.seconds > 0


def test_the_command_line_s_device(monkeypatch: pytest.MonkeyPatch) -> None:
    cards, world = Cards(monkeypatch, 8), World(9, None, 16, True)
    for asked in ("auto", "cuda"):
        request = Request(device=asked, enable_model_cpu_offload=True)
        assert pipeline_call.placement(request, world) == (torch.device("cuda", 1), torch.bfloat16)
    assert cards.said == [1, 1]
    assert pipeline_call.placement(Request(device="cpu"), world) == (torch.device("cpu"), torch.float32)


# ---- several ranks


def joined(monkeypatch: pytest.MonkeyPatch, module: nn.Module, attention: str = "auto") -> tuple[Cards, list[str]]:
    """What `parallelize` does before there is a process group, and the backend that this is to have."""
    cards, made = Cards(monkeypatch, 4), []

    def make(backend: str, **given: Any) -> None:
        made.append(backend)
        raise Stop

    launched(monkeypatch, TWO)
    monkeypatch.setattr(seats, "meet", lambda *given: None)
    monkeypatch.setattr(dist, "init_process_group", make)
    with pytest.raises(Stop):
        xdit_compile.parallelize(module, Plan(ulysses=2, backend="eager", attention=attention, fallback="unsplit"))
    return cards, made


@pytest.mark.parametrize("make", [on, hooked])
def test_the_device_is_current_before_the_group_is_made(
    monkeypatch: pytest.MonkeyPatch, make: Callable[[str], nn.Module]
) -> None:
    """Offloaded weights are on the CPU then, but do not compute there."""
    cards, made = joined(monkeypatch, make("cuda:1"))
    assert (cards.current, made) == (1, ["cpu:gloo,cuda:nccl"])


def test_ranks_on_the_cpu_leave_cards_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    cards, made = joined(monkeypatch, nn.Linear(2, 2))
    assert (cards.said, made) == ([], ["gloo"])


def test_offloaded_modules_may_have_the_attention_of_their_device(monkeypatch: pytest.MonkeyPatch) -> None:
    assert joined(monkeypatch, hooked("cuda:1").bfloat16(), "sdpa_cudnn")[1] == ["cpu:gloo,cuda:nccl"]
    with pytest.raises(ProviderUnavailable, match="runs on cuda, not on cpu"):
        xdit_compile.parallelize(nn.Linear(2, 2).bfloat16(), Plan(ulysses=2, attention="sdpa_cudnn"))


def seat(device: str = "cuda:0", card: str = "host GPU-1", backend: str = "nccl", problem: str = "") -> Seat:
    return Seat(device, card, backend, problem)


@pytest.mark.parametrize(
    ("others", "problem"),
    [
        ([seat("cuda:1", "host GPU-2")], None),
        ([seat("cuda:0", "another GPU-1")], None),
        ([seat("cuda:1", "host GPU-2"), seat()], "ranks 0 and 2 compute on one card (cuda:0 of rank 2, host GPU-1)"),
        ([seat(problem="its weights are elsewhere")], "rank 1: its weights are elsewhere"),
        ([seat("cpu", "host", "gloo")], "rank 0 computes on cuda:0 and rank 1 on cpu"),
    ],
)
def test_every_rank_needs_a_card_of_its_own(others: list[Seat], problem: str | None) -> None:
    found = seats.problem_of([seat(), *others])
    assert found is None if problem is None else problem in str(found) and "\n" not in str(found)


def test_ranks_may_share_a_card_or_a_cpu_with_gloo() -> None:
    for each in (seat(backend="gloo"), seat("cpu", "host", "gloo")):
        assert seats.problem_of([each, each]) is None


def test_all_ranks_refuse_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    store, said = dist.HashStore(), {}

    def ask(rank: int) -> None:
        try:
            seats.compare_seats(seat(f"cuda:{rank}"), store, rank, 2, 30)
        except UsageError as error:
            said[rank] = str(error)

    threads = [threading.Thread(target=ask, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert said[0] == said[1] and "ranks 0 and 1 compute on one card" in said[0]
    seats.compare_seats(seat(), store, 0, 1, 30)


def test_what_tells_cards_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    cards = [SimpleNamespace(uuid="5e", pci_bus_id=3), SimpleNamespace(uuid="6f", pci_bus_id=4)]
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: cards[index])
    first, second = (seats.card_of(torch.device("cuda", index)) for index in range(2))
    assert first != second and first.endswith(" 5e 3")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace())
    assert seats.card_of(torch.device("cuda", 1), {"CUDA_VISIBLE_DEVICES": "4, 5"}).endswith(" 5")
    assert seats.card_of(torch.device("cuda", 1), {}).endswith(" 1")


# ---- process groups that serve several kinds of device

CONFIGS = {
    "both": "cpu:gloo,cuda:nccl",
    "gloo": "cpu:gloo,cuda:gloo",
    "nccl": "cuda:nccl",
}


@pytest.mark.parametrize(
    ("config", "device", "expected"),
    [
        ("both", "cuda:1", "cuda:1"),
        ("both", "cpu", "cpu"),
        ("gloo", "cuda:1", "cpu"),
        ("gloo", "cpu", "cpu"),
        ("gloo", "xpu:1", "cpu"),
        ("nccl", "cuda:1", "cuda:1"),
        ("nccl", "cpu", "cuda"),
    ],
)
def test_tensors_go_from_where_their_group_sends(
    monkeypatch: pytest.MonkeyPatch, config: str, device: str, expected: str
) -> None:
    monkeypatch.setattr(dist, "get_backend_config", lambda group: CONFIGS[config])
    assert groups.carrier(torch.device(device), None) == torch.device(expected)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("config", "backend", "met"),
    [("both", None, ["cpu", "cuda:2"]), ("gloo", None, ["cpu"]), ("nccl", "cpu:gloo,cuda:nccl", ["cpu", "cuda:2"])],
)
def test_new_groups_carry_both(
    monkeypatch: pytest.MonkeyPatch, config: str, backend: str | None, met: list[str]
) -> None:
    Cards(monkeypatch, 4, current=2)
    made: list[str | None] = []
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_backend_config", lambda group=None: group or CONFIGS[config])
    monkeypatch.setattr(dist, "new_group", lambda ranks, backend=None, **given: made.append(backend))
    monkeypatch.setattr(mesh, "_meet", lambda channel, rank, group: None)
    place = Mesh(("ring",), (2,), 0, {("ring",): "role"})
    mesh.connect(place, datetime.timedelta(seconds=1))
    assert made == [backend]
    assert mesh._devices_of(backend or CONFIGS[config]) == [torch.device(each) for each in met]  # type: ignore[arg-type]


# ---- random numbers


def drawn(monkeypatch: pytest.MonkeyPatch, seed: int, initialised: bool, said: list[bytes]) -> list[Any]:
    """A rank's part in sharing states: those that it has after it, and those that it will have."""
    own = torch.Generator().manual_seed(seed)
    later: list[torch.Tensor] = []
    monkeypatch.setattr(torch.cuda, "default_generators", (own,) if initialised else ())
    monkeypatch.setattr(torch.cuda, "set_rng_state", later.append)

    def share(value: bytes) -> bytes:
        said.append(value)
        return said[0]

    share_random_state(SimpleNamespace(share=share))  # type: ignore[arg-type]
    return later or [own.get_state()]


@pytest.mark.parametrize("initialised", [(True, True), (True, False), (False, False), (False, True)])
def test_random_states_of_an_accelerator_that_may_not_run_yet(
    monkeypatch: pytest.MonkeyPatch, initialised: tuple[bool, bool]
) -> None:
    """Ranks talk as often, whichever of them have an accelerator initialised."""
    Cards(monkeypatch, 1)
    said: list[bytes] = []
    before = torch.default_generator.get_state()
    first, second = (drawn(monkeypatch, rank, initialised[rank], said) for rank in range(2))
    assert len(said) == 2 and torch.equal(torch.default_generator.get_state(), before)
    assert torch.equal(first[0], second[0]) == initialised[0]


def test_the_default_generator_of_an_accelerator_that_does_not_run_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    cards, own = Cards(monkeypatch, 2, current=1), (torch.Generator(), torch.Generator())

    def begin() -> int:
        monkeypatch.setattr(torch.cuda, "default_generators", own)
        return cards.current

    monkeypatch.setattr(torch.cuda, "default_generators", ())
    monkeypatch.setattr(torch.accelerator, "current_device_index", begin)
    assert draws.default_generator(torch.device("cuda")) is own[1]
    assert draws.default_generator(torch.device("cuda", 0)) is own[0]
    assert draws.default_generator(torch.device("cpu")) is torch.default_generator


def test_a_rank_that_is_alone_keeps_its_device(monkeypatch: pytest.MonkeyPatch) -> None:
    cards = Cards(monkeypatch, 4)
    api._sit_down(Plan(), [torch.device("cuda", 3)])
    assert cards.said == []
