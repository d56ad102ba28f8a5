"""Failures where waits for transfers come back at once and the host waits for the device, as with NCCL (`pretend`)."""

from __future__ import annotations

import datetime
import os
import threading
import time
import types
from collections.abc import Callable, Iterator
from typing import Any

import ahead
import pair
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings

from tests.runtime import test_ranks_that_differ as ranks
from xdit_compile import Plan
from xdit_compile.backends.registry import find_backend
from xdit_compile.distributed import liveness, mesh, watchdog
from xdit_compile.distributed.agreement import Agreement
from xdit_compile.distributed.mesh import Mesh
from xdit_compile.errors import AgreementError, PartitionError, PeerError
from xdit_compile.kernels.collectives import process_groups as kernel_groups
from xdit_compile.kernels.collectives.process_groups import Groups, answering
from xdit_compile.runtime import session as sessions
from xdit_compile.runtime.lookout import Lookout

SECOND = datetime.timedelta(seconds=1)
PAIR = pair.Pair(host=True, backend=ahead.NAME)


@pytest.fixture(autouse=True, scope="module")
def end_the_pair() -> Iterator[None]:
    yield
    PAIR.end()


# ---- two ranks in one process


class Rank:
    """What a rank has of a session, with one group that the backend `pretend` carries."""

    def __init__(self, rank: int, store: Any):
        self.agreement = Agreement("talk", rank, [0, 1], timeout_s=60)
        limit = torch.distributed.distributed_c10d.default_pg_timeout
        self.group = ahead.Pretend(store, rank, 2, limit, "both")
        self.groups = Groups(lambda: {"both": self.group}, self.agreement.pulse)
        self.groups.open()
        self.lookout = Lookout(self.agreement, self.groups)


@pytest.fixture
def two(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Rank]]:
    """Two ranks, whose threads look about fifty times a second."""
    store = dist.HashStore()
    monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", lambda: store)
    monkeypatch.setattr(liveness, "BEAT_SECONDS", 0.02)
    monkeypatch.setattr(ahead.Pretend, "ahead", True)
    monkeypatch.setattr(kernel_groups, "peer_error", lambda group, what, why: PeerError(f"{what} failed ({why})"))
    found = [Rank(rank, store) for rank in range(2)]
    yield found
    for each in found:
        each.lookout.end()
        each.agreement.close()
        each.group.abort()


def goes_another_way(rank: Rank) -> None:
    rank.agreement.announce_call("one", [])
    rank.agreement.announce_call("another", [])


def has_another_input(rank: Rank) -> None:
    rank.agreement.announce_call("one", [])
    rank.agreement.announce_call("two", ["float32 [1];2.0"])


def stops(rank: Rank) -> None:
    rank.agreement.close()


@pytest.mark.parametrize(
    ("happens", "words"),
    [
        (lambda rank: rank.agreement.fail(ValueError("broken"), None), "rank 1 failed: ValueError: broken"),
        (goes_another_way, "rank 1 is at call 2 of another where rank 0 is at call 2 of two"),
        (has_another_input, "call 2 of rank 1 has another input 0 than rank 0's"),
        (stops, "rank 1 stopped"),
    ],
)
def test_who_waits_for_the_device_is_freed_and_told(two: list[Rank], happens: Callable, words: str) -> None:
    mine, other = two
    mine.lookout.begin()
    mine.agreement.announce_call("one", [])
    mine.agreement.announce_call("two", ["float32 [1];1.0"])
    values = torch.zeros(1)
    mine.groups.wait(mine.group.allreduce([values]), mine.group, "a sum", values.device)
    timer = threading.Timer(0.1, happens, [other])
    timer.start()
    begin = time.monotonic()
    ahead.finish()
    assert time.monotonic() - begin < 5 and values.item() == 0
    timer.join()
    for refused in (mine.groups.refuse, lambda: mine.groups.find("both")):
        with pytest.raises(AgreementError, match=words):
            refused()
    assert not mine.groups.is_open
    mine.groups.close()
    mine.group = ahead.Pretend(mine.group.store, 0, 2, dist.distributed_c10d.default_pg_timeout, "again")
    mine.groups.open()
    mine.groups.refuse()
    assert mine.groups.find("both") is mine.group and mine.groups.is_open


def test_a_store_that_is_lost_is_a_failure(two: list[Rank]) -> None:
    mine, _ = two
    mine.lookout.begin()
    work = mine.group.allreduce([torch.zeros(1)])
    mine.lookout._step(None)
    work.finish()
    with pytest.raises(AgreementError, match="the store of the process group does not answer"):
        mine.groups.refuse()


def test_what_a_group_says_of_itself_is_a_failure(two: list[Rank]) -> None:
    mine, _ = two
    mine.lookout.begin()
    work = mine.group.allreduce([torch.zeros(1)])
    mine.group.state = "TIMEOUT"
    work.finish()
    with pytest.raises(PeerError, match="a transfer failed .timeout."):
        mine.groups.refuse()


def test_a_request_ends_when_the_device_is_done_and_its_groups_are_well(
    two: list[Rank], monkeypatch: pytest.MonkeyPatch
) -> None:
    mine, _ = two
    session: Any = types.SimpleNamespace(groups=mine.groups, _lookout=mine.lookout)
    monkeypatch.setattr(sessions, "finish_device", lambda: None)
    sessions.Session._arrive(session)
    monkeypatch.setattr(sessions, "finish_device", lambda: setattr(mine.group, "state", "TIMEOUT"))
    with pytest.raises(PeerError, match="a transfer failed .timeout."):
        sessions.Session._arrive(session)


