"""What commands show to people, letter by letter, of results that are given."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ktcore.cli import quality, terminal
from ktcore.cli.commands import bench, convert, doctor
from ktcore.cli.commands.plan import _fits
from ktcore.errors import KtcoreError
from ktcore.placement.memory import DeviceMemory
from ktcore.placement.topology import Topology

from .conftest import Run

FOUND: dict[str, Any] = {
    "ktcore": "1.2",
    "python": "3.9",
    "executable": "/bin/py[x]",
    "packages": {"torch": "2.0", "gguf": None},
    "torch": {"built_for": None, "usable": False, "advice": None},
    "rule_folders": ["/rules/a", "/rules/b"],
    "machine": {
        "os": "Linux 6 x86_64",
        "cpu": "An abacus",
        "logical_cpus": 8,
        "physical_cores": 4,
        "core_capacities": [1.0, 1.0, 0.55, 0.55],
        "cpu_quota": 2.5,
        "numa_nodes": [{"id": 0, "cpus": [0, 1], "memory_bytes": 2**30}, {"id": 1, "cpus": [2], "memory_bytes": 2**31}],
        "memory_bytes": 3 * 2**30,
        "memory_available_bytes": 2**30,
        "memory_limit_bytes": 2**31,
    },
    "host": {
        "backend": "cpu",
        "features": ["fast", "isa:wood"],
        "properties": {"isa_supported": "wood stone", "threads": 4, "numa": "replicas", "cpu_flags": "flag1 flag2"},
    },
    "backends": [
        {"name": "cpu", "state": "loaded", "reason": "it is here", "distribution": "ktcore 1.2", "traceback": ""},
        {"name": "torn", "state": "broken", "reason": "[half]", "distribution": "torn 1", "traceback": "Traceback: x"},
    ],
    "auto": {"backend": None, "reason": "nobody is there"},
}
DOCTOR = """\
ktcore        1.2
Python        3.9 (/bin/py[x])
packages      torch 2.0, gguf not installed
torch         built for CPUs alone
rule files    /rules/a, /rules/b
system        Linux 6 x86_64
CPU           An abacus
cores         4 physical (2 of 100%, 2 of 55%), 8 logical that this process may use, 2.5 CPUs' worth of time
instructions  wood in use; supported: wood stone (set KTCORE_ISA to force a lower one)
threads       4
NUMA          replicas
NUMA nodes    0: 2 CPUs, 1.0 GiB; 1: 1 CPUs, 2.0 GiB
memory        3.0 GiB, 1.0 GiB available, control group limit 2.0 GiB

backend  state   from        reason
cpu      loaded  ktcore 1.2  it is here
torn     broken  torn 1      [half]

