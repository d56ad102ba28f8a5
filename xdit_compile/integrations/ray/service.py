"""``xdit-compile serve --ray``: an application of Ray Serve that ends with the command."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import re
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.schema import ApplicationStatus

from xdit_compile.cache.folder import AUTO, resolve
from xdit_compile.cli.processes.ending import Interrupted
from xdit_compile.errors import UsageError, XditCompileError, one_line
from xdit_compile.serving.logs import show_logs
from xdit_compile.serving.queue.starters import free_port
from xdit_compile.serving.request import ServeRequest

from .app import HEAD, QUIET, Replicas, application
from .cluster import cluster
from .placing import Share, give_back, most_gangs, reserved

log = logging.getLogger(__name__)
NAME = "xdit-compile"
"""Of the application, in the cluster."""
LOOK_S = 0.5
GIVEN_UP_S = 5.0
"""The front says within so long that it has ended what was left."""
SEEN_S = 3.0
"""So often the command looks whether the service is still there, which takes the controller some milliseconds."""


class Job:
    """An actor that is there as long as the command."""

    async def last(self) -> None:
        """Never returns."""
        await asyncio.Event().wait()


def serve_on_ray(request: ServeRequest, address: str, replicas: Replicas, resources: str | None, wait_s: float) -> None:
    """Serve until SIGTERM or Ctrl-C; requests that are here then have `ServeRequest.drain` seconds to end.

    Args:
        address: of a cluster, or `cluster.HERE`.
        resources: what each rank takes of its machine, as ``GPU=1,CPU=4``.
        wait_s: for machines to join a cluster that is too small.

    Raises:
        UsageError: there is no such cluster, no room in it, or something else serves there.
        XditCompileError: the ranks cannot be started, or the service was ended by somebody else.
        Interrupted: a signal came before there was a service, or a second one.
    """
    show_logs(request)
    request = _from_anywhere(request)
    share = None if resources is None else Share.parsed(resources)
    with cluster(address, request.quiet) as is_ours, Ending().heeded() as ending:
        _check_free(request)
        share = share or Share.usual(request.device == "cpu")
        ranks = request.plan.world_size
        give_back(reserved(share, ranks, replicas.least, wait_s, ending.check))
        if (held := most_gangs(share, ranks)) < replicas.most:
            log.warning("the cluster has room for %d of up to %d gangs", held, replicas.most)
        where = _listening(request)
        try:
            _deploy(request, replicas, share, ending)
            print(f"serving {request.name} at http://{where}; Ctrl-C ends it", flush=True)
            _until_ended(ending.event)
            _drain(request.drain)
        finally:
            if not is_ours or ending.count < 2:
                serve.delete(NAME, _blocking=ending.count < 2)
            if not is_ours and not serve.status().applications:
                serve.shutdown()


def _from_anywhere(request: ServeRequest) -> ServeRequest:
    """The request with folders that mean the same whatever folder a process is in."""
    cache, model = request.plan.cache, request.model
    if cache != AUTO:
        folder = resolve(cache)
        plan = dataclasses.replace(request.plan, cache=None if folder is None else str(folder))
        request = dataclasses.replace(request, plan=plan)
    if model is not None and Path(model).is_dir():
        request = dataclasses.replace(request, model=str(Path(model).absolute()))
    return request


def _deploy(request: ServeRequest, replicas: Replicas, share: Share, ending: Ending) -> None:
    kind: Any = ray.remote(Job)
    job = kind.options(num_cpus=0, resources={HEAD: 0.001}).remote()
    app = application(request, replicas, share, job)
    failure: list[Exception] = []

    def run() -> None:
        try:
            serve.run(app, name=NAME, logging_config=QUIET)
        except Exception as error:  # noqa: BLE001 - it is raised where this is waited for
            failure.append(error)

    running = threading.Thread(target=run, name="deploy", daemon=True)
    running.start()
    while running.is_alive():
        running.join(LOOK_S)
        ending.check()
    if failure:
        raise XditCompileError(f"the service did not start: {_reason() or one_line(failure[0])}") from failure[0]


def _reason() -> str:
    """Why deployments do not run, as Serve has it."""
    application = serve.status().applications.get(NAME)
    said = [] if application is None else [each.message.strip() for each in application.deployments.values()]
    last = next((message.splitlines()[-1] for message in said if message), "")
    return re.sub(r"^[\w.]+(?:Error|Exception): ", "", " ".join(last.split()))


def _until_ended(ended: threading.Event) -> None:
    while not ended.wait(SEEN_S):
        application = serve.status().applications.get(NAME)
        if application is None or application.status == ApplicationStatus.DELETING:
            raise XditCompileError("somebody ended the service in the cluster")


def _drain(limit_s: float) -> None:
    """Return once the requests that are here have ended, or the time is over, which ends them."""
    try:
        serve.get_app_handle(NAME).stop.remote(limit_s).result(timeout_s=limit_s + GIVEN_UP_S)
    except (TimeoutError, RayError) as error:
        log.warning("the front did not say that all requests have ended: %s", one_line(error, 200))


def _running() -> Any:
    """Serve's client, where it runs in the cluster."""
    return serve.context._get_global_client(raise_if_no_controller_running=False)


def _check_free(request: ServeRequest) -> None:
    """See that the service can have its name and its address.

    Raises:
        UsageError: it cannot.
    """
    running = _running()
    if running is None:
        return
    if NAME in serve.status().applications:
        raise UsageError(f"the cluster has an application {NAME} already; end that, or take another cluster")
    options = running.http_config
    if (options.host, options.port) != (request.host, request.port):
        raise UsageError(
            f"Serve of this cluster listens at {options.host}:{options.port} and can listen at one address only: "
            f"give --host {options.host} --port {options.port}, or take another cluster"
        )


def _listening(request: ServeRequest) -> str:
    """Have Serve listen; where."""
    if _running() is not None:
        return f"{request.host}:{request.port}"
    port = request.port or free_port(request.host)
    serve.start(proxy_location="HeadOnly", http_options={"host": request.host, "port": port}, logging_config=QUIET)
    return f"{request.host}:{port}"


class Ending:
    """Signals that end the command: the first one once requests are answered, the next one at once.

    Attributes:
        event: set at the first one.
        count: how many came.
    """

    def __init__(self) -> None:
        self.event, self.count = threading.Event(), 0
        self._number = 0

    def check(self) -> None:
        """Go on, unless a signal came.

        Raises:
            Interrupted: one did.
        """
        if self.count:
            raise Interrupted(self._number)

    @contextlib.contextmanager
    def heeded(self) -> Iterator[Ending]:
        """Have signals come here meanwhile."""
        numbers = (signal.SIGINT, signal.SIGTERM)
        before = [signal.getsignal(number) for number in numbers]
        for number in numbers:
            signal.signal(number, self._come)
        try:
            yield self
        finally:
            for number, handler in zip(numbers, before, strict=True):
                signal.signal(number, handler)

    def _come(self, number: int, frame: object) -> None:
        self._number, self.count = number, self.count + 1
        self.event.set()
        if self.count > 1:
            raise Interrupted(number)
