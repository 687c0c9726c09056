"""The gate before every route: API keys, the Host header of servers without keys, and the size of bodies."""

from __future__ import annotations

import base64
import binascii

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ktcore.server.http.errors import Problem
from ktcore.server.http.settings import Settings, is_loopback

OPEN = "/health"
PAGE = "/"


class Guard:
    """Lets a request through, with its body read, or answers 401, 403 or 413 itself.

    Without keys only requests to a loopback name pass: a page in a browser could otherwise reach the server under a
    name of its own that resolves to this machine. For the like reason other sites' pages are refused by their Origin.
    """

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app = app
        self._settings = settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        problem = self._refusal(scope)
        body = b""
        if problem is None:
            body, problem = await self._read(scope, receive)
        if problem is not None:
            response = problem.response(scope["path"])
            if problem.status == 401 and scope["path"] == PAGE:
                # the browser asks for user and password then, and sends them along with what the page asks for
                response.headers["WWW-Authenticate"] = 'Basic realm="ktcore: the API key is the password"'
            await response(scope, receive, send)
            return
        await self._app(scope, _replaying(body, receive), send)

    def _refusal(self, scope: Scope) -> Problem | None:
        if scope["path"] == OPEN:
            return None
        headers = dict(scope["headers"])
        if not self._settings.keys:
            site = headers.get(b"origin", b"").decode("latin-1")
            called = [headers.get(b"host", b"").decode("latin-1")]
            if site and site not in self._settings.origins:
                called.append(site.partition("://")[2])
            if all(is_loopback(_name(host)) for host in called):
                return None
            return Problem(403, "this server answers to loopback names alone; give it API keys to be reached otherwise")
        scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
        if scheme.lower() == b"bearer" and self._settings.keys.admit(given.strip()):
            return None
        if scheme.lower() == b"basic" and self._settings.keys.admit(_password(given)):
            # a browser sends these by itself, so a page of another site could make it ask
            return None if _same_origin(headers) else Problem(403, "another site's page may not ask with this key")
        return Problem(401, "no valid API key was given: send Authorization: Bearer KEY", code="invalid_api_key")

    async def _read(self, scope: Scope, receive: Receive) -> tuple[bytes, Problem | None]:
        limit = self._settings.max_body
        too_large = Problem(413, f"the request is larger than {limit} bytes", code="request_too_large")
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if declared.isdigit() and int(declared[:20]) > limit:
            return b"", too_large
        parts: list[bytes] = []
        size = 0
        more = True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                break
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > limit:
                return b"", too_large
            more = message.get("more_body", False)
        return b"".join(parts), None


def _password(credentials: bytes) -> bytes:
    """The password of HTTP basic authentication (RFC 7617); empty where there is none."""
    try:
        return base64.b64decode(credentials.strip(), validate=True).partition(b":")[2]
    except binascii.Error:
        return b""


def _same_origin(headers: dict[bytes, bytes]) -> bool:
    """Whether a request comes from a page of this very server, or from no page."""
    origin = headers.get(b"origin")
    return origin is None or origin.partition(b"://")[2] == headers.get(b"host", b"")


def _name(host: str) -> str:
    """A host without its port."""
    bracketed, closed, _ = host.partition("]")
    return bracketed if closed else host.split(":")[0]


def _replaying(body: bytes, receive: Receive) -> Receive:
    given = False

    async def again() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again
