"""Where `ktcore serve` listens: what is wrong with an address is said before a model is loaded."""

from __future__ import annotations

import asyncio
import errno
import logging
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("uvicorn", reason="needs the extra `server`")
pytest.importorskip("fastapi", reason="needs the extra `server`")

from ktcore.cli.listen import Door, bound, listen
from ktcore.errors import RequestError


@pytest.fixture
def taken() -> Iterator[int]:
    """A port on which somebody listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        yield port


@pytest.fixture
def _no_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*words: Any, **options: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("ktcore.engine.model.load", load)
    monkeypatch.setattr("ktcore.server.models.facts.planned_facts", load)


@pytest.mark.usefixtures("_no_loading")
def test_a_taken_port_is_noticed_before_the_model_is_loaded(
    fails: Callable[..., str], tiny_llama: Path, tmp_path: Path, taken: int
) -> None:
    said = fails("serve", tiny_llama, "--port", taken)
    assert f"port {taken} of 127.0.0.1 is taken" in said
    assert "--port" in said
    file = tmp_path / "serve.yaml"
    file.write_text(f"port: {taken}\nmodels:\n  tiny: {{path: {tiny_llama}}}\n")
    assert f"port {taken} of 127.0.0.1 is taken" in fails("serve", "--config", file)


@pytest.mark.usefixtures("_no_loading")
@pytest.mark.parametrize("host", ["192.0.2.1", "no such host", "x" * 70])
def test_a_host_that_is_none_of_this_machines(
    fails: Callable[..., str], tiny_llama: Path, host: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KTCORE_API_KEY", "k")
    said = fails("serve", tiny_llama, "--host", host, "--port", 18123)
    assert f"{host} is no address that this machine can listen on" in said
    assert "127.0.0.1" in said


def test_a_port_that_needs_rights(monkeypatch: pytest.MonkeyPatch) -> None:
    def bind(self: socket.socket, address: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(socket.socket, "bind", bind)
    with pytest.raises(RequestError, match=r"port 80 of 127\.0\.0\.1 may not be opened by this user") as caught:
        bound(Door("127.0.0.1", 80)).__enter__()
    assert "8000" in caught.value.hint


def test_a_port_is_held_and_given_back() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    for _ in range(2):
        with bound(Door("localhost", port)) as sockets:
            assert {made.getsockname()[1] for made in sockets} == {port}
            assert len({made.family for made in sockets}) == len(sockets)
            # bound, and nobody is answered yet
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection(("127.0.0.1", port), 1)


def test_a_name_counts_although_one_of_its_addresses_is_not_here(monkeypatch: pytest.MonkeyPatch) -> None:
    here = (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", 0))
    gone = (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("192.0.2.1", 0))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *words, **options: [gone, here, here])
    with bound(Door("two", 0)) as sockets:
        assert [made.getsockname()[0] for made in sockets] == ["127.0.0.1"]


def test_somebody_who_listens_in_between_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None: ...

    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    door = Door("127.0.0.1", port)
    another = socket.create_server
    with bound(door) as sockets, another(("127.0.0.1", port)), pytest.raises(RequestError, match="is taken"):
        listen(app, sockets, door)  # type: ignore[arg-type]
    assert "serving on" not in capsys.readouterr().err


def test_the_server_is_told_how_long_answers_may_take_and_keeps_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}
    turns: list[float] = []

    class Config:
        def __init__(self, app: Any, **given: Any) -> None:
            seen.update(given, app=app)

    class Server:
        started = False

        def __init__(self, config: Any) -> None: ...

        def run(self, sockets: Any) -> None:
            seen["sockets"] = sockets
            seen["ended by"] = signal.getsignal(signal.SIGTERM)
            turns.append(sys.getswitchinterval())

    monkeypatch.setattr("uvicorn.Config", Config)
    monkeypatch.setattr("uvicorn.Server", Server)
    before, turn = signal.getsignal(signal.SIGTERM), sys.getswitchinterval()
    door = Door("here", 9, tls={"ssl_certfile": "c"}, drain=7)
    with pytest.raises(SystemExit) as left:
        listen("app", "sockets", door)  # type: ignore[arg-type]
    assert left.value.code == 1  # it could not begin
    assert signal.getsignal(signal.SIGTERM) is before
    with pytest.raises(SystemExit) as left:
        seen.pop("ended by")(15, None)
    assert left.value.code == 0
    quiet = {"log_level": "warning", "access_log": False, "server_header": False}
    where = {"host": "here", "port": 9, "ssl_certfile": "c", "timeout_graceful_shutdown": 7}
    assert seen == {"app": "app", "sockets": "sockets", **quiet, **where}
    Server.started = True
    listen("app", "sockets", door)  # type: ignore[arg-type]
    assert turns == pytest.approx([1e-4] * 2), "threads that compute and that write take short turns while it runs"
    assert sys.getswitchinterval() == turn


def test_an_answer_that_ends_with_the_server_leaves_no_traceback(caplog: pytest.LogCaptureFixture) -> None:
    told = logging.getLogger("uvicorn.error")

    class Server:
        started = True

        def __init__(self, config: Any) -> None: ...

        def run(self, sockets: Any) -> None:
            told.error("Exception in ASGI application", exc_info=asyncio.CancelledError())
            told.error("Traceback …\nasyncio.exceptions.CancelledError\n")
            told.error("Exception in ASGI application", exc_info=ValueError("x"))

    with pytest.MonkeyPatch.context() as patch, caplog.at_level(logging.ERROR, "uvicorn.error"):
        patch.setattr("uvicorn.Config", lambda app, **given: None)
        patch.setattr("uvicorn.Server", Server)
        listen("app", "sockets", Door("here", 9))  # type: ignore[arg-type]
        assert len(caplog.records) == 1
        told.error("CancelledError")
        assert len(caplog.records) == 2


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:8000"),
        ("0.0.0.0", "http://127.0.0.1:8000"),
        ("::", "http://[::1]:8000"),
        ("[::1]", "http://[::1]:8000"),
        ("box.example", "http://box.example:8000"),
    ],
)
def test_the_address_told_is_one_that_a_browser_takes(host: str, url: str) -> None:
    assert Door(host, 8000).url == url
    assert Door(host, 8000, tls={"ssl_certfile": "c"}).url == url.replace("http:", "https:")
