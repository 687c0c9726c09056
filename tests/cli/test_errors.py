"""Bad input ends in exit code 1 and one clear message, never in a traceback."""

from __future__ import annotations

import os
import re
import struct
import sys
from collections.abc import Callable
from pathlib import Path

import gguf
import pytest

from ktcore.errors import KtcoreError

from .conftest import Run, offset_of_tensor

Fails = Callable[..., str]


def test_a_path_that_is_not_there(fails: Fails, tmp_path: Path) -> None:
    assert "nothing.gguf: no such file or folder" in fails("run", tmp_path / "nothing.gguf", "Hi")


def test_an_address_or_a_name_on_a_hub_says_to_download_first(fails: Fails) -> None:
    assert "download it first" in fails("plan", "https://example.org/models/model.gguf")
    assert "hf download someone/model --local-dir model" in fails("plan", "someone/model")


def test_a_file_that_is_not_a_gguf(fails: Fails, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("not a model at all")
    assert "not a GGUF file" in fails("run", tmp_path / "notes.txt", "Hi")


def test_a_folder_that_is_not_a_model(fails: Fails, tmp_path: Path) -> None:
    assert "config.json" in fails("run", tmp_path, "Hi")


@pytest.mark.parametrize("share", [0.001, 0.01, 0.05, 0.2, 0.5, 0.9, 0.999])
def test_a_truncated_file(fails: Fails, tmp_path: Path, gguf_bytes: bytes, share: float) -> None:
    path = tmp_path / "cut.gguf"
    path.write_bytes(gguf_bytes[: int(len(gguf_bytes) * share)])
    assert "cut.gguf" in fails("run", path, "Hi")


@pytest.mark.parametrize("share", [0.01, 0.5, 0.999])
def test_a_real_model_cut_short(fails: Fails, tmp_path: Path, smollm2_path: Path, share: float) -> None:
    path = tmp_path / "cut.gguf"
    with smollm2_path.open("rb") as source:
        path.write_bytes(source.read(int(smollm2_path.stat().st_size * share)))
    assert "cut.gguf" in fails("run", path, "Hi")


def test_a_tensor_that_points_past_the_end(fails: Fails, tmp_path: Path, gguf_bytes: bytes) -> None:
    damaged = bytearray(gguf_bytes)
    struct.pack_into("<Q", damaged, offset_of_tensor(gguf_bytes, "token_embd.weight"), 1 << 30)
    (tmp_path / "past.gguf").write_bytes(damaged)
    assert "token_embd.weight" in fails("run", tmp_path / "past.gguf", "Hi")


@pytest.mark.parametrize("field", [8, 16], ids=["tensors", "metadata"])
@pytest.mark.parametrize("count", [1 << 20, 1 << 40, (1 << 64) - 1])
def test_absurd_counts_in_the_header(fails: Fails, tmp_path: Path, gguf_bytes: bytes, field: int, count: int) -> None:
    damaged = bytearray(gguf_bytes)
    struct.pack_into("<Q", damaged, field, count)
    (tmp_path / "absurd.gguf").write_bytes(damaged)
    assert "absurd.gguf" in fails("run", tmp_path / "absurd.gguf", "Hi")


def test_an_unknown_architecture_names_the_known(fails: Fails, tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "new.gguf", "perceiver9")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    err = fails("plan", tmp_path / "new.gguf")
    assert "perceiver9" in err
    assert all(known in err for known in ("llama", "qwen3moe", "deepseek2"))


def test_an_unknown_backend_names_the_known_and_their_states(fails: Fails, tiny_llama: Path) -> None:
    err = fails("plan", tiny_llama, "--backend", "abacus")
    assert "'abacus' is unknown" in err
    assert "cpu (loaded)" in err


def test_an_unavailable_backend_gives_its_own_reason(
    fails: Fails, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, monkeypatch, "far", FAR)
    err = fails("bench", tiny_llama, "--backend", "far")
    assert "'far' (far-plugin 1.0) is unavailable: it is on another planet" in err


def test_a_rule_file_with_an_unknown_implementation(fails: Fails, tiny_llama: Path, tmp_path: Path) -> None:
    rules = tmp_path / "mine.yaml"
    rules.write_text("version: 1\nrules:\n  - name: mine\n    match: {op: attention}\n    use: cpu.atention\n")
    err = fails("plan", tiny_llama, "--rules", rules)
    assert "mine.yaml:3" in err or "mine.yaml:5" in err
    assert "'cpu.atention' is unknown" in err
    assert "cpu.attention" in err


def test_a_rule_file_that_is_not_there(fails: Fails, tiny_llama: Path) -> None:
    assert "there is no rule file 'absent.yaml'" in fails("plan", tiny_llama, "--rules", "absent.yaml")


@pytest.mark.parametrize("prompt", ["", "  \n"])
@pytest.mark.parametrize("raw", [[], ["--raw"]], ids=["chat", "raw"])
def test_an_empty_prompt(fails: Fails, tiny_llama: Path, prompt: str, raw: list[str]) -> None:
    assert "the prompt is empty" in fails("run", tiny_llama, prompt, *raw)
    assert "the prompt is empty" in fails("run", tiny_llama, "-", *raw, stdin=prompt)


def test_a_prompt_longer_than_the_context(fails: Fails, smollm2_path: Path) -> None:
    err = fails("run", smollm2_path, "many words " * 50, "--raw", "--context", 64)
    assert "context holds 64" in err
    assert "--context" in err


def test_a_bench_longer_than_the_context(fails: Fails, tiny_llama: Path) -> None:
    assert "do not fit into the context of 16" in fails("bench", tiny_llama, "-p", 16, "-n", 4, "--context", 16)


@pytest.mark.parametrize(
    "option", [("--temperature", "-1"), ("--top-p", "-0.5"), ("--min-p", "1.5"), ("--repetition-penalty", "0")]
)
def test_a_sampling_value_out_of_range(fails: Fails, tiny_llama: Path, option: tuple[str, str]) -> None:
    assert option[0].strip("-").replace("-", "_") in fails("run", tiny_llama, "Hi", *option)


def test_text_from_a_checkpoint_without_a_tokenizer(fails: Fails, tiny_llama: Path) -> None:
    assert "has no tokenizer" in fails("run", tiny_llama, "Hi")
    assert "has no tokenizer" in fails("chat", tiny_llama, stdin="Hi\n")


def test_an_unknown_node_names_near_ones(fails: Fails, tiny_llama: Path) -> None:
    err = fails("plan", tiny_llama, "--explain", "layer.1.atn")
    assert "no node 'layer.1.atn'" in err
    assert "layers.1.attn" in err


def test_memory_that_is_too_small(
    fails: Fails, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, monkeypatch, "far", FAR)
    assert "more than the 100.0 KiB" in fails("plan", tiny_llama, "--backend", "far", "--memory", "100KiB")


def test_a_context_that_no_memory_holds(fails: Fails, smollm2_path: Path) -> None:
    said = fails("run", smollm2_path, "Hi", "--context", 10**12)
    assert f"a context of {10**12} tokens needs " in said
    assert re.search(r"hint: a context of [1-9]\d* tokens fits", said)


def test_memory_without_an_accelerator_is_remarked_on(ktcore: Run, tiny_llama: Path) -> None:
    assert "this plan uses none" in ktcore("plan", tiny_llama, "--backend", "cpu", "--memory", "1GiB").out


@pytest.mark.parametrize("seed", ["-1", "9" * 30, "x"])
def test_a_seed_that_is_none_is_wrong_usage(ktcore: Run, tiny_llama: Path, seed: str) -> None:
    assert ktcore("run", tiny_llama, "Hi", f"--seed={seed}").code == 2


def test_debug_keeps_the_traceback(tmp_path: Path) -> None:
    from ktcore.cli.main import main

    for words in (["--debug", "plan", str(tmp_path)], ["plan", str(tmp_path), "--debug"]):
        with pytest.raises(KtcoreError):
            main(words)


@pytest.mark.parametrize("size", ["3Q", "GiB", "-1", "0", "1iB"])
def test_a_malformed_size_is_wrong_usage(ktcore: Run, tiny_llama: Path, size: str) -> None:
    done = ktcore("plan", tiny_llama, f"--memory={size}")
    assert done.code == 2
    assert "size" in done.err


def install(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, source: str) -> None:
    """Put a plugin on the path as pip would, and among those that are loaded."""
    monkeypatch.setenv("KTCORE_PLUGINS", f"{os.environ['KTCORE_PLUGINS']},{name}")
    (folder / f"{name}_plugin.py").write_text(source)
    info = folder / f"{name}_plugin-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}-plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[ktcore.backends]\n{name} = {name}_plugin\n")
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, f"{name}_plugin", raising=False)


FAR = """
from ktcore.backend import API_VERSION, Backend, BackendSpec, Capabilities, Probe, hookimpl

class Far(Backend):
    def implementations(self):
        return []

    def runtime(self, index=0, threads=None):
        raise RuntimeError("out of reach")

def probe():
    return Probe(False, "it is on another planet")

@hookimpl
def ktcore_register_backends():
    caps = Capabilities("far", "a far device")
    return [BackendSpec("far", API_VERSION, "a rocket", "far_plugin:Far", probe, (caps,))]
"""
