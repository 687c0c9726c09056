"""`ktcore plan`: the table, explanations, JSON, and planning for a device that is not here."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from .conftest import Run
from .test_errors import FAR, install

CONFIGS = Path(__file__).parents[1] / "data" / "configs"


def test_the_table_names_nodes_implementations_devices_and_rules(ktcore: Run, tiny_llama: Path) -> None:
    done = ktcore("plan", tiny_llama, "--backend", "cpu")
    assert done.code == 0
    (line,) = (line for line in done.out.splitlines() if line.startswith("layers.*.attn "))
    assert line.split()[:6] == ["layers.*.attn", "attention", "0-1", "2", "cpu.attention", "cpu:0"]
    assert "dense.yaml:" in line
    assert "of this machine" in done.out


def test_auto_says_what_it_took(ktcore: Run, tiny_llama: Path) -> None:
    assert "No accelerator is available, so cpu is used." in ktcore("plan", tiny_llama).out


def test_explain_gives_rule_parts_and_rejected_implementations(ktcore: Run, tiny_llama: Path) -> None:
    out = ktcore("plan", tiny_llama, "--backend", "cpu", "--explain", "layers.0.attn").out
    assert "layers.0.attn (attention) is run by cpu.attention on cpu:0" in out
    assert "rejected  reference.attention: " in out
    assert "layers.0.attn.q" in out
    part = ktcore("plan", tiny_llama, "--backend", "cpu", "--explain", "layers.0.attn.q").out
    assert "run by layers.0.attn as a whole" in part


def test_json(ktcore: Run, tiny_llama: Path) -> None:
    found = ktcore("plan", tiny_llama, "--backend", "cpu", "--context", 128, "--json").json
    assert found["backend"] == "cpu"
    assert found["context"] == 128
    assert found["nodes"]["layers.0.attn"]["implementation"] == "cpu.attention"
    memory = found["memory"]["cpu:0"]
    assert memory["total"] == memory["weights"] + memory["kv"] + memory["workspace"]
    assert memory["kv"] == 128 * found["cache_bytes_per_token"]
    node = ktcore("plan", tiny_llama, "--backend", "cpu", "--explain", "layers.0.attn.q", "--json").json
    assert node["node"] == "layers.0.attn"
    assert "reference.attention" in [item["implementation"] for item in node["rejected"]]


def test_a_device_that_is_not_here_is_planned_for_and_named_as_absent(
    ktcore: Run, tiny_moe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, monkeypatch, "far", FAR)
    out = ktcore("plan", tiny_moe, "--backend", "far", "--memory", "24GiB").out
    assert "Planned for far." in out
    assert "far is unavailable here (it is on another planet)" in out
    rows = {line.split()[0]: line.split() for line in out.splitlines() if line.startswith("layers.*")}
    assert "far:0" in rows["layers.*.attn"]
    assert "cpu:0" in rows["layers.*.ffn.experts"]
    assert "yes, into 24.0 GiB;" in out
    assert "say with --memory" in ktcore("plan", tiny_moe, "--backend", "far").out


def test_a_plan_has_to_fit_with_the_context_that_is_asked_for(
    ktcore: Run, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, monkeypatch, "far", FAR)
    words = ("plan", tiny_llama, "--backend", "far")
    need = ktcore(*words, "--context", 64, "--json").json["memory"]["far:0"]["total"]
    assert ktcore(*words, "--context", 64, "--memory", f"{need}B").code == 0
    assert "with a context of 512 tokens" in ktcore(*words, "--context", 512, "--memory", f"{need}B").err


def test_fallbacks_are_marked_with_their_reason(ktcore: Run, tiny_llama: Path, tmp_path: Path) -> None:
    rules = tmp_path / "mine.yaml"
    rules.write_text(
        "version: 1\nrules:\n  - name: mine\n    match: {op: rms_norm, name: norm}\n"
        "    use: [cpu.linear, reference.rms_norm]\n"
    )
    out = ktcore("plan", tiny_llama, "--backend", "cpu", "--rules", rules).out
    (line,) = (line for line in out.splitlines() if line.startswith("norm "))
    assert "reference.rms_norm fallback" in line
    assert "it implements linear, not rms_norm" in line
    assert "fallback marks 1 node" in out


def test_a_bare_config_json_is_planned_with_memory_by_device(
    ktcore: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, monkeypatch, "far", FAR)
    options = ("--backend", "far", "--memory", "128GiB", "--context", 32768, "--weights", "Q4_K")
    found = ktcore("plan", CONFIGS / "deepseek-v3.json", *options, "--json").json
    assert found["parameters"] == pytest.approx(671e9, rel=0.005)
    experts = 58 * 256 * 3 * 7168 * 2048 * 144 // 256
    assert found["memory"]["cpu:0"]["weights"] == experts  # the embedding stays in the file
    # 17 billion dense parameters in float32: this backend brings no kernels of its own
    assert 60 << 30 < found["memory"]["far:0"]["weights"] < 80 << 30
    out = ktcore("plan", CONFIGS / "deepseek-v3.json", *options).out
    assert "671.0 B parameters" in out
    assert "deepseek-v3.json alone was read: weights are taken to be BF16, Q4_K" in out


def test_weights_of_a_real_model_are_not_assumed(ktcore: Run, tiny_llama: Path) -> None:
    done = ktcore("plan", tiny_llama, "--weights", "Q4_K")
    assert done.code != 0
    assert "has weights of its own" in done.err


def test_a_config_json_alone_does_not_load(ktcore: Run) -> None:
    done = ktcore("run", CONFIGS / "deepseek-v3.json", "Hi")
    assert done.code != 0
    assert "only `ktcore plan` takes a config.json alone" in done.err


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc for a process's peak memory")
def test_planning_a_trillion_parameters_takes_little_memory() -> None:
    # not ru_maxrss, which begins with what the parent had when it forked
    code = (
        "import sys; from ktcore.cli.main import main\n"
        f"try: main(['plan', {str(CONFIGS / 'kimi-k2.json')!r}, '--backend', 'cpu', '--json'])\n"
        "finally: print(next(s for s in open('/proc/self/status') if 'VmHWM' in s).split()[1], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert '"parameters": 1026' in done.stdout
    assert int(done.stderr.split()[-1]) * 1024 < 1e9


def test_experts_from_another_checkpoint(ktcore: Run, tiny_moe: Path, tiny_llama: Path) -> None:
    done = ktcore("plan", tiny_moe, "--backend", "cpu", "--experts-from", tiny_moe)
    assert done.code == 0
    refused = ktcore("plan", tiny_moe, "--experts-from", tiny_llama)
    assert refused.code != 0
    assert str(tiny_llama) in refused.err
    assert "has no routed experts to give" in refused.err


def test_parts_of_a_checkpoint_that_are_not_run_are_told(ktcore: Run, tiny_llama: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_llama, tmp_path / "m"))
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"model.layers.2.eh_proj.weight": torch.ones(8)}, folder / "model.safetensors")
    out = ktcore("plan", folder, "--backend", "cpu").out
    assert "note: left out: layers that predict further tokens, 1 tensors" in out


@pytest.mark.parametrize("name", ["minimax-m2", "qwen3.5-397b-a17b"])
def test_a_flagship_is_planned_from_its_configuration_within_a_gigabyte(name: str) -> None:
    code = (
        # of this program alone: what getrusage says begins with what its parent had
        "import sys; from ktcore.cli.main import main\n"
        "try: main()\n"
        "finally: print([l.split()[1] for l in open('/proc/self/status') if l.startswith('VmHWM')][0], file=sys.stderr)"
    )
    arguments = ["plan", str(CONFIGS / f"{name}.json"), "--backend", "cpu", "--json"]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    assert '"cpu.moe"' in done.stdout
    assert int(done.stderr.split()[-1]) < 1 << 20  # kilobytes


def test_sizes_of_both_packings_are_stated(ktcore: Run) -> None:
    words = ("plan", CONFIGS / "deepseek-v3.json", "--backend", "cpu", "--weights", "IQ1_S", "--memory", "9999GiB")
    compact, fast = (ktcore(*words, *more, "--json").json for more in ((), ("--packing", "fast")))
    sizes = compact["packings"]
    assert fast["packings"] == sizes
    assert [p["memory"]["cpu:0"]["weights"] for p in (compact, fast)] == [sizes["compact"], sizes["fast"]]
    experts = 58 * 256 * 3 * 7168 * 2048 // 256
    assert fast["nodes"]["layers.3.ffn"]["packings"]["fast"] >= 70 * experts // 58
    assert sizes["fast"] - sizes["compact"] == pytest.approx(17 * experts, rel=0.05)  # and the dense part's
    out = ktcore(*words).out
    assert "weights can be packed in several ways (--packing): " in out
    assert ktcore(*words, "--packing", "loose").err.splitlines()[0].endswith("packing 'loose' is unknown")
