"""Draws mutants of a room and says which ones its tests let live; `make mutants ROOM=weights N=60 SEED=0` calls it.

Works on a copy in a temporary folder. Exits with 1 when fewer than 85% of the mutants are killed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
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
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="ktcore-mutants-") as folder:
        copy = Path(folder).resolve() / "copy"
        shutil.copytree(ROOT, copy, ignore=LEFT_OUT)
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
    record = recorded(copy, room)
    drawn, excused = draw(copy, room, options)
    worker = Worker(copy)
    control = order(record, drawn[0], 20.0)
    if control["tests"] and (code := worker.ask(control)) != 0:
        sys.exit(f"mutation: the tests fail on the copy without a fault: exit code {code}")
    killed, survivors = 0, []
    began = time.monotonic()
    for mutant in drawn:
        path = copy / mutant.file
        source = path.read_bytes()
        asked = order(record, mutant, options.seconds)
        if not asked["tests"]:
            code = 0
        else:
            path.write_bytes(mutant.apply(source))
            code = worker.ask(asked)
            path.write_bytes(source)
        if code == NOT_THE_MUTANT:
            sys.exit(f"mutation: {mutant.file} was not imported from the copy")
        if code == 0:
            survivors.append(mutant)
            print(f"--- survived {len(asked['tests'])} tests\n{mutant.diff(source)}\n", flush=True)
        else:
            killed += 1
    rate = killed / len(drawn)
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


def equivalent() -> list[dict[str, str]]:
    """Faults that change nothing anybody could see, each with its reason."""
    import yaml

    return yaml.safe_load((HERE / "equivalent.yaml").read_text()) or []


def order(record: dict[str, Any], mutant: mutants.Mutant, seconds: float) -> dict[str, Any]:
    """Tests that run the mutant's line, quick ones first; where none does, those that run any line of its file."""
    lines = record["lines"].get(mutant.file, {})
    # a statement's line, or the one the fault is on
    tests = set(lines.get(str(mutant.line), [])) | set(lines.get(str(mutant.at), []))
    if not tests:
        tests = {test for some in lines.values() for test in some}
    took, chosen, total = record["seconds"], [], 0.0
    for test in sorted(tests, key=lambda t: (took.get(t, 0.0), t)):
        total += took.get(test, 0.0)
        if chosen and total > seconds:
            break
        chosen.append(test)
    return {"file": mutant.file, "tests": chosen, "seconds": 30 + 4 * min(total, seconds)}


def recorded(copy: Path, room: str) -> dict[str, Any]:
    """Which tests run which lines; kept below build/ until the room or its tests change."""
    tests = [f"tests/{t}" for t in rooms.ROOMS[room] if (copy / "tests" / t).exists()]
    digest = hashlib.sha256()
    for place in (rooms.source(room), *tests):
        for path in sorted((copy / place).rglob("*.py")) if (copy / place).is_dir() else [copy / place]:
            digest.update(str(path.relative_to(copy)).encode() + path.read_bytes())
    kept = ROOT / "build/mutants" / f"{room.replace('/', '-')}-{digest.hexdigest()[:16]}.json"
    if not kept.is_file():
        kept.parent.mkdir(parents=True, exist_ok=True)
        for old in kept.parent.glob(f"{room.replace('/', '-')}-*.json"):
            old.unlink()
        out = copy.parent / "record.json"
        target = os.pathsep.join([str(copy / rooms.source(room)), str(out)])
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "plugin", *tests]
        extra = {"KTCORE_MUTANT_RECORD": target}
        settings = environment(copy) | extra
        settings["PYTHONPATH"] += os.pathsep + str(copy / "tests/mutation")
        done = subprocess.run(
            command, cwd=copy, env=settings, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        if not out.is_file():
            sys.exit(f"mutation: {' '.join(tests)} could not be run:\n{done.stdout[-4000:]}")
        shutil.copy(out, kept)
    record: dict[str, Any] = json.loads(kept.read_text())
    # a test that fails without a fault (it wants git, or a build) tells nothing about one with it
    for lines in record["lines"].values():
        for line, names in lines.items():
            lines[line] = [n for n in names if n not in record["failed"]]
    if record["failed"]:
        print(f"not asked, for they fail on the copy itself: {', '.join(record['failed'][:10])}", file=sys.stderr)
    return record


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
