"""Contracts of the whole tree: imports point one way, the core names no vendor, importing starts nothing."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CORE = sorted((ROOT / "ktcore").rglob("*.py"))
VENDOR = re.compile(
    r"(?<![a-z])(cuda\w*|hip\w*|cudnn|rocm\w*|amdgpu|xpu\w*|npu\w*|sycl|nvidia|ascend|torch_npu|ipex)(?![a-z])",
    re.IGNORECASE,
)


LINT_IMPORTS = "import sys; from importlinter import cli; sys.exit(cli.lint_imports(sys.argv[1], no_cache=True))"


def test_imports_point_one_way() -> None:
    """In a process of its own: import-linter sets up logging, which disables every logger that exists by then."""
    command = [sys.executable, "-c", LINT_IMPORTS, str(ROOT / ".importlinter")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("path", CORE, ids=[str(path.relative_to(ROOT)) for path in CORE])
def test_the_core_names_no_vendor(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    named = [f"{number}: {line.strip()}" for number, line in enumerate(lines, 1) if VENDOR.search(line)]
    assert not named, named


@pytest.mark.parametrize("text", ["torch.cuda.empty_cache()", "CUDAGraph", "an XPU", "hipLaunchHostFunc", "x='npu:0'"])
def test_the_vendor_pattern_finds_vendors(text: str) -> None:
    assert VENDOR.search(text)


@pytest.mark.parametrize("text", ["input = output", "relationship", "descending", "inputs"])
def test_the_vendor_pattern_leaves_words_alone(text: str) -> None:
    assert not VENDOR.search(text)


def test_no_source_file_is_too_long() -> None:
    sources = [*CORE, *(ROOT / "backends").rglob("*.py")]
    assert not [str(path) for path in sources if len(path.read_text(encoding="utf-8").splitlines()) > 500]


@pytest.mark.parametrize("path", CORE, ids=[str(path.relative_to(ROOT)) for path in CORE])
def test_every_module_opens_with_a_docstring(path: Path) -> None:
    assert path.read_text(encoding="utf-8").startswith('"""')


IMPORTS_NOTHING = """
import sys, threading
import ktcore
heavy = {name.split(".")[0] for name in sys.modules} & {"torch", "transformers", "gguf", "numpy", "pluggy"}
assert not heavy, heavy
assert threading.active_count() == 1
"""
STARTS_NOTHING = """
import sys, threading
before = threading.active_count()
import ktcore.engine.model, ktcore.rules.prepare, ktcore.backend
import torch
loaded = {name.split(".")[0] for name in sys.modules}
assert not loaded & {"transformers", "ktcore_cpu", "torch_npu", "triton"}, loaded
assert not torch.cuda.is_initialized()
assert threading.active_count() == before
"""


@pytest.mark.parametrize("code", [IMPORTS_NOTHING, STARTS_NOTHING], ids=["ktcore", "the rooms"])
def test_importing_starts_nothing(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