@pytest.mark.parametrize(
    ("own", "told"), [(ValueError("not finite"), "rank 1 stopped"), (PartitionError("cannot be cut"), "cannot be cut")]
)
def test_what_was_computed_of_nothing_is_no_cause_and_a_refusal_is(own: Exception, told: str, two: list[Rank]) -> None:
    mine, _ = two
    mine.groups.give_up(AgreementError("rank 1 stopped"))
    session: Any = types.SimpleNamespace(groups=mine.groups, agreement=mine.agreement, _do=list, _after_failure=[])
    assert str(sessions.Session._stop(session, own)) == told


def test_nothing_is_given_up_where_nobody_waits_or_all_is_well(two: list[Rank]) -> None:
    mine, other = two
    mine.lookout.begin()
    values = [torch.ones(1) for _ in two]
    for each, value in zip(two, values, strict=True):
        each.group.allreduce([value])
    ahead.finish()
    time.sleep(0.1)
    mine.lookout.end()
    other.agreement.fail(ValueError("broken"), None)
    time.sleep(0.1)
    mine.groups.refuse()
    assert [value.item() for value in values] == [2, 2] and mine.groups.is_open and not mine.group.aborted.is_set()


# ---- what is this rank's own failure


@pytest.mark.parametrize(
    ("error", "own"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (torch.AcceleratorError("CUDA error: an illegal memory access was encountered"), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"), True),
        (dist.DistBackendError("NCCL error: unhandled cuda error\nCuda failure 2 'out of memory'"), True),
        (dist.DistBackendError("NCCL error: remote process exited or there was a network error"), False),
        (RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:1"), False),
    ],
)
def test_memory_and_the_device_are_no_peer_s_failure(
    error: RuntimeError, own: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel_groups, "peer_error", lambda group, what, why: PeerError("a peer stopped"))
    with pytest.raises(type(error) if own else PeerError) as caught, answering(None, "a sum"):  # type: ignore[arg-type]
        raise error
    assert (caught.value is error) == own


# ---- NCCL's watchdog


def test_groups_are_made_so_that_a_watchdog_spares_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in watchdog.LENIENT:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
    seen: dict[str, Any] = {}
    groups = Groups(lambda: seen.update({name: os.environ.get(name) for name in watchdog.LENIENT}) or {})
    groups.open()
    assert seen == watchdog.LENIENT | {"TORCH_NCCL_DUMP_ON_TIMEOUT": "1"}
    assert set(watchdog.LENIENT) & set(os.environ) == {"TORCH_NCCL_DUMP_ON_TIMEOUT"}


def test_a_first_sum_that_an_abort_cut_short_is_no_connection() -> None:
    mesh._refuse_short(torch.tensor([2.0]), 2)
    with pytest.raises(AgreementError, match="did not all answer within"), mesh._answering((0, 1), SECOND):
        mesh._refuse_short(torch.ones(1), 2)


# ---- two processes


def unwell(kind: str, group: Any) -> None:
    time.sleep(0.5)
    if kind == "broken":
        raise ValueError("broken")
    with answering(group, "a sum"):
        raise torch.OutOfMemoryError("CUDA out of memory")


def gone_on(rank: int, memory: dict) -> list[Any]:
    """Rank 1 fails in requests in which rank 0 has started its transfer and gone on to read what it brings."""
    plan = Plan(ulysses=2, timeout_s=20, backend="eager")
    session = sessions.Session(plan, Mesh.from_process_group(plan), find_backend("eager"))
    role, found, waited = session.mesh.group("ulysses"), [], []
    sessions.finish_device = lambda: waited.append(ahead.finish())
    for kind in ("well", "broken", "memory", "well"):
        begin = time.monotonic()
        try:
            with session.request({}):
                session.announce("a sum", [torch.ones(2)])
                if kind != "well" and rank == 1:
                    unwell(kind, session.groups.find(role))
                ahead.Pretend.ahead = True
                total = torch.ops.xdit_compile.all_reduce(torch.full((1,), rank + 1.0), role)
                ahead.Pretend.ahead = False
                ahead.finish()
            found.append((str(total.item()), 0.0))
        except Exception as error:
            found.append((f"{type(error).__name__}: {error}", time.monotonic() - begin))
    session.close()
    return [*found, len(waited)]


def test_a_rank_that_has_gone_on_hears_why_its_values_do_not_come() -> None:
    first, second = PAIR.run(gone_on)
    assert first.pop() >= 2 and second.pop() >= 2, "requests return what the device has not computed"
    assert all(seconds < 10 for _, seconds in (*first, *second))
    told, memory = "rank 1 failed: ValueError: broken", "rank 1 failed: OutOfMemoryError: CUDA out of memory"
    assert [said for said, _ in first] == ["3.0", f"AgreementError: {told}", f"AgreementError: {memory}", "3.0"]
    assert [said for said, _ in second] == [
        "3.0", "ValueError: broken", "OutOfMemoryError: CUDA out of memory", "3.0",
    ]  # fmt: skip


def test_a_pipeline_whose_peer_fails_is_right_again() -> None:
    ranks.check(ranks.Scenario("ulysses", "raise", "callback", at=1), PAIR)


@pytest.mark.slow
def test_a_peer_that_is_killed_is_named() -> None:
    PAIR.end()
    outcomes, died = PAIR.run(ranks.play, ranks.Scenario("ulysses", "kill", "step", at=1))
    assert died == pair.DIED and "rank 1 stopped: it gives no sign of life" in outcomes[0].error
    assert all("rank 1" in each.error and each.seconds < ranks.KILLED_S + 20 for each in outcomes)


@pytest.mark.slow
@given(ranks.scenarios(ranks.QUICK))
@settings(ranks.CHECKED, derandomize=True, max_examples=40)
def test_many_ranks_that_differ(scenario: ranks.Scenario) -> None:
    ranks.check(scenario, PAIR)
