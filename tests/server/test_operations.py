"""What operators look at: readiness, pages of other sites, HTTPS, and lines in the log without what was asked."""

from __future__ import annotations

import asyncio
import json
import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

pytest.importorskip("fastapi", reason="needs the extra `server`")
pytest.importorskip("httpx", reason="the test's HTTP client")

from fastapi import Request
from fastapi.testclient import TestClient
from starlette.datastructures import Address

import ktcore
from ktcore.cli.commands import serve
from ktcore.engine.service import Service
from ktcore.errors import RequestError
from ktcore.server.http.app import build_app
from ktcore.server.http.logs import Lines, RequestLog, logging_to_stderr
from ktcore.server.http.settings import Keys, Settings
from ktcore.server.models.served import caller

Open = Callable[..., ktcore.Model]
SITE = "https://chat.example"
ASK = {"model": "tiny", "prompt": "a secret", "max_tokens": 2}


def test_it_is_not_ready_when_it_is_about_to_end(opened: Open) -> None:
    with Service(opened("dense"), 8) as service:
        client = TestClient(build_app(service, Settings("tiny")), base_url="http://localhost")
        assert client.get("/ready").status_code == 200
        service.close()
        assert client.get("/ready").status_code == 503
        assert client.get("/health").status_code == 200


@pytest.mark.parametrize("keys", [Keys(), Keys(("k",))], ids=["open", "keyed"])
def test_pages_of_named_sites_may_ask(keys: Keys, opened: Open) -> None:
    with Service(opened("dense"), 8) as service:
        client = TestClient(build_app(service, Settings("tiny", keys, origins=(SITE,))), base_url="http://localhost")
        wants = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
        asked = client.options("/v1/completions", headers={"Origin": SITE, **wants})
        assert (asked.status_code, asked.headers["access-control-allow-origin"]) == (200, SITE)
        other = client.options("/v1/completions", headers={"Origin": "https://evil.example", **wants})
        assert "access-control-allow-origin" not in other.headers
        authorization = {"Authorization": "Bearer k"} if keys else {}
        done = client.post("/v1/completions", json=ASK, headers={"Origin": SITE, **authorization})
        assert (done.status_code, done.headers["access-control-allow-origin"]) == (200, SITE)
        if not keys:
            refused = client.post("/v1/completions", json=ASK, headers={"Origin": "https://evil.example"})
            assert refused.status_code == 403


def test_lines_tell_the_request_and_not_what_was_asked(opened: Open, caplog: pytest.LogCaptureFixture) -> None:
    with Service(opened("dense"), 8) as service, caplog.at_level(logging.INFO, "ktcore.server.requests"):
        client = TestClient(build_app(service, Settings("tiny", Keys(("k" * 20,)))), base_url="http://localhost")
        client.post("/v1/completions?secret=1", json=ASK, headers={"Authorization": "Bearer " + "k" * 20})
        client.get("/no%0Asuch%20route")
    records = [r for r in caplog.records if r.name == "ktcore.server.requests"]
    as_json = [json.loads(Lines(True).format(r)) for r in records]
    assert [(line["method"], line["path"], line["status"]) for line in as_json] == [
        ("POST", "/v1/completions", 200),
        ("GET", "/no\nsuch route", 401),
    ]
    assert as_json[0]["bytes"] > 0
    assert {line["client"] for line in as_json} == {"testclient"}
    words = [Lines(False).format(r) for r in records]
    assert all("\n" not in line for line in words)
    everything = json.dumps(as_json) + "".join(words)
    assert "secret" not in everything
    assert "kkkk" not in everything


def test_a_servers_beginning_and_end_are_no_requests(caplog: pytest.LogCaptureFixture) -> None:
    seen: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope["type"])

    with caplog.at_level(logging.INFO, "ktcore.server.requests"):
        asyncio.run(RequestLog(app)({"type": "lifespan"}, None, None))  # type: ignore[arg-type]
    assert (seen, caplog.records) == (["lifespan"], [])


