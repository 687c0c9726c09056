"""Whole models, dense part on the simulated accelerator and routed experts on the host, against transformers."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from ktcore_sim.runtime import SimRuntime

import ktcore
from tests.parity import models as tiny_models

NEW = 8
Expected = tuple[Path, torch.Tensor, torch.Tensor]


@pytest.fixture(autouse=True)
def _inference() -> None:
    """As a user's code: the engine itself enters inference mode."""


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Expected]:
    """Folder, prompts [8, 20] and what transformers generates from them."""
    made: dict[str, Expected] = {}

    def get(name: str) -> Expected:
        if name not in made:
            model = tiny_models.tiny_model(name)
            folder = tiny_models.save(model, tmp_path_factory.mktemp(name))
            prompts = torch.randint(3, 256, (8, 20), generator=torch.Generator().manual_seed(5))
            tokens = model.generate(prompts, max_new_tokens=NEW, do_sample=False, eos_token_id=None)
            made[name] = folder, prompts, tokens
        return made[name]

    return get


def _runtimes(model: ktcore.Model) -> list[SimRuntime]:
    return [r for r in model.engine.model.devices.open_runtimes() if isinstance(r, SimRuntime)]


@pytest.mark.parametrize("mode", ["none", "eager", "capturable"])
@pytest.mark.parametrize("name", ["llama", "qwen3-moe", "v3"])
def test_tokens_are_those_of_transformers_under_any_delay(
    name: str, mode: str, expected: Callable[[str], Expected], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, prompts, tokens = expected(name)
    monkeypatch.setenv("KTCORE_SIM_HOST_CALLBACK", mode)
    monkeypatch.setenv("KTCORE_SIM_DELAY_US", "100")
    for seed, rows in ((0, 8), (1, 1), (2, 3)):
        monkeypatch.setenv("KTCORE_SIM_SEED", str(seed))
        with ktcore.load(folder, backend="sim", context=256) as model:
            ours = model.generate(prompts[:rows], max_new_tokens=NEW, temperature=0)
            (runtime,) = _runtimes(model)
            assert runtime.fallback_names() == {}
            assert runtime.host_touches() == 0
        assert torch.equal(ours, tokens[:rows]), f"seed {seed}"


RESIDENT = """
version: 1
rules:
  - name: all routed experts on the device
    match: {op: experts}
    use: sim.experts
    device: accelerator
"""


@pytest.mark.parametrize("name", ["qwen3-moe", "v3"])
def test_experts_on_the_device(name: str, expected: Callable[[str], Expected], tmp_path: Path) -> None:
    folder, prompts, tokens = expected(name)
    rules = tmp_path / "resident.yaml"
    rules.write_text(RESIDENT)
    with ktcore.load(folder, backend="sim", rules=rules, context=256) as model:
        assert torch.equal(model.generate(prompts, max_new_tokens=NEW, temperature=0), tokens)
        assert _runtimes(model)[0].fallback_names() == {}


def test_references_run_on_the_device_too(
    expected: Callable[[str], Expected], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, prompts, tokens = expected("v3")
    rules = tmp_path / "references.yaml"
    parts = ("linear", "rms_norm", "rope", "kv_cache", "mla", "mlp", "router", "moe")
    rules.write_text("version: 1\nvars:\n" + "".join(f"  {part}: reference.{part}\n" for part in parts))
    monkeypatch.setenv("KTCORE_SIM_DELAY_US", "20")
    with ktcore.load(folder, backend="sim", rules=rules, context=256) as model:
        assert not [c for c in model.plan.choices.values() if c.implementation.id.startswith("sim.")]
        assert torch.equal(model.generate(prompts[:2], max_new_tokens=NEW, temperature=0), tokens[:2])
        assert _runtimes(model)[0].fallback_names() == {}


def test_a_model_gives_back_all_it_took(expected: Callable[[str], Expected]) -> None:
    folder, prompts, _ = expected("v3")
    gc.collect()
    watcher = SimRuntime(0)
    before = watcher.held()
    with ktcore.load(folder, backend="sim", context=256) as model:
        model.generate(prompts[:2], max_new_tokens=4, temperature=0)
        assert watcher.held().bytes > before.bytes
    del model
    gc.collect()
    assert watcher.held() == before
    watcher.close()
