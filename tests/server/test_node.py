"""The openai SDK for Node, unmodified, against a running server: `make test` puts it under build/node where npm is."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("uvicorn", reason="needs the extra `server`")
pytest.importorskip("fastapi", reason="needs the extra `server`")
pytest.importorskip("llguidance", reason="needs the extra `server`")

import ktcore

from .test_clients import listening

PACKAGES = Path(__file__).resolve().parents[2] / "build" / "node"
SCRIPT = Path(__file__).parent / "node" / "client.mjs"


def test_the_openai_sdk_for_node_works_unmodified(opened: Callable[..., ktcore.Model]) -> None:
    node = shutil.which("node")
    if node is None:
        pytest.skip("there is no node on this machine (Debian: nodejs and npm)")
    if not (PACKAGES / "node_modules" / "openai").is_dir():
        pytest.skip("the openai package is not in build/node: run `make node`, which needs npm")
    with listening(opened("tools", context=4096)) as server:
        words = [node, str(SCRIPT), str(PACKAGES), f"{server.url}/v1", "right"]
        done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("passed: ") == 9
