"""Hybrid execution on the simulated accelerator: dense part there, routed experts on the host, tokens as on the host.

The device starts every launch, copy and host call up to 100 microseconds late, by seed: a missing wait shows as a wrong
token. `KTCORE_TEST_SEEDS` sets how many seeds are tried (8; `make thorough` takes 20; 200 before a release).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import ktcore
from ktcore.errors import ExpertsError, PlanError

from .conftest import Tiny

pytest.importorskip("ktcore_sim._C", reason="the simulated accelerator is not built: pip install ./backends/sim")
pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.timeout(900)]

SEEDS = int(os.environ.get("KTCORE_TEST_SEEDS", "8"))
MODES = ["none", "eager", "capturable"]
NEW_TOKENS = 8


def _reference(t: Tiny, prompts: torch.Tensor) -> torch.Tensor:
    with ktcore.load(t.folder, backend="cpu", rules="reference", context=1024) as model:
        return model.generate(prompts, max_new_tokens=NEW_TOKENS, temperature=0)


def _sim(model: ktcore.Model) -> list[object]:
    return [r for r in model.engine.model.devices.open_runtimes() if r.device.type != "cpu"]


def _assert_clean(model: ktcore.Model) -> None:
    for runtime in _sim(model):
        runtime.synchronize()  # type: ignore[attr-defined]
        assert runtime.fallback_names() == {}  # type: ignore[attr-defined]
        assert runtime.host_touches() == 0  # type: ignore[attr-defined]


@pytest.fixture(params=MODES)
def delayed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    monkeypatch.setenv("KTCORE_SIM_HOST_CALLBACK", request.param)
    monkeypatch.setenv("KTCORE_SIM_DELAY_US", "100")
    return lambda seed: monkeypatch.setenv("KTCORE_SIM_SEED", str(seed))


@pytest.mark.parametrize("name", ["qwen3-moe", "v3"])
def test_tokens_equal_the_hosts_for_every_seed(
    name: str, tiny: Callable[[str], Tiny], delayed: Callable[[int], None]
) -> None:
    t = tiny(name)
    one, eight = t.ids[None, :20], t.ids[:80].view(8, 10)
    expected = [_reference(t, one), _reference(t, eight)]
    for seed in range(SEEDS):
        delayed(seed)
        with ktcore.load(t.folder, backend="sim", context=1024) as model:
            for prompts, tokens in zip((one, eight), expected, strict=True):
                ours = model.generate(prompts, max_new_tokens=NEW_TOKENS, temperature=0)
                assert torch.equal(ours, tokens), f"seed {seed}, {prompts.shape[0]} sequences"
            _assert_clean(model)


def _rules(folder: Path, text: str) -> Path:
    path = folder / "mine.yaml"
    path.write_text("version: 1\nrules:\n" + text)
    return path


def test_layers_spread_over_two_devices(tiny: Callable[[str], Tiny], tmp_path: Path) -> None:
    t = tiny("v3")
    rules = _rules(
        tmp_path,
        "  - {name: second half, match: {op: mla, layers: 2-}, use: sim.mla, device: 'sim:1'}\n"
        "  - {name: second experts, match: {op: moe, layers: 2-}, use: sim.moe, device: 'sim:1'}\n",
    )
    with ktcore.load(t.folder, backend="sim", rules=rules, context=256) as model:
        assert {"sim:0", "sim:1", "cpu:0"} <= set(model.plan.devices)
        torch.testing.assert_close(model.logits(t.ids), t.logits, atol=1e-2, rtol=0)
        _assert_clean(model)


@pytest.mark.parametrize("policy", ["{on_device: 6, use: sim.experts}", "{on_device: [15, 2], use: sim.experts}"])
def test_experts_on_the_device_and_on_the_host_add_up(
    policy: str, tiny: Callable[[str], Tiny], tmp_path: Path, delayed: Callable[[int], None]
) -> None:
    t = tiny("qwen3-moe")
    delayed(1)
    rules = _rules(
        tmp_path,
        "  - {name: mine, match: {op: experts}, use: reference.experts, device: host, experts: " + policy + "}\n",
    )
    with ktcore.load(t.folder, backend="sim", rules=rules, context=256) as model:
        torch.testing.assert_close(model.logits(t.ids), t.logits, atol=1e-4, rtol=0)
        _assert_clean(model)


def test_deferred_experts_give_the_same_sums_on_the_device_as_on_the_host(
    tiny: Callable[[str], Tiny], tmp_path: Path, delayed: Callable[[int], None]
) -> None:
    t = tiny("v3")
    rules = _rules(
        tmp_path, "  - {name: d, match: {op: experts}, use: reference.experts, device: host, experts: {defer: 2}}\n"
    )
    host = tmp_path / "host.yaml"
    host.write_text(rules.read_text().replace("rules:", "extends: reference\nrules:", 1))
    with ktcore.load(t.folder, backend="cpu", rules=host, context=256) as model:
        expected = model.logits(t.ids)
    assert (expected - t.logits).abs().max() > 1e-3
    for seed in range(3):
        delayed(seed)
        with ktcore.load(t.folder, backend="sim", rules=rules, context=256) as model:
            torch.testing.assert_close(model.logits(t.ids), expected, atol=1e-4, rtol=0)


def test_an_error_of_the_experts_reaches_the_caller_and_the_model_goes_on(
    tiny: Callable[[str], Tiny], delayed: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    t = tiny("qwen3-moe")
    delayed(0)
    expected = _reference(t, t.ids[None, :20])
    rules = "  - {name: e, match: {op: experts}, use: reference.experts, device: host}\n"
    path = _rules(t.folder, rules)
    with ktcore.load(t.folder, backend="sim", rules=path, context=256) as model:
        hand_off = model.engine.model.devices._hand_offs[1]
        working = hand_off._experts

        def broken(*args: torch.Tensor) -> torch.Tensor:
            raise MemoryError("expert 3 is on fire")

        hand_off._experts = broken
        with pytest.raises(ExpertsError, match="on fire"):
            model.generate(t.ids[None, :20], max_new_tokens=4, temperature=0)
        hand_off._experts = working
        assert torch.equal(model.generate(t.ids[None, :20], max_new_tokens=NEW_TOKENS, temperature=0), expected)
        assert model.engine.scheduler.pages.free == model.engine.scheduler.pages.total


def test_a_plan_that_cannot_fit_fails_before_weights_are_read(tiny: Callable[[str], Tiny]) -> None:
    t = tiny("v3")
    with pytest.raises(PlanError, match=r"more than the .* that may be used"):
        ktcore.load(t.folder, backend="sim", memory=200_000, context=256)


@pytest.mark.parametrize("delayed", MODES[-1:], indirect=True)  # it has no experts, so that the host is never called
def test_the_demo_model_gives_the_hosts_tokens(smollm2_path: Path, delayed: Callable[[int], None]) -> None:
    delayed(5)
    prompts = ["The capital of France is", "def fibonacci(n):"]
    with ktcore.load(smollm2_path, backend="cpu", rules="reference", context=256) as model:
        expected = model.generate(prompts, max_new_tokens=8, temperature=0)
    with ktcore.load(smollm2_path, backend="sim", context=256) as model:
        assert model.generate(prompts, max_new_tokens=8, temperature=0) == expected
        _assert_clean(model)
