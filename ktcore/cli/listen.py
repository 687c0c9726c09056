"""Where `ktcore serve` listens: its port is taken before a model is loaded, its address told once it answers there."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ktcore.errors import RequestError

if TYPE_CHECKING:
    from fastapi import FastAPI

_TURN_S = 1e-4
"""How long the thread that computes waits for that which writes answers, at most: it needs the interpreter for a few
microseconds between its native calls, and would wait for 5 ms (Python's own figure) each time."""
_ANYWHERE = {"0.0.0.0": "127.0.0.1", "::": "::1"}


@dataclass(frozen=True)
class Door:
    """Where a server listens, and who may come in.

    Attributes:
        keyed: requests need an API key.
        tls: what uvicorn takes of certificates; empty for plain HTTP.
        drain: seconds for answers under way when it is to stop.
    """

    host: str
    port: int
    keyed: bool = False
    tls: dict[str, str] = field(default_factory=dict)
    drain: int = 30

    @property
    def url(self) -> str:
        """The address that a browser on this machine reaches."""
        host = self.host.strip("[]")
        host = _ANYWHERE.get(host, host)
        return f"{'https' if self.tls else 'http'}://{f'[{host}]' if ':' in host else host}:{self.port}"


@contextmanager
def bound(door: Door) -> Iterator[list[socket.socket]]:
    """Sockets that have the door's address and do not listen yet, one for each that its name stands for.

    Raises:
        RequestError: the port is taken or may not be opened, or the host is no address of this machine.
    """
    try:
        found = socket.getaddrinfo(door.host.strip("[]"), door.port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise _unusable(door, error) from error
    with ExitStack() as stack:
        sockets: list[socket.socket] = []
        refused: OSError | None = None
        for family, kind, protocol, _, address in dict.fromkeys(found):
            made = stack.enter_context(socket.socket(family, kind, protocol))
            # a port whose last server's connections are not forgotten yet may be taken again; in use it may not
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            try:
                made.bind(address)
            except OSError as error:
                # a name like localhost may stand for an address that this machine has not
                if error.errno != errno.EADDRNOTAVAIL:
                    raise _unusable(door, error) from error
                refused = error
                continue
            sockets.append(made)
        if not sockets:
            raise _unusable(door, refused or OSError(errno.EADDRNOTAVAIL, "no address"))
        yield sockets


def listen(app: FastAPI, sockets: list[socket.socket], door: Door) -> None:
    """Until Ctrl-C or SIGTERM; then no more requests are taken, and those under way get their time.

    Raises:
        RequestError: somebody else listens there since.
        KeyboardInterrupt: Ctrl-C ended it.
        SystemExit: SIGTERM did (0), or it could not begin.
    """
    import uvicorn

    from ktcore.server.http.memory import freeze

    class Server(uvicorn.Server):
        """Tells its address when it listens."""

        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets=sockets)
            if self.started:
                _tell(door)

    def ended(number: int, frame: object) -> None:
        raise SystemExit(0)

    config = uvicorn.Config(
        app,
        host=door.host,
        port=door.port,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=door.drain,
        **door.tls,  # type: ignore[arg-type]
    )
    server = Server(config)
    told = logging.getLogger("uvicorn.error")
    told.addFilter(_not_cancelled)
    # uvicorn drains on SIGTERM, then raises it again for the handler that was there before
    before = signal.signal(signal.SIGTERM, ended)
    turn = sys.getswitchinterval()
    sys.setswitchinterval(_TURN_S)
    freeze()
    try:
        server.run(sockets=sockets)
    except OSError as error:
        if server.started:
            raise
        raise _unusable(door, error) from error
    finally:
        signal.signal(signal.SIGTERM, before)
        sys.setswitchinterval(turn)
        told.removeFilter(_not_cancelled)
    if not server.started:
        sys.exit(1)


def _not_cancelled(record: logging.LogRecord) -> bool:
    """Not of answers that end because the server does: a second Ctrl-C, or the end of their time, is no fault."""
    error = record.exc_info[1] if record.exc_info else None
    return not (isinstance(error, asyncio.CancelledError) or record.getMessage().rstrip().endswith("CancelledError"))


def _tell(door: Door) -> None:
    from ktcore.cli.terminal import note

    keys = "with API keys" if door.keyed else "without API keys"
    note(f"serving on {door.url}/v1, {keys}; a page to chat in: {door.url}/; Ctrl-C stops it")


def _unusable(door: Door, error: Exception) -> RequestError:
    """What is wrong with an address, and what to do."""
    code = getattr(error, "errno", None)
    where = f"port {door.port} of {door.host}"
    if code == errno.EADDRINUSE:
        return RequestError(f"{where} is taken: another program listens there", "give another with --port, or end it")
    if code in (errno.EACCES, errno.EPERM):
        return RequestError(
            f"{where} may not be opened by this user",
            "ports below 1024 often need rights: give another with --port, like 8000",
        )
    why = os.strerror(code) if code == errno.EADDRNOTAVAIL else getattr(error, "strerror", None) or str(error)
    return RequestError(
        f"{door.host} is no address that this machine can listen on: {why}",
        "give --host 127.0.0.1 for this machine alone, 0.0.0.0 for all of its addresses",
    )
