"""One line a request, for people or for machines: never what was asked or answered, nor keys, nor query strings."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone

from starlette.types import ASGIApp, Message, Receive, Scope, Send

log = logging.getLogger("ktcore.server.requests")
FORMATS = ("text", "json", "off")


class RequestLog:
    """Writes a line when a request's last byte is sent, or when its client has gone."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not log.isEnabledFor(logging.INFO):
            await self._app(scope, receive, send)
            return
        began = time.perf_counter()
        status = 0
        sent = 0

        async def counting(message: Message) -> None:
            nonlocal status, sent
            if message["type"] == "http.response.start":
                status = message["status"]
            sent += len(message.get("body", b""))
            await send(message)

        try:
            await self._app(scope, receive, counting)
        finally:
            fields = {
                "method": scope["method"],
                "path": scope["path"],
                "status": status,
                "seconds": round(time.perf_counter() - began, 4),
                "bytes": sent,
                "client": scope["client"][0] if scope.get("client") else "",
            }
            log.info("%s", fields["path"], extra={"request": fields})


class Lines(logging.Formatter):
    """A record as one line: its time, level and text, and of a request its fields.

    Args:
        as_json: an object a line; else words.
    """

    def __init__(self, as_json: bool) -> None:
        super().__init__()
        self._as_json = as_json

    def format(self, record: logging.LogRecord) -> str:
        when = datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds")
        fields = getattr(record, "request", None)
        if self._as_json:
            said = fields or {"logger": record.name, "message": record.getMessage()}
            trace = {"trace": self.formatException(record.exc_info)} if record.exc_info else {}
            return json.dumps({"time": when, "level": record.levelname.lower(), **said, **trace})
        if fields:
            # a path may hold any character: quoted, it stays on its line
            path = json.dumps(fields["path"])
            return f"{when} {fields['method']} {path} {fields['status']} {fields['seconds']:.3f}s {fields['client']}"
        line = f"{when} {record.levelname} {record.name}: {record.getMessage()}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


@contextmanager
def logging_to_stderr(kind: str) -> Iterator[None]:
    """Within the context, ktcore's records go to standard error as "text" or "json"; with "off" only warnings do.

    Where more is shown already (--verbose), they go there in this form, and only so.
    """
    root = logging.getLogger("ktcore")
    handler = logging.StreamHandler()
    handler.setFormatter(Lines(kind == "json"))
    before = root.level, root.propagate
    shown = logging.getLogger().getEffectiveLevel()
    root.addHandler(handler)
    root.setLevel(min(shown, logging.WARNING if kind == "off" else logging.INFO))
    root.propagate = shown > logging.INFO
    try:
        yield
    finally:
        root.removeHandler(handler)
        root.setLevel(before[0])
        root.propagate = before[1]
