"""Who waits for whom, for how long, and who tells: by signs of life in a store, as several ranks see them."""

from __future__ import annotations

import json
import logging
import threading
import time

import pytest
import torch.distributed as dist

from xdit_compile.distributed import liveness, peers
from xdit_compile.distributed.peers import Patience, Peers
from xdit_compile.distributed.seats import COMING, LIFE, Seat, compare_seats
from xdit_compile.errors import AgreementError


def sign(store: dist.Store, rank: int, beat: int, does: str = "", busy: bool = False, process: int = 0) -> None:
    """What the thread of a rank writes; one that was stopped writes nothing more."""
    home = liveness._home() if process else ""
    said = {"beat": beat, "does": does, "busy": busy, "home": home, "process": process}
    store.set(f"talk/alive/{rank}", json.dumps(said))


def seen_by(rank: int, store: dist.Store, timeout_s: float) -> Peers:
    return Peers(liveness.Signs(store, "talk"), "talk", rank, timeout_s)


def test_a_silent_rank_is_told_once_by_all_and_ends_them_in_time(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    now, store = [0.0], dist.HashStore()
    monkeypatch.setattr(liveness.time, "monotonic", lambda: now[0])
    sign(store, 2, 1, "compiling graph 3 of 6", busy=True)
    others = [seen_by(rank, store, 100.0) for rank in range(2)]
    found = []
    with caplog.at_level(logging.WARNING, "xdit_compile.peers"):
        for _ in range(27):
            now[0] += 4.0
            found.append([each.stopped([2]) for each in others])
    assert found[25] == [None, None]
    assert all("rank 2 stopped: it gives no sign of life for 1" in str(each) for each in found[26])
    (told,) = [record.getMessage() for record in caplog.records]
    assert told == (
        "rank 2 gives no sign of life for 32 s and was last seen compiling graph 3 of 6; if it gives none, all ranks "
        "end in 68 s"
    )


def test_one_that_is_busy_may_take_its_time_and_one_that_is_not_may_not(monkeypatch: pytest.MonkeyPatch):
    now, store = [0.0], dist.HashStore()
    monkeypatch.setattr(peers.time, "monotonic", lambda: now[0])
    sign(store, 1, 1, "compiling", busy=True)
    patience, over = Patience(seen_by(0, store, 10.0), 1, 10.0), []
    for busy in (True, True, False, False):
        sign(store, 1, int(now[0]), busy=busy)
        now[0] += 8.0
        over.append(patience.is_over())
    assert over == [False, False, False, True]


def test_a_process_that_is_gone_is_known_at_once():
    store = dist.HashStore()
    sign(store, 1, 1, process=2**22 + 1)
    assert "rank 1 stopped" in str(seen_by(0, store, 300.0).stopped([1]))


def test_a_rank_that_loads_is_waited_for_beyond_the_limit_and_one_that_is_not_there_is_named():
    store = dist.HashStore()
    below = getattr(store, "underlying_store", store)
    life = liveness.Liveness(dist.PrefixStore(COMING, below), LIFE, 1)
    life.do("loading", busy=True)
    time.sleep(0.2)
    seat = Seat("cpu", "host", "gloo", "")
    begin = time.monotonic()

    def come() -> None:
        time.sleep(2.5)
        life.close()
        compare_seats(seat, store, 1, 2, 1.5)

    thread = threading.Thread(target=come)
    thread.start()
    compare_seats(seat, store, 0, 2, 1.5)
    thread.join()
    assert time.monotonic() - begin > 2.0
    with pytest.raises(AgreementError, match="rank 2 is not here: it did not come to parallelize within 0.3 s"):
        compare_seats(seat, dist.HashStore(), 0, 1, 0.3) or compare_seats(seat, _alone(), 0, 3, 0.3)


def _alone() -> dist.Store:
    """A store to which rank 1 has come, and rank 2 has not."""
    store = dist.HashStore()
    store.set("xdit_compile/seats/1/1", json.dumps({"device": "cpu", "card": "", "backend": "gloo", "problem": ""}))
    return store
