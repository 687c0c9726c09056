"""Mutation testing itself: which faults it finds, that they are in the right place, and that a copy is what runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.mutation import mutants, rooms, run

ROOT = Path(__file__).parents[2]


def becomes(line: str) -> set[str]:
    """What a line of a function can turn into."""
    source = f"def f(a, b):\n    {line}\n".encode()
    return {m.lines(source)[1] for m in mutants.find("f.py", source)}


@pytest.mark.parametrize(
    ("line", "faults"),
    [
        ("a = a < b", {"a = a <= b"}),
        ("a = a is not b", {"a = a is b"}),
        ("a = b in a", {"a = b not in a"}),
        ("a = a + b * 2", {"a = a - b * 2", "a = a + b / 2", "a = a + b * 3"}),
        ("a = a or b", {"a = a and b"}),
        ("a = not b", {"a = b"}),
        ("a = True", {"a = False"}),
        ("a += b", {"a -= b", "pass"}),
        ("return a", {"return None"}),
        ("return None", set()),
        ("return False", {"return True"}),
        ("a = zip(a, b, strict=True)", set()),
        ("a.clear()", {"pass"}),
        ("raise ValueError('1' + str(2))", {"pass"}),
        ("a = f(a, b=b)", {"a = f(a, )"}),
        ("a = b if a else f", {"a = b if not (a) else f"}),
    ],
)
def test_a_line_has_these_faults(line: str, faults: set[str]) -> None:
    assert becomes(line) == faults


@pytest.mark.parametrize(
    "line", ["a: int | None", "'a < b'", "__all__ = ['a', 2]", "log.info('x')", "from a import b", "a = int | None"]
)
def test_what_is_for_people_or_types_is_left_alone(line: str) -> None:
    assert becomes(line) == set()


def test_letters_of_several_bytes_before_a_fault_do_not_move_it() -> None:
    assert "a = 'ä€' < b" in {m.lines(s)[0] for s in ["a = 'ä€' < b\n".encode()] for m in mutants.find("f.py", s)}
    source = "a = 'ä€' < b\n".encode()
    assert [m.lines(source)[1] for m in mutants.find("f.py", source)] == ["a = 'ä€' <= b"]


@pytest.mark.parametrize("room", sorted(rooms.ROOMS))
def test_a_room_is_a_folder_with_tests(room: str) -> None:
    assert (ROOT / rooms.source(room)).is_dir()
    assert any((ROOT / "tests" / tests).exists() for tests in rooms.ROOMS[room])


def test_interpreters_import_the_copy_although_the_packages_are_installed_editable(tmp_path: Path) -> None:
    copy = tmp_path.resolve() / "copy"
    for package in ("ktcore", "backends/sim/ktcore_sim"):
        (copy / package).mkdir(parents=True)
        (copy / package / "__init__.py").write_text("COPIED = True\n")
    places = [ROOT / "tests/mutation/redirect", copy, copy / "backends/sim"]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, places)),
        "KTCORE_MUTANT_COPY": str(copy),
        "KTCORE_MUTANT_ROOT": str(ROOT),
    }
    code = "import ktcore, ktcore_sim; print(ktcore.COPIED, ktcore_sim.COPIED)"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout.split() == ["True", "True"], done.stderr


def test_a_fault_is_shown_to_one_file_of_quick_tests_before_all_others() -> None:
    record = {"seconds": {"a.py::1": 0.1, "a.py::2": 0.1, "b.py::1": 9.0, "b.py::2": 9.0, "b.py::3": 9.0}}
    asked = {"file": "x.py", "tests": list(record["seconds"]), "seconds": 30}
    first, rest = run.waves(record, asked)
    assert first == asked | {"tests": ["a.py::1", "a.py::2"]}
    assert rest == asked | {"tests": ["b.py::1", "b.py::2", "b.py::3"]}
    assert run.waves(record, asked | {"tests": ["a.py::2"]}) == [asked | {"tests": ["a.py::2"]}]


def test_what_a_module_says_once_is_shown_to_those_who_come_into_it_and_then_to_all_others() -> None:
    source = b"SIZE = 4\n\n\ndef f(n=2):\n    return n * SIZE\n"
    lines = {"1": ["t::first"], "4": ["t::first"], "5": ["t::user"]}
    seconds = {"t::first": 1.0, "t::user": 0.1, "t::other": 0.2}
    record = {"lines": {"m.py": lines}, "early": {}, "seconds": seconds, "failed": []}

    def asked(file: str, line: int) -> list[str]:
        return run.order(record, mutants.Mutant(file, line, 0, 0, "", line), 60.0, source)["tests"]

    assert asked("m.py", 1) == ["t::user", "t::first", "t::other"]  # a constant
    assert asked("m.py", 4) == ["t::user", "t::first", "t::other"]  # a default
    assert asked("m.py", 5) == ["t::user"]  # a statement of the function
    record["early"] = {"m.py": [5]}  # parameters of tests come out of it
    assert asked("m.py", 5) == ["t::user", "t::other", "t::first"]
    lines["5"] = []
    assert asked("m.py", 1) == ["t::user", "t::other", "t::first"]  # a table that no function of its module reads


@pytest.mark.parametrize(
    ("codes", "found"),
    [((0,), 0), ((0, 1), 1), ((90, 1), 1), ((90, 0), 0), ((0, 90), 0), ((90, 90), 90), (("timeout", 0), "timeout")],
)
def test_tests_that_never_saw_the_fault_say_nothing_of_it(codes: tuple[object, ...], found: object) -> None:
    assert run.verdict(iter(codes)) == found


def test_a_file_that_no_test_runs_is_no_reason_to_end() -> None:
    record = {"lines": {"m.py": {"1": [], "2": ["t::one"]}, "n.py": {"1": []}}}
    assert run.astray(record, "m.py", run.NOT_THE_MUTANT)
    assert not run.astray(record, "m.py", 0)
    assert not run.astray(record, "n.py", run.NOT_THE_MUTANT)
    assert not run.astray(record, "never.py", run.NOT_THE_MUTANT)


def test_survivors_are_found_again_by_their_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "ktcore").mkdir()
    (tmp_path / "ktcore/x.py").write_text("b = 5\na = b < 3\n")
    last = tmp_path / "last.json"
    alive = [
        {"file": "ktcore/x.py", "lines": ["a = b < 3", "a = b <= 3"]},
        {"file": "ktcore/x.py", "lines": ["a = b > 3", "a = b >= 3"]},
    ]
    last.write_text(json.dumps(alive))
    (found,), excused = run.again(tmp_path, "x", last)
    assert (found.lines((tmp_path / "ktcore/x.py").read_bytes()), excused) == (("a = b < 3", "a = b <= 3"), 0)
    assert "gone from ktcore/x.py: a = b > 3  ->  a = b >= 3" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="has had no run yet"):
        run.again(tmp_path, "x", tmp_path / "absent.json")
