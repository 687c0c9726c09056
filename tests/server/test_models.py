"""Several models by name: loaded when asked for, one after another where there is little room, and read from a file."""

from __future__ import annotations

import asyncio
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="needs the extra `server`")
httpx = pytest.importorskip("httpx", reason="the test's HTTP client")

import uvicorn  # noqa: E402
from fastapi import Request  # noqa: E402

from ktcore.errors import KtcoreError, RequestError  # noqa: E402
from ktcore.server.http.app import build_models_app  # noqa: E402
from ktcore.server.http.config import read_config  # noqa: E402
from ktcore.server.http.settings import Settings  # noqa: E402
from ktcore.server.models.facts import planned_facts  # noqa: E402
from ktcore.server.models.registry import Bounds, Leases, Models, entry_of  # noqa: E402

from .test_command import free_port, refusal  # noqa: E402
from .test_service import wait_for  # noqa: E402

LOADING = {"backend": "cpu", "rules": "reference", "context": 512}
CHAT = "/v1/chat/completions"


def _ask(name: str, text: str = "Hello", **more: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": text}]
    return {"model": name, "messages": messages, "max_tokens": 6, "temperature": 0, **more}


def _models(folders: dict[str, Path], names: str, bounds: Bounds | None = None, pinned: str = "") -> Models:
    made = []
    for name in names.split():
        path = folders[name]
        settings = Settings(name)
        made.append(entry_of(path, settings, planned_facts(path, LOADING), name in pinned.split(), LOADING))
    return Models(made, bounds)


@contextmanager
def _running(models: Models) -> Iterator[Callable[..., Any]]:
    """A server with a loop of its own; asks it over a socket."""
    port = free_port()
    config = uvicorn.Config(build_models_app(models, Settings("")), port=port, log_level="critical", lifespan="off")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        wait_for(lambda: server.started)
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            yield client.request
    finally:
        server.should_exit = True
        thread.join()
        models.close()


def _loaded(ask: Callable[..., Any]) -> set[str]:
    return {m["name"] for m in ask("GET", "/api/ps").json()["models"]}


def test_models_are_loaded_when_asked_for_and_the_longest_unused_makes_room(folders: dict[str, Path]) -> None:
    models = _models(folders, "dense moe tools", Bounds(loaded=2))
    with _running(models) as ask:
        listed = [m["id"] for m in ask("GET", "/v1/models").json()["data"]]
        assert listed == [m["name"] for m in ask("GET", "/api/tags").json()["models"]] == ["dense", "moe", "tools"]
        assert _loaded(ask) == set()
        first = ask("POST", CHAT, json=_ask("dense")).json()
        assert ask("POST", CHAT, json=_ask("moe")).status_code == 200
        assert _loaded(ask) == {"dense", "moe"}
        assert ask("POST", CHAT, json=_ask("dense")).json()["choices"] == first["choices"]
        assert ask("POST", "/api/show", json={"model": "tools"}).json()["capabilities"] == ["completion", "tools"]
        assert _loaded(ask) == {"dense", "moe"}  # asking about a model does not load it
        assert ask("POST", CHAT, json=_ask("tools")).status_code == 200
        assert _loaded(ask) == {"dense", "tools"}
        assert ask("POST", CHAT, json=_ask("dense")).json()["choices"] == first["choices"]
        missing = ask("POST", CHAT, json=_ask("none"))
        assert missing.status_code == 404
        assert "'dense', 'moe', 'tools'" in missing.json()["error"]["message"]
        text = ask("GET", "/metrics").text
        assert 'ktcore_model_loads_total{model="moe"} 1.0' in text
        assert 'ktcore_model_loaded{model="moe"} 0.0' in text
        assert "ktcore_model_unloads_total 1.0" in text
        assert 'ktcore_answers_total{finish="length",model="dense"} 3.0' in text
        assert ask("POST", "/tokenize", json={"prompt": "abc", "model": "tools"}).json()["count"] == 3
        assert ask("POST", "/tokenize", json={"prompt": "abc"}).json()["count"] == 3
    assert models.loaded == []
    assert not [t for t in threading.enumerate() if t.name == "ktcore-steps"]


def test_memory_bounds_what_is_loaded_and_refuses_what_never_fits(folders: dict[str, Path]) -> None:
    need = planned_facts(folders["dense"], LOADING).memory["cpu:0"]
    other = planned_facts(folders["moe"], LOADING).memory["cpu:0"]
    models = _models(folders, "dense moe", Bounds(memory={"cpu:0": max(need, other) + 1000}))
    with _running(models) as ask:
        for name in ("dense", "moe", "dense"):
            assert ask("POST", CHAT, json=_ask(name)).status_code == 200
            assert _loaded(ask) == {name}
    with pytest.raises(RequestError, match=r"model dense needs .* on cpu:0, all models together may take"):
        _models(folders, "dense", Bounds(memory={"cpu:0": need - 1}))


def test_a_model_that_answers_is_not_unloaded_and_requests_for_others_wait(folders: dict[str, Path]) -> None:
    models = _models(folders, "dense moe", Bounds(loaded=1))
    with _running(models) as ask:
        done: list[str] = []

        def long() -> None:
            assert ask("POST", CHAT, json=_ask("dense", max_tokens=300, ignore_eos=True)).status_code == 200
            done.append("dense")

        thread = threading.Thread(target=long)
        thread.start()
        ends = time.monotonic() + 30
        while _loaded(ask) != {"dense"}:
            assert time.monotonic() < ends
        assert ask("POST", CHAT, json=_ask("moe")).status_code == 200
        done.append("moe")
        thread.join()
    assert done == ["dense", "moe"]


def test_many_requests_for_one_model_load_it_once(folders: dict[str, Path]) -> None:
    models = _models(folders, "dense moe")
    with _running(models) as ask:
        codes: list[int] = []
        threads = [
            threading.Thread(target=lambda: codes.append(ask("POST", CHAT, json=_ask("moe")).status_code))
            for _ in range(6)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert codes == [200] * 6
        assert models.entries["moe"].loads == 1
        wait_for(lambda: not models.entries["moe"].leases)  # given back right after the last byte


def test_pinned_models_stay_and_what_has_no_place_is_told_so(folders: dict[str, Path]) -> None:
    models = _models(folders, "dense moe", Bounds(loaded=1), pinned="dense")
    models.load_pinned()
    with _running(models) as ask:
        assert _loaded(ask) == {"dense"}
        reply = ask("POST", CHAT, json=_ask("moe"))
        assert reply.status_code == 503
        assert reply.headers["retry-after"]
        assert "dense take what memory there is" in reply.json()["error"]["message"]
        assert ask("POST", "/api/generate", json={"model": "dense", "keep_alive": 0}).status_code == 200
        time.sleep(0.1)
        assert _loaded(ask) == {"dense"}


def test_a_load_that_fails_is_told_and_tried_again(folders: dict[str, Path]) -> None:
    models = _models(folders, "dense moe")
    entry = models.entries["dense"]
    right = entry.open

    def wrong() -> Any:
        raise KtcoreError("the file went away", "bring it back")

    entry.open = wrong
    with _running(models) as ask:
        reply = ask("POST", CHAT, json=_ask("dense"))
        assert reply.status_code == 500
        entry.open = right
        assert ask("POST", CHAT, json=_ask("dense")).status_code == 200


def test_keep_alive_unloads_at_once_later_or_never(folders: dict[str, Path]) -> None:
    models = _models(folders, "dense moe", Bounds(idle_s=300))
    with _running(models) as ask:
        loaded = ask("POST", "/api/generate", json={"model": "dense"}).json()
        assert loaded["done_reason"] == "load"
        ask("POST", "/api/generate", json={"model": "dense", "keep_alive": 0})
        wait_for(lambda: not _loaded(ask))
        options = {"num_predict": 3}
        for least in (1e6, 0):  # loading takes milliseconds, being there already does not
            answer = ask(
                "POST", "/api/generate", json={"model": "dense", "prompt": "a", "stream": False, "options": options}
            )
            assert least <= answer.json()["load_duration"] < answer.json()["total_duration"]
        (card,) = ask("GET", "/api/ps").json()["models"]
        assert card["name"] == "dense"
        assert card["expires_at"] > card["modified_at"]
        reply = ask("POST", "/api/chat", json={"model": "dense:latest", "messages": [], "keep_alive": 0}).json()
        assert reply["done_reason"] == "unload"
        wait_for(lambda: not _loaded(ask))
        ask("POST", "/api/generate", json={"model": "moe", "keep_alive": -1})
        assert "expires_at" not in ask("GET", "/api/ps").json()["models"][0]
        ask("POST", "/api/generate", json={"model": "moe", "keep_alive": "50ms"})
        wait_for(lambda: not _loaded(ask))
        assert ask("POST", "/api/generate", json={"model": "moe", "keep_alive": "soon"}).status_code == 400


def test_a_model_is_unloaded_when_the_last_of_its_requests_is_long_over(folders: dict[str, Path]) -> None:
    models = _models(folders, "dense", Bounds(idle_s=0.01))
    entry = models.entries["dense"]

    async def answered(ends: asyncio.Event) -> None:
        async def app(scope: Any, receive: Any, send: Any) -> None:
            await models.of("dense", Request(scope))
            await ends.wait()

        await Leases(app)({"type": "http"}, None, None)  # type: ignore[arg-type]

    async def two() -> None:
        ends = [asyncio.Event(), asyncio.Event()]
        asks = [asyncio.create_task(answered(each)) for each in ends]
        while entry.served is None:
            await asyncio.sleep(0.001)
        assert entry.leases == 2
        ends[0].set()
        await asks[0]
        await asyncio.sleep(0.05)
        assert (entry.leases, entry.served is None) == (1, False)
        ends[1].set()
        await asks[1]
        while entry.served is not None:
            await asyncio.sleep(0.001)
        assert (entry.leases, models.unloads) == (0, 1)

    asyncio.run(asyncio.wait_for(two(), 20))


CONFIG = """
memory: 8GiB
max_loaded: 2
models:
  small: {path: PATH, backend: cpu, rules: reference, context: 512, max_new_tokens: 5}
  other: {path: PATH, backend: cpu, context: 256, keep: true, prefix_cache: cache}
"""


def test_a_models_memory_is_a_size_or_sizes_by_device(tmp_path: Path) -> None:
    file = tmp_path / "serve.yaml"
    for given, memory in (("2GiB", 2**31), ("{cpu: 1GiB, 'sim:1': 5}", {"cpu": 2**30, "sim:1": 5})):
        file.write_text(CONFIG.replace("context: 512", f"context: 512, memory: {given}"))
        assert read_config(file).models["small"].loading(tmp_path)["memory"] == memory


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("max_loaded: 2", "max_load: 2"), "max_load is not known.*max_loaded"),
        (("context: 512", "contxt: 512"), "models.small.contxt is not known.*context"),
        (("memory: 8GiB", "memory: 8 apples"), "memory: .*'8 apples' is not a size"),
        (("max_loaded: 2", "stretch: -1"), "stretch: should be at least 0"),
        (("context: 512", "context: many"), "models.small.context: should be a whole number"),
        (("  small:", "  small:latest:"), "leave it out|no YAML"),
        (("models:", "modles:"), "models: is missing|modles is not known"),
        (("{path: PATH, backend: cpu, rules", "{backend: cpu, rules"), "models.small.path: is missing"),
        (("memory", "memory: ["), "no YAML"),
    ],
)
def test_a_wrong_file_is_refused_with_the_place(tmp_path: Path, change: tuple[str, str], message: str) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text(CONFIG.replace(*change))
    with pytest.raises(RequestError) as caught:
        read_config(file)
    assert re.search(message, f"{caught.value.message} {caught.value.hint}"), str(caught.value)
    assert str(file) in caught.value.message


