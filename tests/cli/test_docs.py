"""What the README and the guides say holds: examples run, commands exist, keys are described, links lead somewhere."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from textwrap import dedent, indent

import pytest
import torch

import ktcore as package
from ktcore.graph.families import GGUF_ARCHITECTURES, HF_ARCHITECTURES
from ktcore.rules import experts, match, schema
from ktcore.rules.load import read_rule_set, shipped_rules

from .conftest import Run
from .test_errors import install

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]


def _is_ours(page: Path) -> bool:
    """Not what a build or an environment left in the tree."""
    parts = page.relative_to(ROOT).parts
    return not any(part.startswith((".", "ktcore-")) or part in ("build", "dist", "node_modules") for part in parts)


ALL_PAGES = [page for page in sorted(ROOT.glob("**/*.md")) if _is_ours(page)]
NAMED_BLOCK = re.compile(r"^`([\w./]+)`:\n\n```\w+\n(.*?)^```", re.MULTILINE | re.DOTALL)


@pytest.fixture
def toy(ktcore: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The package of write-a-backend.md, as pip would install it."""
    blocks = dict(NAMED_BLOCK.findall((DOCS / "write-a-backend.md").read_text(encoding="utf-8")))
    assert set(blocks) == {"pyproject.toml", "ktcore_toy/__init__.py", "ktcore_toy/rules/toy.yaml"}
    for name, text in blocks.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    entry = re.search(r'entry-points."ktcore.backends"]\ntoy = "(\w+)"', blocks["pyproject.toml"])
    assert entry is not None
    install(tmp_path, monkeypatch, "toy", f"from {entry[1]} import *\nfrom {entry[1]} import hookimpl\n")
    monkeypatch.delitem(sys.modules, "ktcore_toy", raising=False)


@pytest.mark.usefixtures("toy")
def test_the_guides_backend_is_found_planned_for_and_run(ktcore: Run, tiny_llama: Path) -> None:
    (record,) = (r for r in ktcore("doctor", "--json").json["backends"] if r["name"] == "toy")
    assert record["state"] == "loaded"

    nodes = ktcore("plan", tiny_llama, "--backend", "toy", "--json").json["nodes"]
    assert nodes["layers.0.attn.q"]["implementation"] == "toy.linear"
    assert nodes["layers.0.attn.q"]["device"] == "toy:0"
    assert nodes["head"]["packed_bytes"] == 2 * 64 * 256

    ids = list(range(3, 40))
    with package.load(tiny_llama, backend="cpu", rules="reference") as model:
        expected = model.logits(ids)
    with package.load(tiny_llama, backend="toy") as model:
        found = model.logits(ids)
    # close, as bfloat16 is, and not equal: the toy's own code ran
    assert not torch.equal(found, expected)
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.01)


@pytest.fixture
def toy_runs(tmp_path: Path) -> Callable[..., str]:
    """The kit on the guide's backend, in a process of its own, as the guide has it run."""
    blocks = dict(NAMED_BLOCK.findall((DOCS / "write-a-backend.md").read_text(encoding="utf-8")))
    # what pip writes for its pyproject.toml
    blocks["toy-1.0.dist-info/METADATA"] = "Metadata-Version: 2.1\nName: ktcore-toy\nVersion: 1.0\n"
    blocks["toy-1.0.dist-info/entry_points.txt"] = "[ktcore.backends]\ntoy = ktcore_toy\n"
    for name, text in blocks.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)

    def run(*patterns: str) -> str:
        cases = [word for pattern in patterns for word in ("--case", pattern)]
        command = [sys.executable, "-m", "ktcore.cli.main", "conformance", "run", "--backend", "toy", *cases]
        environment = {**os.environ, "PYTHONPATH": str(tmp_path), "KTCORE_PLUGINS": "cpu,toy"}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=tmp_path)
        return done.stdout + done.stderr

    return run


def test_the_guides_backend_passes_the_guides_command(toy_runs: Callable[..., str]) -> None:
    """Of level 2 what the toy itself answers, and branches whose parts it answers."""
    said = toy_runs("L0.*", "L1.memory.*", "L2.linear.*", "L2.mlp.F32*", "L2.attention.Q4_K*", "L2.mla.one-token")
    assert "FAIL" not in said, said
    assert "conformance of toy" in said


def test_a_precision_that_is_not_declared_is_named(toy_runs: Callable[..., str], tmp_path: Path) -> None:
    source = tmp_path / "ktcore_toy" / "__init__.py"
    declaration = 'precision={"toy.linear": Precision("bfloat16")}'
    assert declaration in source.read_text()
    source.write_text(source.read_text().replace(f", {declaration}", ""))
    said = toy_runs("L2.linear.F32.one-token")
    assert "FAIL 1" in said
    assert "Expectations(precision={'toy.linear': Precision('bfloat16')})" in said


@pytest.mark.usefixtures("smollm2_path")
def test_the_readmes_python_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    block = re.search(r"## From Python\n\n((?:    .*\n|\n)+)", text)
    assert block is not None
    monkeypatch.setenv("KTCORE_PLUGINS", "cpu")
    code = "\n".join(line[4:] for line in block[1].splitlines())
    names: dict[str, object] = {}
    exec(compile(code, "README.md", "exec"), names)
    logits = names["logits"]
    assert isinstance(logits, torch.Tensor)
    assert logits.shape[0] == 3
    assert "layers.0.attn (attention) is run by" in capsys.readouterr().out


