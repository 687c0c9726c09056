"""Everything that is worth running on a machine with an NVIDIA GPU, by one command, without a network.

    python tests/vendors/gpu.py                 results under $OUT, or benchmarks/results/
    python tests/vendors/gpu.py --simulate      the same steps on the simulated device: shows that they run

Needs torch, triton, a C++ compiler, cmake, ninja and pybind11; nvcc for the CUDA C++ kernels. Python packages that are
missing come from the folder `wheels/` when there is one. Nothing is installed: packages of this repository are found
through entry points written under build/. A step that fails is recorded, and the others go on.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
WORK = ROOT / "build" / "gpu"
BACKENDS = ("cuda", "rocm", "xpu", "npu", "sim")
BUDGET = 470.0
SMOLLM2 = "SmolLM2-135M-Instruct.Q4_1.gguf"


@dataclass(frozen=True)
class Step:
    """A command with its own limit in seconds; `output` is a file that its standard output goes to."""

    name: str
    command: tuple[str, ...]
    limit: float
    output: str = ""
    needs: Path | None = None


def main() -> int:
    """Run the steps; the exit status is 1 when one of them failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--simulate", action="store_true")
    parser.add_argument("--only", action="append", help="this step alone; may be repeated")
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds for all steps")
    given = parser.parse_args()
    out = Path(os.environ.get("OUT") or ROOT / "benchmarks" / "results")
    out.mkdir(parents=True, exist_ok=True)
    WORK.mkdir(parents=True, exist_ok=True)
    chip = "simulated" if given.simulate else _chip()
    found = [s for s in steps(chip, out, given.simulate) if not given.only or s.name in given.only]
    return run(found, out, chip, given.budget)


def steps(chip: str, out: Path, simulate: bool) -> list[Step]:
    """In order of worth: what comes last is what a short budget cuts."""
    python = sys.executable
    fake = ("--simulate",) if simulate else ()
    ktcore = (python, "-c", "from ktcore.cli.main import main; main()")
    kit = ("conformance", "run", "--backend", "cuda", "--report", str(out / f"cuda-{chip}.json"))
    if simulate:
        kit = ("tests/vendors/simulate.py", "--backend", "cuda", "--", *kit, "--level", "1")
    hybrid = (python, "benchmarks/device_hybrid.py", *fake)
    short = ("--new", "2", "--prompt", "4") if simulate else ()
    made = WORK / "qwen3-30b-a3b-shape.gguf"
    smollm2 = next((p for p in _places(SMOLLM2) if p.is_file()), ROOT / SMOLLM2)
    size = ("--small", "--layers", "2") if simulate else ("--layers", "12")
    return [
        Step("packages", (python, "-c", "import tests.vendors.gpu as g; g.packages()"), 60),
        Step("native", (python, "-c", "import tests.vendors.gpu as g; g.native()"), 200),
        Step("doctor", (*ktcore, "doctor"), 60, "doctor.txt"),
        Step("kit", (python, *kit) if simulate else (*ktcore, *kit), 180),
        Step("kernels", (python, "benchmarks/device_kernels.py", *fake), 90, f"kernels-{chip}.json"),
        Step("synthetic model", (python, "benchmarks/synthetic_gguf.py", *size, str(made)), 60),
        Step("hybrid", (*hybrid, str(made), "--handoff", *short), 150, f"hybrid-{chip}.json", made),
        Step("smollm2", (*hybrid, str(smollm2), *(short or ("--reference",))), 90, f"smollm2-{chip}.json", smollm2),
        Step("resident", (*hybrid, str(made), "--resident", *short), 120, f"resident-{chip}.json", made),
    ]


