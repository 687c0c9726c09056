"""A package from outside, installed as its users would: found, loaded, run, judged. Beside it the bad ones."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

STRANGER = Path(__file__).parent / "stranger"

GOOD = """
from ktcore.backend import API_VERSION, BackendSpec, Capabilities, Probe, hookimpl

@hookimpl
def ktcore_register_backends():
    return [BackendSpec(name={name!r}, api_version={version}, requirements="none", entry={entry!r},
                        probe={probe}, declared=(Capabilities({name!r}, "card"),))]
"""
LIAR = """
from ktcore.backend import Backend, Implementation, Supported
from ktcore.backend.host import HostRuntime
from ktcore.ops import LinearSpec

class Linear(Implementation):
    id, spec_type = "liar.linear", LinearSpec
    def supports(self, spec, device):
        return Supported()
    def load(self, request):
        raise RuntimeError("no kernel for this shape after all")

class Liar(Backend):
    def implementations(self):
        return [Linear()]
    def runtime(self, index=0, threads=None):
        return HostRuntime()
"""


def _text(
    name: str, version: str = "API_VERSION", entry: str = "none:none", probe: str = "lambda: Probe(True, 'ok')"
) -> str:
    return GOOD.format(name=name, version=version, entry=entry, probe=probe)


BAD: dict[str, tuple[str, str, str]] = {
    # module: (its text, the state that it must have, a word of the reason)
    "raises_at_import": ("raise RuntimeError('the driver is from another century')", "broken", "another century"),
    "missing_dependency": ("import a_library_nobody_has", "broken", "a_library_nobody_has"),
    "wrong_major": (_text("wrong_major", "(99, 0)"), "incompatible", "99"),
    "newer_minor": (_text("newer_minor", "(API_VERSION[0], API_VERSION[1] + 7)"), "incompatible", "7"),
    "probe_throws": (_text("probe_throws", probe="lambda: 1 / 0"), "broken", "division by zero"),
    "probe_hangs": (_text("probe_hangs", probe="lambda: __import__('time').sleep(60)"), "unavailable", "5"),
}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the stranger's package installed by pip, and the bad ones beside it."""
    site = tmp_path_factory.mktemp("site")
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-build-isolation", "--no-deps"]
    subprocess.run([*install, "--target", str(site), str(STRANGER)], check=True, capture_output=True)
    for module, (text, _, _) in BAD.items():
        _put(site, module, text)
    _put(site, "liar", _text("liar", entry="liar:Liar", probe="lambda: Probe(True, 'ok', 1)") + LIAR)
    # a second package that claims the stranger's name
    _put(site, "twin_of_stranger", _text("stranger"))
    return site


def _put(site: Path, module: str, text: str) -> None:
    (site / f"{module}.py").write_text(text)
    info = site / f"{module}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[ktcore.backends]\n{module} = {module}\n")


def _ktcore(site: Path, *arguments: object, only: str | None = None) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "KTCORE_PLUGINS"} | {"PYTHONPATH": str(site)}
    if only is not None:
        environment["KTCORE_PLUGINS"] = only
    command = [sys.executable, "-m", "ktcore.cli.main", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=site)


@pytest.fixture(scope="module")
def found(site: Path) -> list[dict[str, Any]]:
    done = _ktcore(site, "doctor", "--json")
    assert done.returncode == 0, done.stderr
    backends: list[dict[str, Any]] = json.loads(done.stdout)["backends"]
    return backends


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("moe")
    config = Qwen3MoeConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=96,
        moe_intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=8,
        num_experts_per_tok=2,
    )
    Qwen3MoeForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", BAD)
def test_doctor_shows_each_bad_plugin_with_its_state_and_reason(name: str, found: list[dict[str, Any]]) -> None:
    _, state, word = BAD[name]
    (entry,) = [b for b in found if b["name"] == name]
    assert entry["state"] == state
    assert word in entry["reason"]


def test_of_two_with_one_name_the_second_is_broken_and_both_are_named(found: list[dict[str, Any]]) -> None:
    both = [b for b in found if b["name"] == "stranger"]
    assert sorted(b["state"] for b in both) == ["broken", "loaded"]
    (broken,) = [b for b in both if b["state"] == "broken"]
    assert "ktcore-stranger" in broken["reason"]
    assert "twin_of_stranger" in broken["reason"]


