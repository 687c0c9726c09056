"""Serves the page's files with headers that let it load and reach nothing but this server."""

from __future__ import annotations

from importlib.resources import files

from fastapi import APIRouter
from starlette.responses import Response

TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def page_routes() -> APIRouter:
    """`/` and the files that it asks for, each by its own name: there is no path to wander off on."""
    router = APIRouter(include_in_schema=False)
    for item in files("ktcore.server.page").joinpath("static").iterdir():
        _add(router, "/" if item.name == "index.html" else f"/page/{item.name}", item.name, item.read_bytes())
    return router


def _add(router: APIRouter, path: str, name: str, content: bytes) -> None:
    kind = TYPES[name.rpartition(".")[2]]

    async def file() -> Response:
        return Response(content, media_type=f"{kind}; charset=utf-8", headers=HEADERS)

    router.add_api_route(path, file, methods=["GET", "HEAD"])
