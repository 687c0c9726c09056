"""Draws mutants of a room and says which ones its tests let live; `make mutants ROOM=weights N=60 SEED=0` calls it.

Works on a copy in a temporary folder. Exits with 1 when fewer than 85% of the mutants are killed. `--survivors` tries
again those that the last run of the room left alive.
"""

from __future__ import annotations

import argparse
import compileall
import hashlib
import json
import os
import py_compile
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
sys.path.insert(0, str(HERE))

import mutants  # noqa: E402
import rooms  # noqa: E402
from plugin import NOT_THE_MUTANT  # noqa: E402

LEAST = 0.85
LEFT_OUT = shutil.ignore_patterns(".*", "build", "dist", "__pycache__", "*.egg-info")
BACKENDS = ("cpu", "cuda", "rocm", "xpu", "npu", "sim", "triton")


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="Mutation testing of one room.")
    parser.add_argument("room", choices=sorted(rooms.ROOMS))
    parser.add_argument("-n", type=int, default=60, help="mutants to draw")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=60.0, help="tests that one mutant may take, quick ones first")
    parser.add_argument("--only", default="", help="draw from files whose path has this in it")
    parser.add_argument("--tests", nargs="+", help="fewer tests than the room's: what they kill is the least it kills")
    parser.add_argument("--survivors", action="store_true", help="only those that the room's last run left alive")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="ktcore-mutants-") as folder:
        copy = Path(folder).resolve() / "copy"
        shutil.copytree(ROOT, copy, ignore=LEFT_OUT)
        for code in ("ktcore", "backends"):  # checked by content, so that no mutant is taken for the file it came from
            compileall.compile_dir(copy / code, quiet=2, invalidation_mode=py_compile.PycInvalidationMode.CHECKED_HASH)
        sys.exit(0 if measure(copy, options) >= LEAST else 1)


def environment(copy: Path) -> dict[str, str]:
    """What makes every interpreter, tests' subprocesses too, import the copy."""
    places = [copy / "tests/mutation/redirect", copy, *(copy / "backends" / name for name in BACKENDS)]
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, places)),
        "KTCORE_MUTANT_COPY": str(copy),
        "KTCORE_MUTANT_ROOT": str(ROOT),
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",
    }


def measure(copy: Path, options: argparse.Namespace) -> float:
    """Rate of drawn mutants that the room's tests kill; survivors are printed as diffs."""
    room = options.room
    last = ROOT / "build/mutants" / f"{room.replace('/', '-')}.survivors.json"
    drawn, excused = again(copy, room, last) if options.survivors else draw(copy, room, options)
    record = recorded(copy, room, options.tests)
    worker = Worker(copy)
    control = order(record, drawn[0], 20.0, (copy / drawn[0].file).read_bytes())
    if control["tests"] and (code := worker.ask(control)) != 0:
        sys.exit(f"mutation: the tests fail on the copy without a fault: exit code {code}")
    killed, survivors = 0, []
    began = time.monotonic()
    for mutant in drawn:
        path = copy / mutant.file
        source = path.read_bytes()
        asked = order(record, mutant, options.seconds, source)
        if not asked["tests"]:
            code = 0
        else:
            path.write_bytes(mutant.apply(source))
            code = verdict(worker.ask(wave) for wave in waves(record, asked))
            path.write_bytes(source)
        if astray(record, mutant.file, code):
            sys.exit(f"mutation: {mutant.file} was not imported from the copy")
        if code in (0, NOT_THE_MUTANT):
            survivors.append(mutant)
            print(f"--- survived {len(asked['tests'])} tests\n{mutant.diff(source)}\n", flush=True)
        else:
            killed += 1
    rate = killed / len(drawn)
    places = [{"file": m.file, "lines": m.lines((copy / m.file).read_bytes())} for m in survivors]
    last.write_text(json.dumps(places, indent=1))
    print(
        f"{room}: {killed} of {len(drawn)} killed ({rate:.0%}), {len(survivors)} survived, {excused} equivalent ones "
        f"left out, seed {options.seed}, {time.monotonic() - began:.0f} s"
    )
    return rate


