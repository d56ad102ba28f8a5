"""The page at /docs: every field, to be tried, by Swagger UI as it is installed here; nothing comes from elsewhere."""

from __future__ import annotations

from importlib import resources
from typing import Any

from fastapi import APIRouter, Response, Security
from fastapi.responses import HTMLResponse
from fastapi.security import HTTPBearer

FOLDER = "/docs/"
_FILES = {"swagger-ui.css": "text/css", "swagger-ui-bundle.js": "text/javascript", "favicon.png": "image/png"}
_START = 'SwaggerUIBundle({url: "openapi.json", dom_id: "#fields", deepLinking: true, validatorUrl: null});'
PAGE = f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>xdit-compile: every field</title>
<link rel="stylesheet" href="docs/swagger-ui.css">
<link rel="icon" href="docs/favicon.png">
</head>
<body>
<div id="fields"></div>
<script src="docs/swagger-ui-bundle.js"></script>
<script>{_START}</script>
</body>
</html>
"""


def docs_routes(policy: str) -> APIRouter:
    """``/docs`` and what it is made of.

    Args:
        policy: what a browser lets the page do.
    """
    router = APIRouter(include_in_schema=False)
    static = resources.files("fastapi_offline").joinpath("static")

    @router.get("/docs")
    async def docs() -> HTMLResponse:
        return HTMLResponse(PAGE, headers={"Content-Security-Policy": policy, "Referrer-Policy": "no-referrer"})

    def served(name: str, type: str) -> None:
        data = static.joinpath(name).read_bytes()

        @router.get(FOLDER + name)
        async def file() -> Response:
            return Response(data, media_type=type, headers={"Cache-Control": "max-age=3600"})

    for name, type in _FILES.items():
        served(name, type)
    return router


def with_key(wanted: bool) -> list[Any]:
    """What has the documentation say that routes take a key, where they do; the guard has looked at it by then."""
    said = "what the server was started with: --api_key_file, or XDIT_COMPILE_API_KEY"
    return [Security(HTTPBearer(auto_error=False, scheme_name="key", description=said))] if wanted else []
