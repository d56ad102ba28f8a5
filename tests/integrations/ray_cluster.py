"""Clusters of Ray on this machine: several nodes, each with processes of its own, as Ray's own tests have them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from ray.cluster_utils import Cluster

from benchmarks.serving_client import Server, serving

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


def serving_on(address: str, folder: Path, *flags: str) -> AbstractContextManager[Service]:
    """A service of gangs of two ranks, which ends with the context."""
    common = ("--ray", address, "--backend", "eager", "--ulysses_degree", "2")
    return serving((*common, *flags), folder / "log", Service, {"XDIT_COMPILE_CACHE": str(folder / "cache")})
