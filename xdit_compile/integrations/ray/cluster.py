"""The cluster: joined where there is one, else started on this machine."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import sys
from collections.abc import Iterator

import ray

from xdit_compile.errors import UsageError, one_line

HERE = ""
"""In place of an address: the cluster of this machine, which is started where there is none."""
REACH_S = 5.0


@contextlib.contextmanager
def cluster(address: str, quiet: bool) -> Iterator[bool]:
    """Be part of a cluster meanwhile; whether it was started here, and ends with this.

    Args:
        address: of a cluster, as ``ray start`` says it; or `HERE`, where ``RAY_ADDRESS`` counts, too.
        quiet: do not show what its processes print.

    Raises:
        UsageError: there is none at the address, or it has another release of Ray or Python.
    """
    if ray.is_initialized():
        yield False
        return
    is_ours = _connected(address or os.environ.get("RAY_ADDRESS") or "auto", not quiet, address == HERE)
    try:
        yield is_ours
    finally:
        ray.shutdown()


def _connected(address: str, shows: bool, may_start: bool) -> bool:
    """Join a cluster, or start one; whether it was started."""
    if not sys.stderr.isatty():
        os.environ.setdefault("RAY_COLOR_PREFIX", "0")
    for name in ("ray", "ray.serve"):
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        if address != "auto":
            _check_reachable(address)
        ray.init(address=address, log_to_driver=shows, logging_level=logging.ERROR)
        return False
    except (ConnectionError, ValueError) as error:
        if address != "auto" or not may_start:
            raise UsageError(f"there is no cluster of Ray at {address}: {one_line(error, 200)}") from error
    except RuntimeError as error:
        raise UsageError(f"the cluster of Ray at {address} cannot be joined: {one_line(error, 300)}") from error
    ray.init(address="local", log_to_driver=shows, logging_level=logging.ERROR, include_dashboard=False)
    return True


def _check_reachable(address: str) -> None:
    """See that somebody listens, which Ray itself takes a minute to find out."""
    host, _, port = address.rpartition(":")
    if not host or "://" in address or not port.isdigit():
        raise UsageError(f"{address} is no address of a cluster; give HOST:PORT, as ray start says it")
    try:
        socket.create_connection((host.strip("[]"), int(port)), REACH_S).close()
    except OSError as error:
        raise UsageError(f"there is no cluster of Ray at {address}: {one_line(error)}") from error
