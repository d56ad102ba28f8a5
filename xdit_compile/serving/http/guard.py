"""What every request passes first: its id, the key, whose page it is from, how large it is; and what the log says."""

from __future__ import annotations

import asyncio
import dataclasses
import hmac
import logging
import re
import secrets
import time

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .docs import FOLDER
from .metrics import Metrics
from .problems import NOT_AGAIN, Problem
from .settings import Settings

log = logging.getLogger(__name__)
OPEN = ("/", "/health", "/health/live", "/health/ready", "/docs", "/openapi.json")
"""Paths that need no key."""
OPEN_FOLDERS = ("/v1/files/", FOLDER)
"""The same; files that were made are named so that they cannot be guessed."""
_ID = re.compile(r"[A-Za-z0-9._-]{1,100}")


@dataclasses.dataclass(frozen=True)
class Guard:
    """Stands before an app.

    Args:
        app: what comes next.
        settings: key, origins and limits.
        metrics: where answers are counted.
    """

    app: ASGIApp
    settings: Settings
    metrics: Metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI wants it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers, started = Headers(scope=scope), time.monotonic()
        id = headers.get("x-request-id", "")
        id = id if _ID.fullmatch(id) else f"req_{secrets.token_hex(12)}"
        scope.setdefault("state", {})["request_id"] = id
        statuses: list[int] = []
        body = _Body(receive, self._most(headers), started + self.settings.limits.body_s)

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                statuses.append(message["status"])
                extra = MutableHeaders(scope=message)
                extra["X-Request-Id"] = id
                extra.setdefault("X-Content-Type-Options", "nosniff")
            await send(message)

        try:
            self._admit(scope, headers)
            await self.app(scope, body.receive, answer)
        except Problem as problem:
            if not statuses:
                await problem.response(scope, receive, answer)
        except ClientDisconnect:
            pass
        except Exception:
            log.exception("the server failed", extra={"request_id": id})
            if not statuses:
                message = f"the server failed; its log says more of request {id}"
                await Problem(500, message, headers=NOT_AGAIN).response(scope, receive, answer)
        finally:
            self._told(scope, id, statuses[0] if statuses else 499, time.monotonic() - started)

    def _admit(self, scope: Scope, headers: Headers) -> None:
        """See whether a request may go on.

        Raises:
            Problem: it may not.
        """
        settings, path = self.settings, scope["path"]
        origin = headers.get("origin")
        if origin and scope["method"] not in ("GET", "HEAD") and not self._is_known(origin, headers):
            raise Problem(403, "another site's page may not ask for this", code="origin")
        is_open = path in OPEN or path.startswith(OPEN_FOLDERS)
        if settings.api_key is not None and not is_open:
            scheme, _, key = headers.get("authorization", "").partition(" ")
            is_right = hmac.compare_digest(key.strip().encode(), settings.api_key.encode())
            if scheme.lower() != "bearer" or not is_right:
                message = "the API key is wrong or missing; send it as Authorization: Bearer KEY"
                raise Problem(401, message, headers={"WWW-Authenticate": "Bearer"})
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length[:18]) > self._most(headers):
            raise _too_large(self._most(headers))

    def _is_known(self, origin: str, headers: Headers) -> bool:
        origins = self.settings.cors_origins
        return "*" in origins or origin in origins or origin.partition("://")[2] == headers.get("host")

    def _most(self, headers: Headers) -> int:
        is_form = headers.get("content-type", "").lower().startswith("multipart/")
        return self.settings.limits.form_bytes if is_form else self.settings.limits.json_bytes

    def _told(self, scope: Scope, id: str, status: int, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", "") or ("none" if status == 404 else "refused")
        self.metrics.answered(route, status)
        level = logging.DEBUG if route.startswith("/health") or route == "/metrics" else logging.INFO
        about = {"request_id": id, "method": scope["method"], "path": scope["path"], "status": status}
        extra = {**about, "seconds": round(seconds, 4)}
        log.log(level, "%s %s %d in %.3f s", scope["method"], scope["path"], status, seconds, extra=extra)


class _Body:
    """Receives a request's body, which has to be neither too large nor too slow.

    Args:
        receive: as ASGI has it.
        most: bytes.
        limit: on `time.monotonic`'s clock.
    """

    def __init__(self, receive: Receive, most: int, limit: float):
        self._receive, self._most, self._limit = receive, most, limit
        self._bytes, self._is_whole = 0, False

    async def receive(self) -> Message:
        """The next message.

        Raises:
            Problem: the body is too large, or does not come in time.
        """
        if self._is_whole:
            return await self._receive()
        try:
            message = await asyncio.wait_for(self._receive(), max(0.0, self._limit - time.monotonic()))
        except TimeoutError:
            raise Problem(408, "the body did not come in time", headers={"Connection": "close"}) from None
        self._bytes += len(message.get("body", b""))
        self._is_whole = not message.get("more_body", False)
        if self._bytes > self._most:
            raise _too_large(self._most)
        return message


def _too_large(most: int) -> Problem:
    return Problem(413, f"the body has more than {most} bytes")
