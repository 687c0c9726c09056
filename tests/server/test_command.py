"""`ktcore serve` as a process: it answers, refuses an open door, and drains when it is told to end."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("uvicorn", reason="needs the extra `server`")
pytest.importorskip("fastapi", reason="needs the extra `server`")
httpx = pytest.importorskip("httpx", reason="the test's HTTP client")

from ktcore.cli.main import main  # noqa: E402
from ktcore.errors import RequestError  # noqa: E402
from ktcore.server.http.settings import read_keys  # noqa: E402

COMMAND = [sys.executable, "-m", "ktcore.cli.main", "serve"]
ENV = {**os.environ, "KTCORE_PLUGINS": "cpu", "OMP_NUM_THREADS": "1"}


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def wait_until_healthy(url: str, process: subprocess.Popen[str]) -> None:
    ends = time.monotonic() + 60
    while True:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < ends
        try:
            if httpx.get(f"{url}/health").status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.1)


def test_the_command_serves_and_drains(folders: dict[str, Path], tmp_path: Path) -> None:
    keys = tmp_path / "keys.txt"
    keys.write_text("# mine\n\nright\n")
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    words = [folders["moe"], "--port", port, "--api-key-file", keys, "--name", "tiny", "--backend", "cpu", "-t", 1]
    process = subprocess.Popen(
        [*COMMAND, *map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENV
    )
    try:
        wait_until_healthy(url, process)
        assert httpx.get(f"{url}/v1/models").status_code == 401
        ask: dict[str, Any] = {"model": "tiny", "prompt": "Hello", "max_tokens": 300, "temperature": 0, "stream": True}
        headers = {"Authorization": "Bearer right"}
        with httpx.stream("POST", f"{url}/v1/completions", json=ask, headers=headers, timeout=60) as response:
            pieces = response.iter_text()
            text = next(pieces)
            process.send_signal(signal.SIGTERM)
            text += "".join(pieces)
        assert '"finish_reason": "length"' in text
        assert text.endswith("data: [DONE]\n\n")
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0, err
    assert f"serving on {url}/v1, with API keys; a page to chat in: {url}/;" in err
    assert "Runs on cpu:0" in err
    assert "Traceback" not in err


def refusal(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """What `ktcore serve` says on stderr where it ends before it serves."""
    with pytest.raises(SystemExit) as left:
        main(["serve", *map(str, words)])
    assert left.value.code not in (0, None)
    return capsys.readouterr().err


def test_other_machines_need_a_key(
    folders: dict[str, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KTCORE_PLUGINS", "cpu")
    assert "--api-key-file" in refusal(capsys, folders["moe"], "--host", "0.0.0.0")


@pytest.mark.parametrize("make", [lambda p: None, lambda p: p.write_text("# none\n"), lambda p: p.write_text("a b\n")])
def test_key_files_that_cannot_be_meant_are_refused(make: Callable[[Path], object], tmp_path: Path) -> None:
    make(tmp_path / "keys")
    with pytest.raises(RequestError, match="keys"):
        read_keys(tmp_path / "keys")