def test_the_command_serves_a_file(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text(CONFIG.replace("PATH", str(folders["dense"])))
    port = free_port()
    command = [sys.executable, "-m", "ktcore.cli.main", "serve", "--config", str(file)]
    assert "--context cannot go with --config" in refusal(capsys, "--config", file, "--context", 99)
    with subprocess.Popen([*command, "--port", str(port)], stderr=subprocess.PIPE, text=True) as process:
        try:
            ends = time.monotonic() + 60
            while True:
                try:
                    assert httpx.get(f"http://127.0.0.1:{port}/ready").status_code == 200
                    break
                except httpx.ConnectError:
                    assert process.poll() is None, process.stderr.read() if process.stderr else ""
                    assert time.monotonic() < ends
                    time.sleep(0.05)
            url = f"http://127.0.0.1:{port}"
            assert [m["name"] for m in httpx.get(f"{url}/api/ps").json()["models"]] == ["other"]
            ask = _ask("small")
            del ask["max_tokens"]
            answer = httpx.post(f"{url}{CHAT}", json={**ask, "ignore_eos": True}, timeout=60).json()
            assert answer["usage"]["completion_tokens"] == 5
            long = _ask("other", "x" * 150, ignore_eos=True)
            assert httpx.post(f"{url}{CHAT}", json=long, timeout=60).status_code == 200
        finally:
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0
    assert list((tmp_path / "cache").rglob("*.kv"))


def test_a_request_that_goes_away_while_it_waits_holds_nothing(folders: dict[str, Path]) -> None:
    models = _models(folders, "dense moe")
    entry = models.entries["dense"]
    right = entry.open
    assert right is not None
    go_on = threading.Event()

    def slow() -> Any:
        assert go_on.wait(30)
        return right()

    entry.open = slow
    with _running(models) as ask:
        with pytest.raises(httpx.ReadTimeout):
            ask("POST", CHAT, json=_ask("dense"), timeout=0.2)
        go_on.set()
        assert ask("POST", CHAT, json=_ask("dense")).status_code == 200
        wait_for(lambda: not entry.leases)
        assert entry.loads == 1


def test_the_documents_example_is_what_the_server_reads(tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```yaml\n(host:.*?)```", text, re.DOTALL)
    file = tmp_path / "serve.yaml"
    file.write_text(example)
    config = read_config(file)
    assert config.memory == 48 * 2**30
    assert config.models["small"].keep
