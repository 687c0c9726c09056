"""Options as people know them from other programs, options that several commands share, --verbose, completion."""

from __future__ import annotations

import dataclasses
import inspect
import logging
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import pytest
import typer

from ktcore.backend.hookspecs import ENTRY_POINT_GROUP
from ktcore.cli import groups, options
from ktcore.cli.commands.bench import bench
from ktcore.cli.commands.chat import chat
from ktcore.cli.commands.run import run
from ktcore.cli.commands.serve import serve
from ktcore.cli.logs import Records
from ktcore.cli.words import ADVICE, ALIASES

from .conftest import Run

COMMANDS = ("run", "chat", "serve", "plan", "convert", "doctor", "bench", "new-backend")


@pytest.fixture
def given(ktcore: Run, monkeypatch: pytest.MonkeyPatch) -> Any:
    """given("--temp", 0) -> (options of loading, of the answer) that `ktcore run` understood."""
    seen: dict[str, Any] = {}

    class Model:
        def __init__(self) -> None:
            self.quantization_error: dict[str, float] = {}

        tokenizer = type("T", (), {"chat_template": None})

        def stream(self, text: str, max_new_tokens: int, **given: Any) -> Any:
            seen.update(given, max_new_tokens=max_new_tokens, text=text)
            raise KeyboardInterrupt

        def __enter__(self) -> Model:
            return self

        def __exit__(self, *error: object) -> None:
            pass

    def load(path: Path, **given: Any) -> Model:
        seen.update(given)
        return Model()

    monkeypatch.setattr("ktcore.engine.model.load", load)

    def run(*words: object) -> dict[str, Any]:
        seen.clear()
        done = ktcore("run", "model.gguf", "Hi", *words)
        assert done.code == 130, done.err
        return dict(seen)

    return run


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        (("--temp", 0.25), "temperature", 0.25),
        (("--temp=0.25",), "temperature", 0.25),
        (("--n-predict", 7), "max_new_tokens", 7),
        (("--max_tokens", 7), "max_new_tokens", 7),
        (("-n", 7), "max_new_tokens", 7),
        (("--ctx-size", 99), "context", 99),
        (("--ctx_size=99",), "context", 99),
        (("-c", 99), "context", 99),
        (("-t", 3), "threads", 3),
        (("--top_k", 5), "top_k", 5),
        (("--repetition_penalty", 1.5), "repetition_penalty", 1.5),
        (("--enforce-eager",), "graphs", False),
        (("--memory", "24GiB"), "memory", 24 * 2**30),
        (("--memory", "24GB"), "memory", 24 * 10**9),
        (("--memory", "24g"), "memory", 24 * 10**9),
        (("--memory", str(2**31)), "memory", 2**31),
        (("--stop", "-ngl", "--temp", 0.25), "stop", ["-ngl"]),
        (("--stop", "--temp", "--temp", 0.25), "temperature", 0.25),
    ],
)
def test_what_has_an_equivalent_is_taken(given: Any, words: tuple[object, ...], name: str, value: object) -> None:
    assert given(*words)[name] == value


def test_defaults_reach_the_engine(given: Any) -> None:
    seen = given()
    assert seen["text"] == "Hi"
    assert (seen["max_new_tokens"], seen["temperature"], seen["stop"], seen["prompt_lookup"]) == (512, 0.7, [], 0)
    assert (seen["backend"], seen["context"], seen["memory"], seen["graphs"]) == ("auto", None, None, True)
    assert (seen["prefix"].memory, seen["prefix"].folder) == (0, None)


def test_words_after_two_dashes_are_no_options(ktcore: Run) -> None:
    assert "--temp: no such file" in ktcore("plan", "--", "--temp").err


@pytest.mark.parametrize(
    ("words", "advice"),
    [
        (("-ngl", "99"), "--memory"),
        (("-ngl=99",), "--memory"),
        (("--n_gpu_layers", "99"), "--memory"),
        (("--gpu-memory-utilization=0.9",), "--memory 20GiB"),
        (("--tensor-parallel-size", "2"), "one accelerator"),
        (("-m", "model.gguf"), "ktcore run MODEL"),
        (("-p", "Hi"), "the word after the model"),
        (("--api-key", "secret"), "--api-key-file"),
        (("--contxt", "5"), "did you mean --context?"),
        (("--max-new-token", "5"), "did you mean --max-new-tokens?"),
        (("--temperatur", "5"), "did you mean --temperature or"),
        (("-temp", "5"), "two dashes: --temp"),
        (("-backend", "cpu"), "two dashes: --backend"),
        (("--zzzz",), "--help lists"),
        (("--memory", "24"), "say 24GiB"),
    ],
)
def test_what_has_none_is_refused_with_advice(ktcore: Run, words: tuple[str, ...], advice: str) -> None:
    done = ktcore("run", "model.gguf", "Hi", *words)
    assert done.code == 2
    assert words[0].partition("=")[0] in done.err
    assert advice in " ".join(done.err.replace("│", " ").split())


