"""A server whose plan changes: what may be asked for, and real ranks that are arranged anew."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.serving.test_serve import STEPS, alone, serving
from xdit_compile import Plan
from xdit_compile.errors import UsageError
from xdit_compile.serving.queue.arrangements import Arrangement, arrangements_of

TWO = ("--plan", "latency=ulysses:2", "--plan", "throughput=replicas:2")


def test_arrangements_are_read() -> None:
    base = Plan(backend="eager")
    assert arrangements_of(base, ()) == (Arrangement(base),)
    idle, busy = arrangements_of(base, ["throughput=replicas:2, ring:2", "latency=ulysses:2,ring:2"])
    assert idle == Arrangement(Plan(backend="eager", ulysses=2, ring=2), 1, "latency")
    assert busy == Arrangement(Plan(backend="eager", ring=2), 2, "throughput")
    assert (idle.words, busy.words) == ("latency: ulysses=2, ring=2", "throughput: replicas=2, ring=2")


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        (["latency=ulysses:2"], "--plan throughput=... is missing"),
        (["latency=ulysses:2", "latency=ring:2"], "--plan latency is given twice"),
        (["fast=ulysses:2", "throughput=replicas:2"], "give latency=METHOD:N,... and throughput=replicas:N,..."),
        (["latency=ulyses:2", "throughput=replicas:2"], "did you mean ulysses?"),
        (["latency=ulysses", "throughput=replicas:2"], "'ulysses' is no degree; write METHOD:N, as ulysses:2"),
        (["latency=ulysses:0", "throughput=replicas:2"], "'ulysses:0' is no degree"),
        (["latency=tensor:2", "throughput=replicas:2"], "leave out --plan and serve with tensor alone"),
        (["latency=ulysses:2", "throughput=pipefusion:2"], "under pipefusion a rank holds a part of the weights"),
        (["latency=replicas:2", "throughput=replicas:2"], "replicas are for --plan throughput"),
        (["latency=ulysses:2", "throughput=replicas:3"], "has 2 ranks and --plan throughput 3"),
        (["latency=ulysses:2,ulysses:2", "throughput=replicas:4"], "ulysses is given twice"),
    ],
)
def test_what_cannot_be_arranged_is_refused(texts: list[str], said: str) -> None:
    with pytest.raises(UsageError) as refused:
        arrangements_of(Plan(), texts)
    assert said in str(refused.value)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (TWO, "--plan needs 2 processes; give --nproc 2"),
        ((*TWO, "--nproc", "4"), "--plan needs 2 processes; give --nproc 2"),
        ((*TWO, "--nproc", "2", "--ring_degree", "2"), "--plan takes the place of other degrees"),
    ],
)
def test_the_command_refuses_it_at_once(flags: tuple[str, ...], said: str) -> None:
    command = [sys.executable, "-m", "xdit_compile", "serve", "--port", "0", *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2 and done.stdout == "" and said in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.slow
def test_ranks_are_arranged_for_one_request_and_for_a_queue(tmp_path: Path) -> None:
    """Pictures are those of the pipeline under both; a lost rank takes along only what its own gang was at work on."""
    with serving(tmp_path, *TWO) as server:

        def status() -> dict:
            return json.loads(server.get("/v1/status")[1])

        expected = {seed: alone("a red circle", seed, STEPS) for seed in range(1, 5)}
        for shifts in (0, 2):
            assert abs(server.picture(seed=1) - expected[1]).max() <= 1
            assert (status()["plan"], status()["shifts"]) == ("latency: ulysses=2", shifts)
            with ThreadPoolExecutor(4) as clients:
                made = list(clients.map(lambda seed: server.picture(seed=seed), expected))
                seen = status()
            assert max(abs(one - other).max() for one, other in zip(made, expected.values(), strict=True)) <= 1
            assert (seen["plan"], seen["shifts"]) == ("throughput: replicas=2", shifts + 1)
            _until(lambda shifts=shifts: status()["shifts"] == shifts + 2)
        assert [rank["rank"] for rank in status()["ranks"]] == [0, 1]
        with ThreadPoolExecutor(3) as clients:
            begun = [clients.submit(server.send, seed=seed, num_inference_steps=40) for seed in (1, 2, 3)]
            _until(lambda: status()["plan"].startswith("throughput") and len(status()["running"]) == 2)
            time.sleep(0.5)
            os.kill(server.ranks()[1].pid, signal.SIGKILL)
            answers = sorted(each.result()[0] for each in begun)
        assert answers == [200, 200, 500]
        assert abs(server.picture(seed=1) - expected[1]).max() <= 1
        assert status()["restarts"] == 1


def _until(holds) -> None:
    limit = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < limit
        time.sleep(0.02)