def test_none_of_them_breaks_the_others(found: list[dict[str, Any]]) -> None:
    states = {b["name"]: b["state"] for b in found if b["distribution"].startswith("ktcore")}
    assert states["cpu"] == "loaded"
    assert states["stranger"] == "loaded"


def test_the_strangers_backend_runs_a_model_beside_host_experts(site: Path, model: Path) -> None:
    done = _ktcore(site, "plan", model, "--backend", "stranger", "--json", only="cpu,stranger")
    assert done.returncode == 0, done.stderr
    nodes = json.loads(done.stdout)["nodes"]
    used = {(n["op"], n["implementation"], n["device"]) for n in nodes.values()}
    assert ("linear", "stranger.linear", "stranger:0") in used
    assert ("experts", "cpu.experts", "cpu:0") in used
    ran = _ktcore(site, "bench", model, "--backend", "stranger", "-p", 16, "-n", 4, "--rounds", 1, "--json")
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout)["decode_tok_s"] > 0


TWO_VENDORS = """
version: 1
rules:
  - {name: attention, match: {op: attention, layers: 0}, use: reference.attention, device: stranger}
  - {name: moe, match: {op: moe, layers: 0}, use: reference.moe, device: stranger}
  - {name: linear, match: {op: linear, layers: 0}, use: stranger.linear}
  - {name: norm, match: {op: rms_norm, layers: 0}, use: stranger.rms_norm}
  - {name: rope, match: {op: rope, layers: 0}, use: reference.rope}
  - {name: cache, match: {op: kv_cache, layers: 0}, use: reference.kv_cache}
  - {name: router, match: {op: router, layers: 0}, use: reference.router}
"""


def test_two_vendors_share_one_model_in_one_process(site: Path, model: Path, tmp_path: Path) -> None:
    """Layer 0 on the stranger's card, layer 1 on the simulated one, experts on the host."""
    rules = tmp_path / "two.yaml"
    rules.write_text(TWO_VENDORS)
    quality = ("bench", model, "--backend", "sim", "--quality", "--rules", rules, "--json")
    done = _ktcore(site, *quality, only="cpu,sim,stranger")
    assert done.returncode == 0, done.stderr
    # against the same model on the simulated device alone
    assert json.loads(done.stdout)["mean_kl_nats"] < 1e-8
    plan = _ktcore(site, "plan", model, "--backend", "sim", "--rules", rules, "--json", only="cpu,sim,stranger")
    devices = {n["device"] for n in json.loads(plan.stdout)["nodes"].values()}
    assert devices == {"cpu:0", "sim:0", "stranger:0"}


def test_the_kit_judges_the_strangers_backend(site: Path, tmp_path: Path) -> None:
    report = tmp_path / "stranger.json"
    cases = ("L0.*", "L1.copy.*", "L2.linear.Q4_K.*", "L2.linear.company", "L2.rms_norm.*", "L2.router.ties")
    chosen = [word for case in cases for word in ("--case", case)]
    done = _ktcore(
        site, "conformance", "run", "--backend", "stranger", "--report", report, *chosen, only="cpu,stranger"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rendered = _ktcore(site, "conformance", "render", tmp_path, only="cpu,stranger")
    assert rendered.returncode == 0, rendered.stderr
    assert "stranger" in (tmp_path / "matrix.md").read_text()


def test_an_implementation_whose_supports_lies_fails_with_its_node_and_reason(
    site: Path, model: Path, tmp_path: Path
) -> None:
    rules = tmp_path / "liar.yaml"
    rules.write_text("version: 1\nvars: {linear: liar.linear}\nrules: []\n")
    done = _ktcore(site, "bench", model, "--backend", "liar", "--rules", rules, only="cpu,liar")
    assert done.returncode == 1
    assert "liar.linear" in done.stderr
    assert "no kernel for this shape after all" in done.stderr
    assert "Traceback" not in done.stderr


def test_plugins_can_be_limited(site: Path) -> None:
    done = _ktcore(site, "doctor", "--json", only="cpu")
    assert {b["name"] for b in json.loads(done.stdout)["backends"]} == {"cpu"}