auto takes nothing: nobody is there
"""
ROUNDS = [{"prefill_tok_s": 90.0, "decode_tok_s": 9.0}, {"prefill_tok_s": 110.0, "decode_tok_s": 12.0}]
BENCH: dict[str, Any] = {
    "prefill_tok_s": 100.0,
    "decode_tok_s": 10.0,
    "rounds": ROUNDS,
    "prompt_tokens": 512,
    "new_tokens": 128,
    "guesses": None,
    "load_s": 1.5,
    "peak_rss_bytes": 2**30,
    "read_gb_s": 20.0,
    "decode_read_share": 0.5,
    "decode_read_bytes": 10**9,
    "devices": ["cpu:0"],
    "decode_graphs": False,
    "no_decode_graphs": "not asked for",
    "threads": 4,
    "isa": "wood",
}
SPEEDS = """\
prefill         100.0    tok/s over 512 tokens (90.0 to 110.0)
decode          10.0     tok/s over 128 tokens (9.0 to 12.0)
load            1.50     s
peak memory     1.0 GiB
memory reads    20.0     GB/s streaming, measured now
decode's share  50%      of that, reading 953.7 MiB of weights a token
"""


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.delenv("KTCORE_ISA", raising=False)


def shown(capsys: pytest.CaptureFixture[str]) -> str:
    """stdout, without the spaces that fill lines up."""
    return "".join(f"{line.rstrip()}\n" for line in capsys.readouterr().out.splitlines())


def columns(text: str) -> list[list[str]]:
    """Cells of a table, whichever way they are aligned."""
    return [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in text.splitlines()]


def test_doctor(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    doctor._show(FOUND, False)
    assert shown(capsys) == DOCTOR + "--verbose shows the tracebacks.\n"
    doctor._show(FOUND, True)
    more = DOCTOR.replace("NUMA nodes", "CPU features  flag1 flag2\nNUMA nodes")
    assert shown(capsys) == more + "\ntorn\nTraceback: x\n"
    monkeypatch.setenv("KTCORE_ISA", "stone")
    doctor._show({**FOUND, "host": {"backend": None, "reason": "no host"}, "backends": []}, False)
    out = shown(capsys)
    assert "instructions  no host\n" in out
    assert "tracebacks" not in out
    plain = {"backend": "cpu", "features": [], "properties": {}}
    machine = {**FOUND["machine"], "core_capacities": [1.0] * 4, "cpu_quota": None, "memory_limit_bytes": None}
    doctor._show({**FOUND, "host": plain, "machine": machine, "auto": {"backend": "x", "reason": "y"}}, True)
    out = shown(capsys)
    assert "instructions  not told in use (KTCORE_ISA=stone)\n" in out
    assert "threads       not told\n" in out
    assert "cores         4 physical, 8 logical that this process may use\n" in out
    assert "memory        3.0 GiB, 1.0 GiB available\n" in out
    assert "auto takes x: y\n" in out


def test_a_narrow_terminal_folds_reasons_alone(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    torn = {**FOUND["backends"][1], "name": "torn by", "distribution": "torn by its maker 1.0", "reason": "so " * 30}
    doctor._show({**FOUND, "backends": [torn]}, False)
    assert "\ntorn by  broken  torn by its maker 1.0  so so so" in shown(capsys)


def test_bench(capsys: pytest.CaptureFixture[str]) -> None:
    bench._show(BENCH)
    assert columns(shown(capsys)) == columns(SPEEDS + "4 threads, wood, median of 2\n")
    bench._show({**BENCH, "guesses": {"share": 0.75, "tokens": 40, "by": "mtp"}})
    assert re.search(r"\nguesses right +75% +of 40 that mtp made\n", shown(capsys))
    bench._show({**BENCH, "read_gb_s": None})
    assert "memory reads" not in shown(capsys)
    bench._show({**BENCH, "devices": ["a:0", "b:0"]})
    assert "\ndecode steps not captured: not asked for\n4 threads" in shown(capsys)
    bench._show({**BENCH, "decode_graphs": True})
    assert "\ndecode steps captured as a graph\n4 threads" in shown(capsys)


def test_quality(capsys: pytest.CaptureFixture[str]) -> None:
    found = {"mean_kl_nats": 0.00125, "max_kl_nats": 1.5, "top1_agreement": 0.25, "positions": 512}
    quality.show({**found, "experts": ["[one]", "two"], "text": "[book]"})
    assert shown(capsys) == (
        "mean KL divergence  1.250e-03 nats (largest 1.500e+00)\ntop-1 agreement     25.00% of 512 positions\n"
        "experts             [one]; two\nover                [book]\n"
    )
    quality.show({**found, "experts": [], "text": "t"})
    assert "experts             as usual\n" in shown(capsys)


def converted(**changes: Any) -> Any:
    graph = SimpleNamespace(walk=lambda: [])
    given = {"source_bytes": 2**30, "packed_bytes": 2**29, "kept_bytes": 2**20, "resumed_bytes": 0, "errors": None}
    return SimpleNamespace(plan=SimpleNamespace(graph=graph), folder="out[1]", **{**given, **changes})


def test_convert(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ktcore.rules.quantize.quantized_formats", lambda graph: {})
    convert._show(converted(), True)
    assert shown(capsys) == "source     1.0 GiB\npacked     512.0 MiB, by the plan\nnothing written\n"
    convert._show(converted(), False)
    plain = "source     1.0 GiB\npacked     512.0 MiB\nkept       1.0 MiB of tensors as they were\nwritten    out[1]\n"
    assert shown(capsys) == plain
    monkeypatch.setattr("ktcore.rules.quantize.quantized_formats", lambda graph: {"b": "F2", "a": "[f]1", "c": "F2"})
    convert._show(converted(resumed_bytes=2**10, errors={"moe[x]": 0.0125}), False)
    assert shown(capsys) == plain.replace("kept", "quantised  to F2, [f]1\nkept").replace(
        "written", "resumed    1.0 KiB were there, checked\nerror      moe[x]: 1.25% relative\nwritten"
    )


def test_convert_writes_checks_and_says_so(ktcore: Run, fails: Any, tiny_llama: Path, tmp_path: Path) -> None:
    folder = tmp_path / "packed"
    planned = ktcore("convert", tiny_llama, folder, "-b", "cpu", "-t", 1, "--dry-run", "--verify", "--json").json
    assert (planned["written"], folder.exists()) == (False, False)
    done = ktcore("convert", tiny_llama, folder, "--backend", "cpu", "-t", 1, "--verify", "--json").json
    assert (done["written"], done["folder"], done["resumed_bytes"]) == (True, str(folder), 0)
    assert (done["source_bytes"], done["quantization_error"]) == (planned["source_bytes"], {})
    assert done["packed_bytes"] > 0
    assert done["kept_bytes"] > 0
    assert ktcore("convert", "--verify", folder).out == f"{folder}: whole\n"
    assert "give a folder to write to" in fails("convert", tiny_llama)
    assert "not a folder that `ktcore convert` wrote" in fails("convert", "--verify", tiny_llama)
    part = max((p for p in folder.iterdir() if p.suffix != ".json"), key=lambda p: p.stat().st_size)
    data = bytearray(part.read_bytes())
    data[len(data) // 2] ^= 1
    part.write_bytes(data)
    assert f"{folder}: damaged: " in fails("convert", "--verify", folder)


def test_damage_is_named_up_to_four_times(fails: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ktcore.weights.packed import container, reader

    (tmp_path / container.MANIFEST).touch()
    monkeypatch.setattr(container, "read_manifest", lambda folder: {})
    for count, said in ((4, "a0, a1, a2, a3\n"), (6, "a0, a1, a2, a3 and 2 more\n")):
        monkeypatch.setattr(reader, "verify", lambda *words, n=count: [f"a{i}" for i in range(n)])
        assert f"{tmp_path}: damaged: {said}  hint: convert the model again" in fails("convert", "--verify", tmp_path)


def test_a_plan_of_a_model(ktcore: Run, tiny_moe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Topology, "usable_memory", 2**30)
    blocks = ktcore("plan", tiny_moe, "--backend", "cpu", "--context", 64, "--memory", "1GiB").out.split("\n\n")
    first = blocks[0].splitlines()
    assert first[0].startswith("qwen3_moe: 2 layers, hidden 64, vocabulary 256, context 512, ")
    assert first[1].rstrip() == "Planned for cpu."
    nodes, memory = (columns(block) for block in blocks[1:3])
    assert nodes[0] == ["node", "op", "layers", "count", "implementation", "device", "bytes", "why"]
    assert memory[0] == ["device", "weights", "KV, 64 tokens", "workspace", "total", "fits"]
    assert memory[1][0] == "cpu:0"
    assert memory[1][-1].startswith("yes, into 1.0 GiB of this machine; up to ")
    notes = blocks[3].splitlines()
    assert notes[0].rstrip() == "note: memory limits an accelerator, and this plan uses none"
    assert notes[-1].rstrip() == "`--explain NODE` tells more about one node."


@pytest.mark.parametrize(
    ("limit", "accelerator", "said"),
    [
        (None, True, "unknown: say with --memory what it has"),
        (None, False, "yes, into 1000 B of this machine; up to 32 tokens of context"),
        (500, True, "yes, into 500 B; up to 32 tokens of context"),
        (299, True, "no: 299 B is too little"),
        (300, True, "yes, into 300 B; up to 32 tokens of context"),
    ],
)
def test_whether_a_device_has_room(
    limit: int | None, accelerator: bool, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    topology = SimpleNamespace(usable_memory=1000)
    monkeypatch.setattr("ktcore.placement.topology.read_topology", lambda: topology)
    asked = []

    def largest(device: str, room: int) -> int:
        asked.append((device, room))
        return 32

    record = SimpleNamespace(accelerator=accelerator)
    prepared: Any = SimpleNamespace(
        plan=SimpleNamespace(largest_context=largest), registry=SimpleNamespace(known=lambda name: record)
    )
    found = _fits(prepared, "far:0", DeviceMemory(weights=150, kv=100, workspace=50, limit=limit))
    assert found == said
    if "yes" in said:
        assert asked == [("far:0", (limit or 1000) - 200)]


class Screen:
    """A stream that says whether it is a terminal."""

    def __init__(self, tty: bool) -> None:
        self.tty, self.text = tty, ""

    def isatty(self) -> bool:
        return self.tty

    def write(self, text: str) -> None:
        self.text += text

    def flush(self) -> None: ...


def test_a_table_in_a_file_is_wide_and_one_on_a_terminal_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS")
    monkeypatch.setattr(sys, "stdout", Screen(False))
    assert terminal.console().width == terminal.WIDE == 160
    monkeypatch.setenv("COLUMNS", "70")
    assert terminal.console().width == 70
    monkeypatch.delenv("COLUMNS")
    monkeypatch.setattr(sys, "stdout", Screen(True))
    assert terminal.console().width < terminal.WIDE
    monkeypatch.setattr(sys, "stderr", Screen(True))
    assert terminal.console(stderr=True).stderr


def test_errors_and_notes_stay_as_they_are_written(capsys: pytest.CaptureFixture[str]) -> None:
    terminal.show_error(KtcoreError("a [bold]word[/] of 3", "do [this]"))
    terminal.show_error(KtcoreError("alone"))
    terminal.note("[dim]x" + "y" * 300)
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err == f"error: a [bold]word[/] of 3\n  hint: do [this]\nerror: alone\n[dim]x{'y' * 300}\n"
    terminal.write_json({"é": [1]})
    assert capsys.readouterr().out == '{\n  "é": [\n    1\n  ]\n}\n'


def test_a_bar_is_for_terminals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Screen(False))
    with terminal.loading_bar("loading x") as progress:
        assert progress is None
    screen = Screen(True)
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    with terminal.loading_bar("loading x") as progress:
        assert progress is not None
        progress("layers.7", 2**20, 2**21)
    assert "loading x" in screen.text
    assert "layers.7" in screen.text
    assert "1.0/2.0 MiB" in screen.text


def test_what_was_quantised_while_loading_is_said_with_its_error(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Model:
        quantization_error = {"moe": 0.0125, "linear": 0.5}  # noqa: RUF012 - as a test's model has it
        closed = False

        def __enter__(self) -> Model:
            return self

        def __exit__(self, *error: object) -> None:
            Model.closed = True

    seen: dict[str, Any] = {}
    monkeypatch.setattr("ktcore.engine.model.load", lambda path, **given: seen.update(given) or Model())
    with terminal.opened(Path("m"), backend="far") as (loaded, took):
        assert isinstance(loaded, Model)
        assert took >= 0
        assert not Model.closed
    assert Model.closed
    assert seen == {"backend": "far", "progress": None}
    assert capsys.readouterr().err == "quantised while loading, relative error: moe 1.25%, linear 50.00%\n"


def test_a_module_is_fetched_beside_and_may_be_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    import threading

    monkeypatch.delitem(sys.modules, "this", raising=False)
    for name in ("antigravity_that_is_none", "colorsys"):
        terminal.fetched(name)
        for thread in threading.enumerate():
            if thread.name == f"import {name}":
                thread.join(10)
    assert "colorsys" in sys.modules
