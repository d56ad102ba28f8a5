"""HTTP to one server of ours: what is served, pictures and latents as they come about, giving up."""

from __future__ import annotations

import contextlib
import ipaddress
import json
import logging
import queue
import secrets
import threading
from collections.abc import Callable, Generator, Iterator, Mapping
from typing import Any

import httpx2

LOOK_S = 0.02
"""So often is asked whether the user interrupts, while nothing comes from the server."""
CONNECT_S, ANSWER_S, SILENCE_S = 10.0, 10.0, 60.0
"""A stream says something every 15 s, so a longer silence means that the server is lost."""
IDLE_S = 2.0
"""A connection that was not used for longer is not used again: the server closes its own after 5 s."""
MOST_BYTES = 1 << 30
"""Of one event."""


class Refused(RuntimeError):
    """The server's answer is an error; the message is the server's own line."""


class Lost(RuntimeError):
    """The server cannot be reached, or went away in the middle."""


class Client:
    """One server's client, for one thread at a time; its connection is kept.

    Args:
        address: such as ``http://127.0.0.1:8000``.
        key: that the server asks for, if any.

    Raises:
        ValueError: the address is none.
    """

    def __init__(self, address: str, key: str | None = None):
        try:
            url = httpx2.URL(address)
        except httpx2.InvalidURL:
            url = httpx2.URL("")
        if url.scheme not in ("http", "https") or not url.host:
            raise ValueError(f"{address!r} is no address of a server; give one like http://127.0.0.1:8000")
        self.address = address.rstrip("/").removesuffix("/v1")
        self._quiet = _Quiet(self.address)
        logging.getLogger("httpx2").addFilter(self._quiet)
        self._http = httpx2.Client(
            base_url=self.address, headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=httpx2.Timeout(ANSWER_S, connect=CONNECT_S), trust_env=not _is_here(url.host),
            limits=httpx2.Limits(keepalive_expiry=IDLE_S), verify=url.scheme == "https",
        )  # fmt: skip

    def close(self) -> None:
        """Close its connections."""
        logging.getLogger("httpx2").removeFilter(self._quiet)
        self._http.close()

    def health(self) -> str:
        """``starting``, ``ready``, ``draining`` or ``dead``; empty where nobody answers."""
        with contextlib.suppress(httpx2.TransportError, ValueError):
            return str(self._http.get("/health").json()["status"])
        return ""

    def facts(self) -> dict[str, Any]:
        """What is served: ``class``, ``makes``, ``takes``, ``size`` as height and width, ``steps``.

        Raises:
            Refused: the key is wrong.
            Lost: nobody answers, or somebody who is no such server.
        """
        with self._spoken():
            answer = self._http.get("/v1/models")
            _check(answer)
            try:
                facts: dict[str, Any] = answer.json()["data"][0]
            except (ValueError, LookupError, TypeError):
                facts = {}
        if "owned_by" not in facts:
            raise Lost(f"{self.address} is no server of xdit-compile")
        return facts

    def follow(
        self, path: str, fields: Mapping[str, Any], files: Mapping[str, bytes], look: Callable[[], None]
    ) -> Generator[dict[str, Any], None, None]:
        """Send a request, and give the events of its answer as they come; one that is given up is cancelled.

        Args:
            path: such as ``/v1/images/generations``.
            fields: of the request; those that are None are left out.
            files: by field; with any, the request is a form.
            look: called again and again; what it raises gives the request up.

        Yields:
            Events without their ``event:``, or the whole answer where it is no stream.

        Raises:
            Refused: the server's answer is an error.
            Lost: it cannot be reached, or goes away.
        """
        id = f"comfyui-{secrets.token_hex(8)}"
        events: queue.SimpleQueue[dict[str, Any] | Exception | None] = queue.SimpleQueue()
        sent = {name: value for name, value in fields.items() if value is not None}
        reader = threading.Thread(target=self._read, args=(path, id, sent, files, events), daemon=True)
        reader.start()
        ended = False
        try:
            while not ended:
                look()
                try:
                    event = events.get(timeout=LOOK_S)
                except queue.Empty:
                    continue
                ended = not isinstance(event, dict)
                if isinstance(event, Exception):
                    raise event
                if event is not None:
                    yield event
        finally:
            if not ended:
                self._cancel(id)

    def _read(
        self, path: str, id: str, fields: Mapping[str, Any], files: Mapping[str, bytes],
        events: queue.SimpleQueue[dict[str, Any] | Exception | None],
    ) -> None:  # fmt: skip
        """Put what a request is answered into a queue, and at the end None, or why there is no more."""
        try:
            with self._spoken(), self._http.stream("POST", path, **_body(fields, files, id)) as answer:
                if answer.headers.get("content-type", "").startswith("text/event-stream"):
                    for event in httpx2.EventSource(answer, MOST_BYTES):
                        said = json.loads(event.data)
                        if event.event == "error":
                            raise Refused(_line(said))
                        events.put(said)
                else:
                    answer.read()
                    _check(answer)
                    events.put(answer.json())
        except Exception as error:
            events.put(error)
        else:
            events.put(None)

    def _cancel(self, id: str) -> None:
        with contextlib.suppress(httpx2.HTTPError):
            self._http.delete(f"/v1/requests/{id}")

    @contextlib.contextmanager
    def _spoken(self) -> Iterator[None]:
        """Say in one line that the server is gone."""
        try:
            yield
        except (httpx2.TransportError, httpx2.SSEError) as error:
            why = " ".join(str(error).split()) or type(error).__name__
            raise Lost(f"the server at {self.address} cannot be reached or went away: {why}") from error


class _Quiet(logging.Filter):
    """Keeps a line for each request to one address out of ComfyUI's log."""

    def __init__(self, address: str):
        super().__init__()
        self._address = address

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether a line is logged."""
        return record.levelno > logging.INFO or self._address not in record.getMessage()


def _body(fields: Mapping[str, Any], files: Mapping[str, bytes], id: str) -> dict[str, Any]:
    """Arguments of a request: JSON, or a form where there are files."""
    common = {"headers": {"X-Request-Id": id}, "timeout": httpx2.Timeout(SILENCE_S, connect=CONNECT_S)}
    if not fields.get("stream"):
        common["timeout"] = httpx2.Timeout(None, connect=CONNECT_S)
    if not files:
        return {**common, "json": dict(fields)}
    texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in fields.items()}
    return {**common, "data": texts, "files": {name: (name, data) for name, data in files.items()}}


def _check(answer: httpx2.Response) -> None:
    """See that an answer is none of an error.

    Raises:
        Refused: it is.
    """
    if answer.is_success:
        return
    try:
        said = _line(answer.json())
    except ValueError:
        said = ""
    raise Refused(said or f"{answer.request.url} answers {answer.status_code} {answer.reason_phrase}")


def _line(body: Any) -> str:
    """The message of an error's body, as one line; empty where there is none."""
    error = body.get("error") if isinstance(body, dict) else None
    message = error.get("message") if isinstance(error, dict) else None
    return " ".join(str(message or "").split())


def _is_here(host: str) -> bool:
    """Whether a host is this machine, which no proxy is asked for."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"
