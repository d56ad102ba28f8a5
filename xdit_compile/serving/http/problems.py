"""What is said to a client whose request is not answered: always in the form of OpenAI's errors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from xdit_compile.plan.nearest import did_you_mean

from ..queue.desk import Full, NotReady
from ..queue.tickets import Event
from .schemas import ImageRequest

NOT_AGAIN = {"x-should-retry": "false"}
"""OpenAI's client sends a request again after errors of the server, unless it is told not to."""
_CODES = {
    400: "bad_request", 401: "invalid_api_key", 403: "forbidden", 404: "not_found", 405: "method_not_allowed",
    408: "body_timeout", 413: "too_large", 415: "unsupported_media_type", 429: "queue_full", 499: "cancelled",
    500: "internal_error", 503: "not_ready", 504: "deadline_passed", 507: "insufficient_memory",
}  # fmt: skip
_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
_SHOWN = 200
"""Characters of what a client sent that are said back to it."""


class Problem(HTTPException):
    """A request that is not answered.

    Args:
        status: of HTTP.
        message: one line that says what to change.
        param: the field that is wrong.
        code: a word for programs; follows from ``status`` where None.
        headers: further ones.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(status, message, dict(headers or {}))
        self.param, self.code = param, code

    @property
    def body(self) -> dict[str, Any]:
        """As OpenAI's errors are."""
        return error_body(self.status_code, self.detail, self.param, self.code)

    @property
    def response(self) -> JSONResponse:
        """The answer."""
        return JSONResponse(self.body, self.status_code, self.headers)


def error_body(status: int, message: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """An error as OpenAI's clients read them."""
    kind = _TYPES.get(status) or ("invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code or _CODES.get(status)}}


def handle_problems(app: FastAPI) -> None:
    """Have everything that an app refuses, or that no route is for, answered in this form."""

    async def of_http(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        if isinstance(error, Problem):
            return error.response
        path, takes = request.url.path[:_SHOWN], (error.headers or {}).get("Allow", "another method")
        words = {404: f"there is nothing at {path}", 405: f"{path} takes {takes}, not {request.method}"}
        said = words.get(error.status_code, str(error.detail))
        return JSONResponse(error_body(error.status_code, said), error.status_code, error.headers)

    async def of_fields(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        return problem_of_fields(error.errors(), ImageRequest.model_fields).response

    app.add_exception_handler(HTTPException, of_http)
    app.add_exception_handler(RequestValidationError, of_fields)


def problem_of_fields(errors: Any, known: Any) -> Problem:
    """What pydantic has against a request's fields, as one line.

    Args:
        errors: as `pydantic.ValidationError.errors` has them.
        known: names of fields, of which the nearest are said.
    """
    said, params = [], []
    for each in errors[:5]:
        place = [str(step) for step in each["loc"] if step not in ("body", "query", "path")]
        name = ".".join(place)[:_SHOWN]
        params.append(name)
        if each["type"] == "extra_forbidden":
            said.append(f"{name} is no field of this request{did_you_mean(name, known)}")
        elif each["type"] == "json_invalid":
            return Problem(400, f"the body is no JSON: {each.get('ctx', {}).get('error', 'it ends early')}")
        elif each["type"] == "missing":
            said.append(f"{name or 'the body'} is missing")
        else:
            said.append(f"{name or 'the body'}: {each['msg'].removeprefix('Value error, ')}")
    return Problem(400, "; ".join(said), params[0] or None, "invalid_value")


def problem_of_queue(error: Full | NotReady) -> Problem:
    """What is said where the engine takes no request."""
    if isinstance(error, Full):
        return Problem(429, str(error), headers={"Retry-After": str(error.retry_after)})
    return Problem(503, str(error), headers={"Retry-After": "5"})


def problem_of_end(event: Event) -> Problem:
    """What is said of a request that ended without a picture."""
    if event.kind == "late":
        return Problem(504, event.error or "its deadline passed", "deadline", headers=NOT_AGAIN)
    if event.kind == "cancelled":
        return Problem(499, "the request was cancelled", headers=NOT_AGAIN)
    if event.is_input:
        return Problem(400, event.error or "the pipeline refused its arguments", code="invalid_value")
    return Problem(500, event.error or "the request failed", headers=NOT_AGAIN)