def test_lines_of_other_records_have_their_fault_below_them() -> None:
    try:
        raise ValueError("x")
    except ValueError:
        record = logging.LogRecord("ktcore.far", logging.WARNING, "far.py", 1, "it went %s", ("wrong",), sys.exc_info())
    first, *trace = Lines(False).format(record).splitlines()
    assert first.endswith(" WARNING ktcore.far: it went wrong")
    assert (trace[0], trace[-1]) == ("Traceback (most recent call last):", "ValueError: x")
    as_json = json.loads(Lines(True).format(record))
    assert (as_json["level"], as_json["logger"], as_json["message"]) == ("warning", "ktcore.far", "it went wrong")
    assert as_json["trace"].splitlines() == trace
    record.exc_info = None
    assert Lines(False).format(record) == first
    assert "trace" not in json.loads(Lines(True).format(record))


def test_verbose_words_are_written_once_in_the_servers_form(capsys: pytest.CaptureFixture[str]) -> None:
    root, ours = logging.getLogger(), logging.getLogger("ktcore")
    level, handler = root.level, logging.StreamHandler()
    root.addHandler(handler)
    try:
        for shown, kind, expected in (
            (logging.WARNING, "off", logging.WARNING),
            (logging.WARNING, "text", logging.INFO),
            (logging.DEBUG, "off", logging.DEBUG),
            (logging.INFO, "json", logging.INFO),
        ):
            root.setLevel(shown)
            before = ours.level, ours.propagate, ours.handlers[:]
            with logging_to_stderr(kind):
                assert ours.level == expected
                assert ours.propagate is (shown > logging.INFO)
                ours.log(shown, "said")
            assert (ours.level, ours.propagate, ours.handlers) == before
    finally:
        root.removeHandler(handler)
        root.setLevel(level)
    assert capsys.readouterr().err.count("said") == 6


@pytest.mark.parametrize(
    ("asks", "same"),
    [
        ((("Bearer a", "1.2.3.4"), ("Bearer a", "5.6.7.8")), True),
        ((("Bearer a", "1.2.3.4"), ("Bearer b", "1.2.3.4")), False),
        (((None, "1.2.3.4"), (None, "1.2.3.4")), True),
        (((None, "1.2.3.4"), (None, "5.6.7.8")), False),
    ],
)
def test_who_asks_is_told_apart_by_the_key_or_else_by_the_address(asks: Any, same: bool) -> None:
    one, two = (
        caller(cast(Request, SimpleNamespace(headers={"authorization": key} if key else {}, client=Address(host, 1))))
        for key, host in asks
    )
    assert (one == two) is same
    assert "Bearer" not in one


def test_a_broken_certificate_is_refused_before_the_model_loads(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="both --tls-cert and --tls-key"):
        serve._tls(tmp_path / "cert.pem", None)
    (tmp_path / "cert.pem").write_text("nonsense")
    with pytest.raises(RequestError, match="cannot be used for HTTPS"):
        serve._tls(tmp_path / "cert.pem", tmp_path / "cert.pem")
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost", "-days", "2"]
    command += ["-keyout", str(tmp_path / "key.pem"), "-out", str(tmp_path / "cert.pem")]
    made = subprocess.run(command, capture_output=True)
    if made.returncode:
        pytest.skip("openssl cannot make a certificate here")
    assert serve._tls(tmp_path / "cert.pem", tmp_path / "key.pem")["ssl_certfile"].endswith("cert.pem")


@pytest.mark.parametrize("origin", ["*", "chat.example", "https://chat.example/", "https://*.example", "https://a b"])
def test_what_is_no_origin_is_refused(origin: str) -> None:
    with pytest.raises(RequestError, match="no origin"):
        serve._origins([origin])
    assert serve._origins([SITE]) == (SITE,)
