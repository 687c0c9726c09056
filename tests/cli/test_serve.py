"""What `ktcore serve` makes of its options, without a model: settings, keys, doors, and a file's models."""

from __future__ import annotations

import builtins
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("uvicorn", reason="needs the extra `server`")
pytest.importorskip("fastapi", reason="needs the extra `server`")

from ktcore.cli.commands import serve
from ktcore.cli.listen import Door
from ktcore.cli.serve_config import Configured, entries
from ktcore.engine.prefix.cache import DISK_BYTES, MEMORY_BYTES, PrefixOptions
from ktcore.errors import RequestError
from ktcore.server.http.config import read_config
from ktcore.server.http.settings import MAX_BODY, Settings

from .conftest import Run

Seen = dict[str, Any]


class FakeModel:
    context = 99
    taken = "Runs on an abacus. It was asked for."
    quantization_error: dict[str, float] = {}  # noqa: RUF012 - as a model has it

    def __enter__(self) -> FakeModel:
        return self

    def __exit__(self, *error: object) -> None: ...

    def close(self) -> None: ...


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    """What would have been loaded and served."""
    found: Seen = {}

    @contextmanager
    def service(*given: Any) -> Iterator[Any]:
        found["service"] = given[1:]
        yield "service"

    @contextmanager
    def bound(door: Door) -> Iterator[str]:
        found["door"] = door
        yield "sockets"

    def load(path: Path, **given: Any) -> FakeModel:
        found.update(path=path, loading=given)
        return FakeModel()

    def listen(app: Any, sockets: str, door: Door) -> None:
        found.update(app=app, sockets=sockets, listening=door, level=logging.getLogger("ktcore").level)

    monkeypatch.setattr("ktcore.engine.model.load", load)
    monkeypatch.setattr("ktcore.engine.service.Service", service)
    monkeypatch.setattr("ktcore.server.http.app.build_app", lambda service, settings: settings)
    monkeypatch.setattr("ktcore.cli.listen.bound", bound)
    monkeypatch.setattr("ktcore.cli.listen.listen", listen)
    monkeypatch.delenv(serve.KEYS_VARIABLE, raising=False)
    return found


def test_defaults(ktcore: Run, seen: Seen) -> None:
    done = ktcore("serve", "folder/small.gguf")
    assert done.code == 0, done.err
    assert done.err == f"small loaded in 0.0 s, context of 99 tokens. {FakeModel.taken}\n"
    s = seen["app"]
    assert (s.name, bool(s.keys), s.max_body, s.default_tokens) == ("small", False, MAX_BODY, 1024)
    assert (s.timeout_s, s.origins, s.prompt_lookup) == (None, (), 0)
    assert seen["door"] == seen["listening"] == Door("127.0.0.1", 8000, False, {}, 30)
    assert seen["sockets"] == "sockets"
    assert seen["service"] == (64, 3.0)
    assert seen["loading"]["prefix"] == PrefixOptions(MEMORY_BYTES, None, DISK_BYTES)
    assert seen["level"] == logging.INFO