def run(found: list[Step], out: Path, chip: str, budget: float) -> int:
    """Run them within the budget; `gpu-<chip>.json` tells after each how it ended."""
    began, ended = time.monotonic(), []
    for step in found:
        left = budget - (time.monotonic() - began)
        result = _run(step, out, min(step.limit, left)) if left > 5 else {"status": "no time left"}
        ended.append({"step": step.name, **result})
        sys.stdout.write(f"{step.name}: {result['status']} ({result.get('seconds', 0)} s)\n")
        sys.stdout.flush()
        summary = {"chip": chip, "machine": _machine(), "steps": ended}
        (out / f"gpu-{chip}.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    return int(any(e["status"] != "done" for e in ended))


def _run(step: Step, out: Path, limit: float) -> dict[str, object]:
    if step.needs is not None and not step.needs.is_file():
        return {"status": f"{step.needs.name} is not there"}
    began = time.monotonic()
    log = out / f"{step.name.replace(' ', '-')}.log"
    try:
        with log.open("w", encoding="utf-8") as errors, ExitStack() as files:
            output = files.enter_context((out / step.output).open("w", encoding="utf-8")) if step.output else errors
            code = subprocess.run(
                step.command, cwd=ROOT, env=environment(), stdout=output, stderr=errors, timeout=limit, check=False
            ).returncode
    except subprocess.TimeoutExpired:
        code = -1
    status = "done" if code == 0 else f"stopped after {limit:.0f} s" if code == -1 else f"failed with {code}"
    result: dict[str, object] = {"status": status, "seconds": round(time.monotonic() - began, 1)}
    if code:
        result["end of its log"] = log.read_text(encoding="utf-8", errors="replace")[-2000:]
    elif log.stat().st_size == 0:
        log.unlink()
    return result


def environment() -> dict[str, str]:
    """Paths of the repository's packages, their entry points, and those of `wheels/`, before what is there."""
    paths = [
        ROOT,
        WORK / "entry_points",
        *(ROOT / "backends" / b for b in (*BACKENDS, "cpu", "triton")),
        WORK / "packages",
    ]
    known = os.environ.get("PYTHONPATH", "")
    return {**os.environ, "PYTHONPATH": os.pathsep.join([*map(str, paths), *([known] if known else [])])}


def packages() -> None:
    """What an installer would do: entry points, and the packages that were brought along."""
    names = {"ktcore": "cpu = ktcore_cpu.plugin", **{f"ktcore-{b}": f"{b} = ktcore_{b}.plugin" for b in BACKENDS}}
    for name, entry in names.items():
        folder = WORK / "entry_points" / f"{name.replace('-', '_')}-0.1.0.dist-info"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.1.0\n", encoding="utf-8")
        text = f"[ktcore.backends]\n{entry}\n"
        if name == "ktcore":
            text += "[pytest11]\nktcore_conformance = ktcore.conformance.entry\n"
        (folder / "entry_points.txt").write_text(text, encoding="utf-8")
    wheels = sorted(map(str, (ROOT / "wheels").glob("*.whl")))
    if wheels:
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--upgrade"]
        subprocess.run([*pip, "--target", str(WORK / "packages"), *wheels], check=True)


def native() -> None:
    """The CPU backend's native module, built in place."""
    import pybind11

    build, here = WORK / "native", sys.executable
    configure = ["cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja", f"-DPython_EXECUTABLE={here}"]
    configure += [f"-DPYTHON_EXECUTABLE={here}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"]
    subprocess.run(configure, check=True)
    subprocess.run(["cmake", "--build", str(build)], check=True)
    made = next(build.glob("csrc/_native*.so"))
    target = ROOT / "backends" / "cpu" / "ktcore_cpu" / made.name
    # never into a file that a running process has mapped
    target.with_suffix(".new").write_bytes(made.read_bytes())
    target.with_suffix(".new").replace(target)


def _chip() -> str:
    import torch

    if not torch.cuda.is_available():
        raise SystemExit("torch finds no CUDA device here; --simulate shows the steps without one")
    return "sm_{}{}".format(*torch.cuda.get_device_capability(0))


def _machine() -> dict[str, object]:
    import torch

    return {"torch": torch.__version__, "cuda": torch.version.cuda, "cores": len(os.sched_getaffinity(0))}


def _places(name: str) -> list[Path]:
    cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "ktcore"
    return [ROOT / name, ROOT / "wheels" / name, cache / name]


if __name__ == "__main__":
    sys.exit(main())
