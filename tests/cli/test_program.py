"""The program around its commands: out of memory, streams, Ctrl-C's handler; the kit's command; the chat's prompt."""

from __future__ import annotations

import io
import json
import signal
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ktcore.cli import measure
from ktcore.cli.commands import chat, conformance, new_backend
from ktcore.cli.main import main
from ktcore.errors import KtcoreError
from ktcore.ops.embedding import EmbeddingSpec
from ktcore.ops.moe import ExpertsSpec

from .conftest import Run


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (MemoryError(), "error: out of memory: no more memory\n"),
        (MemoryError("a\nb"), "error: out of memory: a\n"),
        (
            RuntimeError("you tried to allocate memory: 5\nmore"),
            "error: out of memory: you tried to allocate memory: 5\n",
        ),
        (RuntimeError("Device Out Of Memory"), "error: out of memory: Device Out Of Memory\n"),
    ],
)
def test_out_of_memory_is_an_error_for_users(
    ktcore: Run, monkeypatch: pytest.MonkeyPatch, error: Exception, said: str
) -> None:
    def fails(*words: Any, **given: Any) -> None:
        raise error

    monkeypatch.setattr("ktcore.rules.prepare.prepare", fails)
    done = ktcore("plan", "x")
    assert done.code == 1
    assert done.err.startswith(said)
    assert "--context" in done.err
    with pytest.raises(type(error)):
        main(["--debug", "plan", "x"])


def test_faults_of_the_program_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*words: Any, **given: Any) -> None:
        raise ZeroDivisionError("x")

    monkeypatch.setattr("ktcore.rules.prepare.prepare", fails)
    with pytest.raises(ZeroDivisionError):
        main(["plan", "x"])


def test_what_a_terminal_cannot_show_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    streams = {name: io.TextIOWrapper(io.BytesIO(), "ascii") for name in ("stdin", "stdout", "stderr")}
    for name, stream in streams.items():
        monkeypatch.setattr(sys, name, stream)
    with pytest.raises(SystemExit):
        main(["--version"])
    assert {stream.errors for stream in streams.values()} == {"replace"}


def test_ctrl_cs_handler_is_put_back_and_a_callers_own_is_kept() -> None:
    def mine(number: int, frame: Any) -> None: ...

    seen = []
    before = signal.getsignal(signal.SIGINT)
    try:
        for handler in (signal.default_int_handler, mine, signal.SIG_IGN):
            signal.signal(signal.SIGINT, handler)

            class Stream(io.StringIO):
                def write(self, text: str) -> int:
                    seen.append(signal.getsignal(signal.SIGINT))
                    return len(text)

            with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
                patch.setattr(sys, "stdout", Stream())
                main(["--version"])
            assert signal.getsignal(signal.SIGINT) is handler
            assert (seen[-1] is handler) is (handler is not signal.default_int_handler)
    finally:
        signal.signal(signal.SIGINT, before)


def test_the_program_runs_in_a_thread_too() -> None:
    codes = []

    def run() -> None:
        try:
            main(["--version"])
        except SystemExit as left:
            codes.append(left.code)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(30)
    assert codes == [0]