def test_options_arrive_where_they_belong(ktcore: Run, seen: Seen, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("k\n")
    done = ktcore(
        *("serve", "small.gguf", "--host", "0.0.0.0", "--port", 99, "--api-key-file", keys, "--name", "big"),
        *("--max-new-tokens", 7, "--max-body", "1000", "--queue", 3, "--stretch", 1.5, "--timeout", 2.5, "--drain", 4),
        *("--cors-origin", "https://a.example", "--cors-origin", "http://b.example:1", "--log", "off"),
        *("--prompt-lookup", 5, "--prefix-cache", tmp_path, "--prefix-cache-memory", "2MiB", "--context", 55),
    )
    assert done.code == 0, done.err
    s = seen["app"]
    assert (s.name, s.keys.admit(b"k"), s.keys.admit(b"x"), s.max_body, s.default_tokens) == (
        "big",
        True,
        False,
        1000,
        7,
    )
    assert (s.timeout_s, s.origins, s.prompt_lookup) == (2.5, ("https://a.example", "http://b.example:1"), 5)
    assert seen["listening"] == Door("0.0.0.0", 99, True, {}, 4)
    assert seen["service"] == (3, 1.5)
    assert seen["loading"]["prefix"] == PrefixOptions(2 * 2**20, tmp_path, DISK_BYTES)
    assert seen["loading"]["context"] == 55
    assert seen["level"] == logging.WARNING


def test_a_key_from_the_environment_opens_other_addresses(
    ktcore: Run, seen: Seen, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "there is no API key" in ktcore("serve", "m", "--host", "0.0.0.0").err
    monkeypatch.setenv(serve.KEYS_VARIABLE, "k")
    assert ktcore("serve", "m", "--host", "0.0.0.0").code == 0
    assert seen["app"].keys.admit(b"k")
    assert seen["listening"].keyed
    assert ktcore("serve", "m").code == 0
    assert seen["app"].keys.admit(b"k")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "there is no model to serve"),
        (("--log", "loud"), "there is no model to serve"),
        (("m", "--log", "loud"), "--log loud: known are text, json, off"),
        (("m", "--tls-cert", "c.pem"), "HTTPS needs both"),
        (("m", "--tls-key", "k.pem"), "HTTPS needs both"),
        (("m", "--tls-cert", "c.pem", "--tls-key", "k.pem"), "cannot be used for HTTPS"),
        (("m", "--cors-origin", "*"), "is no origin"),
        (("m", "--api-key-file", "absent"), "absent cannot be read"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_anything_is_loaded(
    fails: Callable[..., str], seen: Seen, words: tuple[str, ...], message: str
) -> None:
    assert message in fails("serve", "--port", 9, *words)
    assert "loading" not in seen


@pytest.mark.parametrize("package", ["fastapi", "uvicorn", "prometheus_client"])
def test_a_missing_package_is_named_with_the_extra(
    fails: Callable[..., str], monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    real = builtins.__import__

    def importing(name: str, *given: Any, **options: Any) -> Any:
        if name == package:
            raise ModuleNotFoundError(f"No module named {package!r}", name=package)
        return real(name, *given, **options)

    monkeypatch.setattr(builtins, "__import__", importing)
    said = fails("serve", "m")
    assert f"not installed: {package}" in said
    assert "ktcore[server]" in said


def test_a_file_of_models_is_served_under_the_command_lines_words(
    ktcore: Run, seen: Seen, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: Seen = {}

    class FakeModels:
        def __init__(self, entries: list[str], bounds: Any) -> None:
            self.entries = dict.fromkeys(entries)
            self.loaded: list[str] = []
            made.update(bounds=bounds, closed=False)

        def load_pinned(self) -> None:
            self.loaded.append("a")

        def close(self) -> None:
            made["closed"] = True

    def entries(made_of: Any, settings: Any) -> list[str]:
        made.update(config=made_of.config, settings=settings)
        return ["a", "b"]

    monkeypatch.setattr("ktcore.cli.serve_config.entries", entries)
    monkeypatch.setattr("ktcore.server.models.registry.Models", FakeModels)
    monkeypatch.setattr("ktcore.server.http.app.build_models_app", lambda models, settings: settings)
    (tmp_path / "keys").write_text("k\n")
    file = tmp_path / "serve.yaml"
    text = (
        "models: {a: {path: a.gguf}, b: {path: b.gguf}}\nport: 77\nhost: 0.0.0.0\napi_key_file: keys\ndrain: 5\n"
        "timeout: 1.5\nmax_body: 1000\ncors_origins: ['https://a.example']\nmemory: 1GiB\n"
        "max_loaded: 2\nidle_unload: 9\n"
    )
    file.write_text(text)
    done = ktcore("serve", "--config", file, "--port", 78, "--verbose")
    assert done.code == 0, done.err
    assert "2 models: a, b; 1 loaded\n" in done.err
    assert seen["listening"] == seen["door"] == Door("0.0.0.0", 78, True, {}, 5)
    s = made["settings"]
    assert (s.name, s.keys.admit(b"k"), s.max_body, s.timeout_s) == ("", True, 1000, 1.5)
    assert s.origins == ("https://a.example",)
    bounds = made["bounds"]
    assert (dict(bounds.memory), bounds.loaded, bounds.idle_s) == ({"cpu:0": 2**30}, 2, 9)
    assert made["closed"]
    file.write_text(text + "log: loud\n")
    assert f"{file}: log: loud: known are" in ktcore("serve", "--config", file).err
    file.write_text(text)
    stray = ktcore("serve", "model.gguf", "--config", file, "--backend", "cpu", "--queue", 3).err
    assert "error: --backend, MODEL cannot go with --config" in stray
    assert str(file) in stray


def test_a_models_own_words_go_before_the_servers(tmp_path: Path, tiny_llama: Path) -> None:
    file = tmp_path / "serve.yaml"
    own = "context: 64, max_new_tokens: 7, prompt_lookup: 5, keep: true"
    file.write_text(
        "queue: 3\nstretch: 1.5\nmodels:\n"
        f"  a: {{path: {tiny_llama}, backend: cpu, {own}}}\n  b: {{path: {tiny_llama}, backend: cpu}}\n"
    )
    a, b = entries(Configured(read_config(file), tmp_path), Settings("", max_body=99, timeout_s=2.5))
    assert (a.settings.default_tokens, a.settings.prompt_lookup, a.pinned) == (7, 5, True)
    assert (b.settings.default_tokens, b.settings.prompt_lookup, b.pinned) == (1024, 0, False)
    for entry, name in ((a, "a"), (b, "b")):
        assert (entry.name, entry.settings.max_body, entry.settings.timeout_s) == (name, 99, 2.5)
        assert (entry.path, entry.queue, entry.stretch) == (tiny_llama, 3, 1.5)


def test_origins_and_certificates_are_what_browsers_and_uvicorn_take() -> None:
    assert serve._origins(["https://a.example:8443"]) == ("https://a.example:8443",)
    assert serve._tls(None, None) == {}
    for wrong in ("a.example", "https://a.example/", "https://*", "ftp://a"):
        with pytest.raises(RequestError, match="is no origin"):
            serve._origins(["https://good.example", wrong])