def test_a_commands_own_option_goes_before_a_foreign_meaning(ktcore: Run) -> None:
    assert "no such file" in ktcore("bench", "nothing", "-p", 5, "--prompt", 5).err


@pytest.mark.parametrize("words", [ALIASES, ADVICE], ids=["aliases", "advice"])
def test_no_foreign_word_is_an_option_of_run_chat_or_serve(words: dict[str, str]) -> None:
    app = typer.Typer()
    for command in (run, chat, serve):
        app.command()(command)
    for command in typer.main.get_command(app).commands.values():  # type: ignore[attr-defined]
        own = {word for option in command.params for word in (*option.opts, *option.secondary_opts)}
        assert not own & words.keys()
    if words is ALIASES:
        known = {word for c in app.registered_commands for word in _words(c.callback)}
        assert set(ALIASES.values()) <= known


def _words(command: Any) -> set[str]:
    app = typer.Typer()
    app.command()(command)
    made = typer.main.get_command(app)
    return {word for option in made.params for word in (*option.opts, *option.secondary_opts)}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("option", ["--verbose", "--debug"])
def test_every_command_has_it(ktcore: Run, command: str, option: str) -> None:
    assert f" {option} " in ktcore(command, "--help").out


def test_commands_that_load_share_their_options() -> None:
    fields = {f.name: f.default for f in dataclasses.fields(groups.Loading)}
    for command in (run, chat, serve, bench):
        parameters = inspect.signature(command).parameters
        assert {name: parameters[name].default for name in fields} == fields


def test_a_group_stands_for_its_fields() -> None:
    seen: list[Any] = []

    @groups.grouped
    def command(*, first: Annotated[int, typer.Argument()], source: groups.Source, verbose: bool = True) -> None:
        seen.append((first, source, verbose))

    parameters = inspect.signature(command).parameters
    assert list(parameters) == ["first", "backend", "rules", "experts_from", "packing", "verbose", "debug"]
    assert parameters["backend"].default == "auto"
    assert command.__annotations__["backend"] == options.BackendOption
    command(first=3, backend="far", rules=None, experts_from=Path("x"), packing=None, verbose=False, debug=False)
    assert seen == [(3, groups.Source("far", None, Path("x")), False)]


def test_verbose_says_what_is_done_and_twice_more(ktcore: Run, tiny_llama: Path) -> None:
    plain, once, twice = (ktcore("plan", tiny_llama, *words).err for words in ([], ["-v"], ["-vv"]))
    assert plain == ""
    assert "planned for cpu (" in once
    assert "layers.1.attn: cpu.attention on cpu:0" not in once
    assert "layers.1.attn: cpu.attention on cpu:0" in twice
    before = ktcore("--verbose", "plan", tiny_llama, "-v").err
    assert before.count("planned for") == 1
    assert "cpu.attention on cpu:0" in before


def test_verbose_leaves_other_libraries_alone(capsys: pytest.CaptureFixture[str]) -> None:
    handler = Records()
    for name in ("urllib3", "ktcore.x", "ktcore_far"):
        handler.handle(logging.makeLogRecord({"name": name, "levelname": "INFO", "msg": "said by %s", "args": (name,)}))
    assert capsys.readouterr().err == "INFO ktcore.x: said by ktcore.x\nINFO ktcore_far: said by ktcore_far\n"


@pytest.mark.parametrize(
    ("typed", "offered"),
    [("ktcore ru", "run"), ("ktcore run --cont", "--context"), ("ktcore run -m x --backend cp", "cpu")],
)
def test_the_shell_completes(typed: str, offered: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("_KTCORE_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", typed)
    monkeypatch.setenv("COMP_CWORD", str(len(typed.split()) - 1))
    command = [sys.executable, "-c", "from ktcore.cli.main import main; main()"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.split() == [offered], done.stderr


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_completions_script_is_shown_and_installed(
    shell: str, ktcore: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("shellingham.detect_shell", lambda *words: (shell, f"/bin/{shell}"))
    shown = ktcore("--show-completion")
    assert shown.code == 0
    assert "_KTCORE_COMPLETE" in shown.out
    if shell == "fish":
        assert ktcore("--install-completion").code == 0
        assert list(tmp_path.rglob("ktcore.fish"))


def test_backends_and_nothing_else_that_is_installed_are_offered() -> None:
    assert options.BACKENDS == ENTRY_POINT_GROUP
    offered = options._backend_names("")
    assert {"auto", "cpu"} <= set(offered)
    assert "pytest" not in offered  # which is an entry point too
