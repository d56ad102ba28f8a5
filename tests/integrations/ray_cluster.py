"""Clusters of Ray on this machine: several nodes, each with processes of its own, as Ray's own tests have them."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ray.cluster_utils import Cluster

from benchmarks.serving_client import Server

READY_S = 240


class Service(Server):
    """A service on a cluster, which `xdit-compile serve --ray` started."""

    ready_s, get_s, answer_s = READY_S, 20, 240


@contextlib.contextmanager
def cluster_of(*processors: float) -> Iterator[tuple[Cluster, list[Any]]]:
    """A cluster of a head without processors, and nodes with some each."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        nodes = [cluster.add_node(num_cpus=count) for count in processors]
        cluster.wait_for_nodes()
        yield cluster, nodes
    finally:
        cluster.shutdown()


@contextlib.contextmanager
def serving_on(address: str, folder: Path, *flags: str) -> Iterator[Service]:
    """A service of gangs of two ranks, which ends with the context."""
    command = [sys.executable, "-m", "xdit_compile", "serve", "--ray", address, "--port", "0", "--backend", "eager",
               "--ulysses_degree", "2", *flags]  # fmt: skip
    with open(folder / "log", "w") as log:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=log, text=True,
            env={**os.environ, "XDIT_COMPILE_CACHE": str(folder / "cache")},
        )  # fmt: skip
        try:
            assert process.stdout is not None
            address_line = re.search(r"http://[\d.:]+", process.stdout.readline())
            assert address_line, (folder / "log").read_text()
            server = Service(process, address_line[0])
            server.wait_ready()
            yield server
        finally:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
