"""A server whose ranks a launcher started: torchrun twice, as on two machines."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.serving.test_serve import STEPS, Server, alone

pytestmark = pytest.mark.slow


def launched(node: int, port: int, folder: Path, *flags: str) -> subprocess.Popen[str]:
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1", "--node_rank",
        str(node), "--master_addr", "127.0.0.1", "--master_port", str(port), "-m", "xdit_compile", "serve",
        "--port", "0", "--backend", "eager", *flags,
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "XDIT_COMPILE_CACHE": str(folder / "cache")}
    with open(folder / f"log{node}", "w") as log:
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment)


@pytest.mark.parametrize("ends", ["SIGTERM", "a lost rank"])
def test_ranks_of_two_launchers_serve(tmp_path: Path, ends: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    nodes = [launched(node, port, tmp_path, "--ulysses_degree", "2") for node in range(2)]
    try:
        assert nodes[0].stdout is not None
        found = re.search(r"http://[\d.:]+", nodes[0].stdout.readline())
        assert found is not None, (tmp_path / "log0").read_text()
        server = Server(nodes[0], found[0])
        server.wait_ready()
        assert abs(server.picture(seed=1) - alone("a red circle", 1, STEPS)).max() <= 1
        front, other = (psutil.Process(node.pid).children()[0] for node in nodes)
        began = {process.pid for process in (front, other, *front.children())}
        if ends == "SIGTERM":
            nodes[0].send_signal(signal.SIGTERM)
        else:
            other.kill()
        for node in nodes:
            assert node.wait(90) != 0 or node is nodes[1]
        limit = time.monotonic() + 30
        while any(psutil.pid_exists(pid) for pid in began):
            assert time.monotonic() < limit
            time.sleep(0.1)
        said = (tmp_path / "log0").read_text()
        assert (
            ends == "SIGTERM"
            or "the ranks were lost, and whoever launched them has to start all processes anew" in said
        )
    finally:
        for node in nodes:
            for process in [*psutil.Process(node.pid).children(recursive=True)] if node.poll() is None else []:
                process.kill()
            node.kill()
            node.wait()


def test_changing_plans_are_refused(tmp_path: Path) -> None:
    environment = {**os.environ, "RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
    flags = ("--plan", "latency=ulysses:2", "--plan", "throughput=replicas:2")
    command = [sys.executable, "-m", "xdit_compile", "serve", *flags]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2 and "--plan changes plans on one machine" in done.stderr