def draw(copy: Path, room: str, options: argparse.Namespace) -> tuple[list[mutants.Mutant], int]:
    """The mutants of this seed, and how many were left out because they are listed as equivalent."""
    everything = [
        mutant
        for path in sorted((copy / rooms.source(room)).rglob("*.py"))
        if options.only in str(path)
        for mutant in mutants.find(str(path.relative_to(copy)), path.read_bytes())
    ]
    listed = {(e["file"], e["line"].strip(), e["becomes"].strip()) for e in equivalent()}
    random.Random(options.seed).shuffle(everything)
    drawn, excused = [], 0
    for mutant in everything:
        if len(drawn) == options.n:
            break
        if (mutant.file, *mutant.lines((copy / mutant.file).read_bytes())) in listed:
            excused += 1
        else:
            drawn.append(mutant)
    if not drawn:
        sys.exit(f"mutation: no mutants in {room}")
    return drawn, excused


def again(copy: Path, room: str, last: Path) -> tuple[list[mutants.Mutant], int]:
    """The last run's survivors that are still there and are not listed as equivalent, and how many now are listed."""
    if not last.is_file():
        sys.exit(f"mutation: {room} has had no run yet, or its survivors were cleared away: run it without --survivors")
    listed = {(e["file"], e["line"].strip(), e["becomes"].strip()) for e in equivalent()}
    alive = {(s["file"], *s["lines"]) for s in json.loads(last.read_text())}
    found = [
        (mutant, key)
        for file in sorted({key[0] for key in alive if (copy / key[0]).is_file()})
        for source in [(copy / file).read_bytes()]
        for mutant in mutants.find(file, source)
        if (key := (file, *mutant.lines(source))) in alive
    ]
    for file, before, after in sorted(alive - {key for _, key in found}):
        print(f"gone from {file}: {before}  ->  {after}")
    if not (left := [mutant for mutant, key in found if key not in listed]):
        sys.exit(f"mutation: no survivors left in {room}")
    return left, len(found) - len(left)


def equivalent() -> list[dict[str, str]]:
    """Faults that change nothing anybody could see, each with its reason."""
    import yaml

    return yaml.safe_load((HERE / "equivalent.yaml").read_text()) or []


def order(record: dict[str, Any], mutant: mutants.Mutant, seconds: float, source: bytes) -> dict[str, Any]:
    """Tests that run the mutant's line, quick ones first; all where none does.

    What a module says once, as it is imported, is recorded for the test that imports it first, but may be seen by any
    that comes into one of its functions, and by any other that reads it from there: these are asked thereafter. So is
    what ran before any test, as parameters of tests were collected.
    """
    lines = record["lines"].get(mutant.file, {})
    # a statement's line, or the one the fault is on
    tests = set(lines.get(str(mutant.line), [])) | set(lines.get(str(mutant.at), []))
    every = set(record["seconds"]) - set(record["failed"])
    inside, others = mutants.inside_functions(source), set[str]()
    if mutant.line not in inside or mutant.line in record["early"].get(mutant.file, []):
        users = {test for line in inside for test in lines.get(str(line), [])}
        tests = tests | users if users else set()
        others = every - tests
    took = record["seconds"]
    chosen = [*_quick_ones(tests or every, took, seconds), *_quick_ones(others if tests else set(), took, seconds)]
    total = sum(took.get(test, 0.0) for test in chosen)
    return {"file": mutant.file, "tests": chosen, "seconds": 30 + 4 * min(total, 2 * seconds)}


def _quick_ones(tests: set[str], took: dict[str, float], seconds: float) -> list[str]:
    """The quickest that together take so long, one at least."""
    chosen, total = list[str](), 0.0
    for test in sorted(tests, key=lambda t: (took.get(t, 0.0), t)):
        total += took.get(test, 0.0)
        if chosen and total > seconds:
            break
        chosen.append(test)
    return chosen


def verdict(codes: Iterable[Any]) -> Any:
    """The first that is no 0. Tests that never imported the faulty file say nothing, unless none imported it."""
    seen = []
    for code in codes:
        if code not in (0, NOT_THE_MUTANT):
            return code
        seen.append(code)
    return 0 if 0 in seen else NOT_THE_MUTANT


def astray(record: dict[str, Any], file: str, code: Any) -> bool:
    """Whether tests that are known to run a file did not import the faulty one; others need not import it at all."""
    return code == NOT_THE_MUTANT and any(record["lines"].get(file, {}).values())