def test_the_model_guide_quotes_a_real_family() -> None:
    text = (DOCS / "add-a-model.md").read_text(encoding="utf-8")
    ((name, quoted),) = NAMED_BLOCK.findall(text)
    assert quoted == (ROOT / name).read_text(encoding="utf-8")
    for key, table in (("qwen2_moe", HF_ARCHITECTURES), ("qwen2moe", GGUF_ARCHITECTURES)):
        assert f'"{key}": {table[key].__name__}' in text


def test_every_command_that_is_written_about_exists(ktcore: Run) -> None:
    pages = [page.read_text(encoding="utf-8") for page in PAGES if page.name != "structure.md"]
    written = {command for text in pages for command in re.findall(r"(?:^    |`)ktcore ([a-z][a-z-]*)", text, re.M)}
    assert written >= {"run", "chat", "plan", "doctor", "bench"}
    for command in written:
        assert ktcore(command, "--help").code == 0, command


def test_every_environment_variable_is_described() -> None:
    text = (DOCS / "environment.md").read_text(encoding="utf-8")
    sources = [path for room in ("ktcore", "backends", "tests") for path in (ROOT / room).rglob("*.py")]
    asked = re.compile(r"""["'](KTCORE_[A-Z0-9_]*[A-Z0-9])["']""")
    found = {name for path in sources for name in asked.findall(path.read_text(encoding="utf-8"))}
    assert found >= {"KTCORE_PLUGINS", "KTCORE_ISA", "KTCORE_API_KEY"}
    assert not sorted(name for name in found if f"`{name}`" not in text)


def test_every_document_is_in_the_index() -> None:
    index = (DOCS / "README.md").read_text(encoding="utf-8")
    assert not [page.name for page in DOCS.glob("*.md") if page.name != "README.md" and f"]({page.name})" not in index]


def test_every_package_has_the_licence() -> None:
    for path in (ROOT / "pyproject.toml", *ROOT.glob("backends/*/pyproject.toml")):
        assert 'license = "Apache-2.0"' in path.read_text(encoding="utf-8"), path


def test_one_range_of_torch_everywhere() -> None:
    skeleton = ROOT / "ktcore/cli/commands/templates/backend/pyproject.toml.tmpl"
    guide = DOCS / "write-a-backend.md"
    paths = [ROOT / "pyproject.toml", *ROOT.glob("backends/*/pyproject.toml"), skeleton, guide]
    assert len(paths) >= 9
    for path in paths:
        ranges = set(re.findall(r'"torch([<>=!~][^"]*)"', path.read_text(encoding="utf-8")))
        assert ranges == {">=2.11"}, path
    made = re.search(r"^TORCH \?= torch==(\d+)\.(\d+)", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    assert made is not None
    assert (int(made[1]), int(made[2])) >= (2, 11)
    documents = [page.read_text(encoding="utf-8") for page in ALL_PAGES]
    said = {found for text in documents for found in re.findall(r"torch (\d+\.\d+) or later", text)}
    assert said == {"2.11"}


def test_every_key_of_rule_files_is_described() -> None:
    text = (DOCS / "rules.md").read_text(encoding="utf-8")
    for key in (*schema.FILE_KEYS, *experts.KEYS):
        assert f"{key}:" in text, key
    for key in (*schema.RULE_KEYS, *schema.MATCH_KEYS):
        assert f"| `{key}` |" in text, key
    assert set(schema.MATCH_KEYS) == set(match.Match.__dataclass_fields__)


def test_the_rule_files_that_are_shown_can_be_read(tmp_path: Path) -> None:
    text = (DOCS / "rules.md").read_text(encoding="utf-8")
    blocks = [dedent(block) for block in re.findall(r"(?:^    .*\n)+", text, re.M)]
    files = [block for block in blocks if "version: 1" in block]
    files += [f"version: 1\nrules:\n{indent(block, '  ')}" for block in blocks if block.startswith("- name")]
    assert len(files) == 3
    for number, file in enumerate(files):
        path = tmp_path / f"{number}.yaml"
        path.write_text(file)
        assert read_rule_set([path], [shipped_rules()]).files[0] == path


def _anchors(page: Path) -> set[str]:
    """What links to the page's headings may say behind #, as GitHub makes it."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", ALL_PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if "://" in link or link.startswith("mailto:"):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in _anchors(target), link


def test_the_structure_page_is_true() -> None:
    spec = importlib.util.spec_from_file_location("structure", DOCS / "structure.py")
    assert spec is not None
    assert spec.loader is not None
    structure = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(structure)
    written = (DOCS / "structure.md").read_text(encoding="utf-8")
    assert written == structure.page(), "run `python docs/structure.py`"


def test_every_module_has_its_sentence() -> None:
    written = (DOCS / "structure.md").read_text(encoding="utf-8")
    for path in (ROOT / "ktcore").rglob("*.py"):
        if path.name != "__init__.py":
            assert f"{path.name}` | " in written, path
