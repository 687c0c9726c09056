"""Instruction sets: which are offered, how one is forced, and that no opcode leaves the unit built for it."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator

import pytest
from ktcore_cpu import _native

UNITS = ["scalar", "avx2", "avx512", "avx512_vnni", "avx512_bf16"]
NEEDS = {"avx2": "avx2", "avx512": "avx512bw", "avx512_vnni": "avx512_vnni", "avx512_bf16": "avx512_bf16"}


def test_offered_sets_are_those_whose_flags_the_cpu_has() -> None:
    here, flags = _native.isa_supported(), _native.cpu_flags()
    assert here == [u for u in UNITS if u == "scalar" or NEEDS[u] in flags]


@pytest.mark.parametrize("isa", _native.isa_supported())
def test_each_offered_set_can_be_forced(monkeypatch: pytest.MonkeyPatch, isa: str) -> None:
    monkeypatch.setenv("KTCORE_ISA", isa)
    assert _native.isa_selected() == isa


def test_the_highest_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    for value in (None, ""):
        monkeypatch.delenv("KTCORE_ISA", raising=False)
        if value is not None:
            monkeypatch.setenv("KTCORE_ISA", value)
        assert _native.isa_selected() == _native.isa_supported()[-1]


def test_an_unknown_set_is_refused_with_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KTCORE_ISA", "sse9")
    with pytest.raises(ValueError, match=r"sse9 is not known \(known: scalar, avx2, .*this CPU has: scalar"):
        _native.Pool(1)


@pytest.mark.parametrize("isa", [u for u in UNITS if u not in _native.isa_supported()])
def test_a_set_the_cpu_lacks_is_refused_with_what_it_has(monkeypatch: pytest.MonkeyPatch, isa: str) -> None:
    monkeypatch.setenv("KTCORE_ISA", isa)
    with pytest.raises(ValueError, match=rf"{isa} is not supported .*lacks \S+.*it has: scalar"):
        _native.Pool(1)


def functions_by_unit(path: str) -> Iterator[tuple[str, str, str]]:
    """(unit, function, its assembly) of a shared library that was not stripped; unit "" is shared code.

    A function belongs to a unit by its namespace, or because it is local to the unit's object file.
    """
    table = subprocess.run(["objdump", "-t", path], capture_output=True, text=True, check=True).stdout
    file, files = "", {}
    for line in table.splitlines():
        if found := re.match(r"[0-9a-f]+ l +df \*ABS\*\s+[0-9a-f]+ ?(.*)", line):
            file = found[1].strip().removesuffix(".cpp")
        elif found := re.match(r"([0-9a-f]+) l.{5}F \.text\s+[0-9a-f]+ ", line):
            files[int(found[1], 16)] = file
    if not files:
        return
    command = ["objdump", "-d", "--no-show-raw-insn", path]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for part in re.split(r"\n\n(?=[0-9a-f]+ <)", text):
        if not (found := re.match(r"([0-9a-f]+) <(\S+)>:", part)):
            continue
        address, name = int(found[1], 16), found[2]
        if space := re.search(r"6ktcore(\d+)isa_", name):
            yield name[space.end() : space.end() + int(space[1]) - len("isa_")], name, part
        else:
            yield files[address] if files.get(address) in UNITS else "", name, part


@pytest.mark.skipif(shutil.which("objdump") is None, reason="needs binutils")
def test_no_opcode_outside_the_unit_of_its_instruction_set() -> None:
    wide = re.compile(r"%zmm|%[xy]mm(?:1[6-9]|2\d|3[01])\b|%k[0-7]\b")
    vex = re.compile(r"%ymm|\tv[a-z0-9]+ ")
    tiles = re.compile(r"%tmm|tilerelease|ldtilecfg")
    seen, wrong = set(), []
    for unit, name, code in functions_by_unit(_native.__file__):
        for opcodes, units in ((wide, UNITS[2:]), (vex, UNITS[1:]), (tiles, UNITS[5:])):
            if opcodes.search(code):
                seen.add(unit)
                if unit not in units:
                    wrong.append((unit, name))
    if not seen:
        pytest.skip("the module was stripped of its symbols, or is not for x86-64")
    assert not wrong
    assert set(UNITS[1:]) <= seen


@pytest.mark.skipif(shutil.which("objdump") is None, reason="needs binutils")
def test_newer_avx512_opcodes_stay_in_the_units_that_need_them() -> None:
    found: dict[str, set[str]] = {}
    for unit, _, code in functions_by_unit(_native.__file__):
        for opcode in re.findall(r"\t(vpdpbusd|vcvtne2?ps2?bf16|vdpbf16ps)", code):
            found.setdefault(unit, set()).add(opcode)
    if not found:
        pytest.skip("the module was stripped of its symbols, or is not for x86-64")
    assert found.keys() <= {"avx512_vnni", "avx512_bf16", "amx"}
    assert found["avx512_vnni"] == {"vpdpbusd"}