def waves(record: dict[str, Any], asked: dict[str, Any]) -> list[dict[str, Any]]:
    """The file of tests that has most of them for its time, and then all others: most faults cost one file's import."""
    files: dict[str, list[str]] = {}
    for test in asked["tests"]:
        files.setdefault(test.split("::")[0], []).append(test)
    took = record["seconds"]
    first = max(files.values(), key=lambda tests: len(tests) / (0.5 + sum(took.get(t, 0.0) for t in tests)))
    rest = [test for test in asked["tests"] if test not in first]
    return [asked | {"tests": tests} for tests in (first, rest) if tests]


def recorded(copy: Path, room: str, tests: list[str] | None = None) -> dict[str, Any]:
    """Which tests run which lines; kept for each file of tests below build/ until the room or that file changes."""
    files = tests or test_files(copy, room)
    kept = {file: ROOT / "build/mutants" / record_name(copy, room, file) for file in files}
    if missing := [file for file in files if not kept[file].is_file()]:
        for file in missing:
            for old in kept[file].parent.glob(f"{kept[file].name.rpartition('-')[0]}-*.json"):
                old.unlink()
        record(copy, room, {file: kept[file] for file in missing})
    joined: dict[str, Any] = {"lines": {}, "early": {}, "seconds": {}, "failed": []}
    for part in (json.loads(kept[file].read_text()) for file in files):
        joined["seconds"] |= part["seconds"]
        joined["failed"] += part["failed"]
        for file, lines in part["early"].items():
            joined["early"][file] = sorted({*joined["early"].get(file, []), *lines})
        # a test that fails without a fault (it wants git, or a build) tells nothing about one with it
        for file, lines in part["lines"].items():
            into = joined["lines"].setdefault(file, {})
            for line, names in lines.items():
                into.setdefault(line, []).extend(n for n in names if n not in part["failed"])
    if joined["failed"]:
        print(f"not asked, for they fail on the copy itself: {', '.join(joined['failed'][:10])}", file=sys.stderr)
    return joined


def test_files(copy: Path, room: str) -> list[str]:
    """The room's files of tests."""
    places = [copy / "tests" / t for t in rooms.ROOMS[room]]
    found = [path for place in places for path in ([place] if place.is_file() else place.rglob("test_*.py"))]
    return sorted({str(path.relative_to(copy)) for path in found})


def record_name(copy: Path, room: str, file: str) -> str:
    """Changes with the room, with this file of tests, and with what stands beside tests, as fixtures do."""
    watched = rooms.watched(room)
    hashed = hashlib.sha256()
    helpers = [p for p in (copy / file).parent.rglob("*.py") if not p.name.startswith("test_")]
    recorder = copy / "tests/mutation/plugin.py"
    for path in [*sorted((copy / watched).rglob("*.py")), *sorted(helpers), recorder, copy / file]:
        hashed.update(str(path.relative_to(copy)).encode() + path.read_bytes())
    return f"{watched}-{file}".replace("/", ".") + f"-{hashed.hexdigest()[:16]}.json"


def record(copy: Path, room: str, kept: dict[str, Path]) -> None:
    """Runs files of tests on the room without faults, and keeps what each recorded."""
    out = copy.parent / "record.json"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "plugin", *kept]
    settings = environment(copy)
    settings["KTCORE_MUTANT_RECORD"] = os.pathsep.join([str(copy / rooms.watched(room)), str(out)])
    settings["PYTHONPATH"] += os.pathsep + str(copy / "tests/mutation")
    done = subprocess.run(command, cwd=copy, env=settings, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if not out.is_file():
        sys.exit(f"mutation: {' '.join(kept)} could not be run:\n{done.stdout[-4000:]}")
    made = json.loads(out.read_text())
    for file, path in kept.items():
        mine = {
            "lines": {
                source: {line: [n for n in names if n.startswith(f"{file}::")] for line, names in lines.items()}
                for source, lines in made["lines"].items()
            },
            "early": made["early"],
            "seconds": {n: s for n, s in made["seconds"].items() if n.startswith(f"{file}::")},
            "failed": [n for n in made["failed"] if n.startswith(f"{file}::")],
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(mine))


class Worker:
    """The process that runs tests on mutants."""

    def __init__(self, copy: Path) -> None:
        command = [sys.executable, str(copy / "tests/mutation/worker.py")]
        self.process = subprocess.Popen(
            command, cwd=copy, env=environment(copy), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, what: dict[str, Any]) -> Any:
        """Exit code of the tests, or "timeout"."""
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(json.dumps(what) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            sys.exit("mutation: the worker ended")
        return json.loads(answer)["code"]


if __name__ == "__main__":
    main()