def test_the_kits_options_reach_pytest(ktcore: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []

    def run(arguments: list[str]) -> int:
        seen.append(arguments)
        return 5

    monkeypatch.setattr(pytest, "main", run)
    assert ktcore("conformance", "run", "--backend", "far").code == 5
    settings = str(conformance._settings())
    assert Path(settings).is_file()
    common = ["-p", "ktcore.conformance.plugin", "--pyargs", "ktcore.conformance", "--tb=short", "-q", "-c", settings]
    assert seen[-1] == [*common, "--backend", "far", "--seed", "0"]
    words = ("--level", 0, "--seed", 7, "--report", "r.json", "--case", "L1.*", "--case", "L2")
    assert ktcore("conformance", "run", "--backend", "far:1", *words).code == 5
    chosen = ["--level", "0", "--report", "r.json", "--case", "L1.*", "--case", "L2"]
    assert seen[-1] == [*common, "--backend", "far:1", "--seed", "7", *chosen]
    refused = ktcore("conformance", "run")
    assert refused.code == 2
    assert "name the backend to test" in refused.err
    assert len(seen) == 2


def test_the_kit_lists_renders_and_compares(ktcore: Run, tmp_path: Path) -> None:
    out = ktcore("conformance", "run", "--list", "--case", "L0.packaging.*").out
    assert "L0.packaging.inert  " in out
    assert all(line.startswith("L0.packaging.") for line in out.splitlines())
    assert "holds no report" in ktcore("conformance", "render", tmp_path).err
    reports = sorted((Path(__file__).parents[2] / "docs/conformance").glob("*.json"))
    folder = tmp_path / "[of] a folder" / ("x" * 200)
    folder.mkdir(parents=True)
    copied = folder / reports[0].name
    copied.write_text(reports[0].read_text())
    done = ktcore("conformance", "render", folder)
    assert done.out == f"wrote {folder / 'matrix.md'}\nwrote {folder / 'matrix.html'}\n"
    assert "cpu" in (folder / "matrix.md").read_text()
    same = ktcore("conformance", "compare", copied, copied)
    assert (same.code, same.out) == (0, "nothing changed\n")


def test_what_changed_between_reports_is_a_line_each_as_it_is_written(ktcore: Run, tmp_path: Path) -> None:
    report = json.loads((Path(__file__).parents[2] / "docs/conformance/cpu.json").read_text())
    case = next(each for each in report["results"] if each["status"] == "PASS")
    reason = "of [rows] " + "x " * 200 + "[/]"
    for name, result in (("old", case), ("new", {**case, "status": "FAIL", "reason": reason})):
        (tmp_path / f"{name}.json").write_text(json.dumps({**report, "results": [result]}))
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    worse, better = ktcore("conformance", "compare", old, new), ktcore("conformance", "compare", new, old)
    assert worse.out == f"worse  {case['id']}: PASS -> FAIL ({reason})\n1 changed, 1 of them for the worse\n"
    assert better.out == f"       {case['id']}: FAIL -> PASS\n1 changed, 0 of them for the worse\n"
    assert (worse.code, better.code) == (1, 0)


def test_a_new_backends_names(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, ktcore: Run) -> None:
    for name in ("Acme", "9x", "a-b", "", "x.y"):
        with pytest.raises(KtcoreError, match="lower-case letters"):
            _write(name, tmp_path / "x")
    for name, why in (("class", "a word of Python"), ("match", "a word of Python"), ("json", "a module of Python")):
        assert why in (new_backend._taken(name) or "")
    assert "it means something else" in (new_backend._taken("auto") or "")
    assert "an installed backend has it" in (new_backend._taken("cpu") or "")
    assert new_backend._taken("pytest") is None  # an entry point, but no backend's
    assert "a package ktcore_cpu is installed" in (_taken_without_entries("cpu", monkeypatch) or "")
    assert new_backend._taken("acme_board") is None
    target = tmp_path / "deep" / "er" / "board"
    done = ktcore("new-backend", "acme_board", "--to", target)
    assert done.code == 0
    assert done.out.startswith(f"wrote {target}; its README.md says what to implement next:\n\n")
    assert (target / "README.md").read_text() in done.out
    assert (target / "ktcore_acme_board").is_dir()
    assert list(target.rglob("acme_board.yaml"))
    assert not list(target.rglob("*.tmpl"))
    assert "AcmeBoard" in "".join(path.read_text() for path in target.rglob("*.py"))
    assert f"{target} exists already" in ktcore("new-backend", "acme_board", "--to", target).err
    monkeypatch.chdir(tmp_path)
    assert ktcore("new-backend", "acme_board").code == 0
    assert (tmp_path / "ktcore-acme_board").is_dir()


def _write(name: str, target: Path) -> None:
    new_backend.write_package(name, target)


def _taken_without_entries(name: str, monkeypatch: pytest.MonkeyPatch) -> str | None:
    with monkeypatch.context() as patch:
        patch.setattr("importlib.metadata.entry_points", lambda **given: [])
        return new_backend._taken(name)


def test_a_prompt_is_shown_to_people_and_ctrl_c_there_says_how_to_leave(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: True))
    typed: list[Any] = [KeyboardInterrupt(), "a line", EOFError()]
    prompts = []

    def asked(prompt: str) -> str:
        prompts.append(prompt)
        given = typed.pop(0)
        if isinstance(given, BaseException):
            raise given
        return str(given)

    monkeypatch.setattr("builtins.input", asked)
    assert chat._read_line() == "a line"
    assert capsys.readouterr() == ("\n", "(Ctrl-D leaves)\n")
    assert chat._read_line() is None
    assert capsys.readouterr() == ("\n", "")
    assert prompts == [chat.PROMPT] * 3
    monkeypatch.setattr("sys.stdin", io.StringIO("x\n"))
    assert [chat._read_line(), chat._read_line()] == ["x\n", None]


def _choice(spec: Any, nbytes: int, **given: Any) -> Any:
    node = SimpleNamespace(spec=spec, weights={"w": SimpleNamespace(nbytes=nbytes)})
    node.walk = lambda: [node]
    plain = {"implementation": SimpleNamespace(fused=False), "packed_bytes": 0, "experts": None, "device": "far:0"}
    return SimpleNamespace(node=node, **{**plain, **given})


def _experts(**given: Any) -> Any:
    spec = object.__new__(ExpertsSpec)
    for name, value in given.items():
        object.__setattr__(spec, name, value)
    return spec


def test_what_a_step_reads_of_experts_rows_and_packed_weights() -> None:
    rows = object.__new__(EmbeddingSpec)
    object.__setattr__(rows, "vocab", 100)
    some = _experts(experts=8, top_k=2)
    kept = SimpleNamespace(keep=1)
    more = SimpleNamespace(keep=5)
    none = SimpleNamespace(keep=None)
    for choice, expected in (
        (_choice(rows, 1000), 10),
        (_choice(some, 800), 200),
        (_choice(some, 800, experts=kept), 100),
        (_choice(some, 800, experts=more), 200),
        (_choice(some, 800, experts=none), 200),
        (_choice(object(), 800), 800),
        (_choice(object(), 800, packed_bytes=400), 400),
        (_choice(object(), 0, packed_bytes=400), 0),
    ):
        plan: Any = SimpleNamespace(choices={"n": choice})
        assert measure.decode_read_bytes(plan, {"far:0"}) == expected
        assert measure.decode_read_bytes(plan, {"cpu:0"}) == 0
    parts = _choice(object(), 100)
    child = SimpleNamespace(spec=object(), weights={"w": SimpleNamespace(nbytes=50)})
    parts.node.walk = lambda: [parts.node, child]
    plan = SimpleNamespace(choices={"n": parts})
    assert measure.decode_read_bytes(plan, {"far:0"}) == 100
    parts.implementation.fused = True
    assert measure.decode_read_bytes(plan, {"far:0"}) == 150


def test_medians_are_of_each_figure() -> None:
    rounds = [measure.Round(1, 30), measure.Round(2, 10), measure.Round(9, 20)]
    assert measure.median(rounds) == measure.Round(2, 20)
    assert 2**20 < measure.peak_memory() < 2**40
    assert measure.WARM_UP == (32, 2)
