"""Whole decode steps captured on the simulated accelerator: replays give the tokens that launches one by one give."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import ktcore
from ktcore.errors import BackendError, ExpertsError

from .conftest import Tiny

pytest.importorskip("ktcore_sim._C", reason="the simulated accelerator is not built: pip install ./backends/sim")
from ktcore_sim.runtime import SimRuntime

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.timeout(600)]

NEW_TOKENS = 40
"""Past the end of a page, whatever the prompt."""


def _prompts(t: Tiny, count: int) -> list[list[int]]:
    ids = t.ids.tolist()
    return [ids[i : i + 3 + 5 * i] for i in range(count)]


def _answers(model: ktcore.Model, prompts: list[list[int]]) -> list[list[int]]:
    """Greedy answers of prompts of different length, one batch."""
    from ktcore.engine.schedule.sequence import Sequence
    from ktcore.ops.sampling import SamplingParams

    sequences = [Sequence(p, SamplingParams(temperature=0), NEW_TOKENS - 4 * i) for i, p in enumerate(prompts)]
    for sequence in sequences:
        model.engine.add(sequence)
    while model.engine.step():
        pass
    return [s.new_tokens for s in sequences]


@pytest.mark.parametrize("name", ["llama", "qwen3-moe", "v3", "glm-dsa-shared"])
def test_replays_give_the_same_tokens_for_every_number_of_sequences(
    name: str, tiny: Callable[[str], Tiny], monkeypatch: pytest.MonkeyPatch
) -> None:
    t = tiny(name)
    with ktcore.load(t.folder, backend="sim", context=512, graphs=False) as model:
        assert model.engine.graphs is None
        expected = {n: _answers(model, _prompts(t, n)) for n in (1, 3, 8)}
    monkeypatch.setenv("KTCORE_SIM_DELAY_US", "100")
    for seed in range(2):
        monkeypatch.setenv("KTCORE_SIM_SEED", str(seed))
        with ktcore.load(t.folder, backend="sim", context=512) as model:
            assert model.engine.graphs is not None, model.engine.model.no_graphs
            for n, tokens in expected.items():
                assert _answers(model, _prompts(t, n)) == tokens, f"seed {seed}, {n} sequences"
            # eight sequences of different length end one after the other
            assert model.engine.graphs.sizes == (1, 2, 4, 8)
            assert model.engine.scheduler.pages.free == model.engine.scheduler.pages.total


@pytest.mark.parametrize(
    "policy", ["experts: {on_device: 6, use: sim.experts}", "experts: {defer: 2}", "experts: {keep: 2}"]
)
def test_ways_to_treat_experts_are_captured_too(policy: str, tiny: Callable[[str], Tiny], tmp_path: Path) -> None:
    t = tiny("v3")
    rules = tmp_path / "mine.yaml"
    rules.write_text(
        "version: 1\nrules:\n"
        "  - {name: mine, match: {op: experts}, use: [cpu.experts, reference.experts], device: host, " + policy + "}\n"
    )
    found = []
    for graphs in (False, True):
        with ktcore.load(t.folder, backend="sim", rules=rules, context=512, graphs=graphs) as model:
            assert (model.engine.graphs is not None) == graphs, model.engine.model.no_graphs
            found.append(_answers(model, _prompts(t, 3)))
    assert found[0] == found[1]


def test_an_error_of_the_experts_reaches_the_caller_and_the_model_goes_on(
    tiny: Callable[[str], Tiny], tmp_path: Path
) -> None:
    t = tiny("qwen3-moe")
    rules = tmp_path / "mine.yaml"
    rules.write_text("version: 1\nrules:\n  - {name: e, match: {op: experts}, use: reference.experts, device: host}\n")
    with ktcore.load(t.folder, backend="sim", rules=rules, context=256) as model:
        prompt = t.ids[None, :20]
        expected = model.generate(prompt, max_new_tokens=8, temperature=0)
        assert model.engine.graphs is not None
        assert model.engine.graphs.sizes == (1,)
        hand_off = model.engine.model.devices._hand_offs[1]
        working, calls = hand_off._experts, []

        def broken(*args: torch.Tensor) -> torch.Tensor:
            calls.append(args[0].shape[0])
            if args[0].shape[0] == 1 and len(calls) > 3:
                raise MemoryError("expert 3 is on fire")
            return working(*args)

        hand_off._experts = broken
        with pytest.raises(ExpertsError, match="on fire"):
            model.generate(prompt, max_new_tokens=8, temperature=0)
        assert calls[-1] == 1
        hand_off._experts = working
        assert torch.equal(model.generate(prompt, max_new_tokens=8, temperature=0), expected)


@pytest.mark.parametrize(
    ("variables", "backend", "why"),
    [
        ({"KTCORE_SIM_GRAPH": "none"}, "sim", "sim:0 has no graphs"),
        ({"KTCORE_SIM_HOST_CALLBACK": "eager"}, "sim", r"host callbacks of sim:0 cannot be captured \(eager\)"),
        ({}, "cpu", "the model runs on the host"),
    ],
)
def test_a_model_says_why_its_steps_are_not_captured(
    variables: dict[str, str], backend: str, why: str, tiny: Callable[[str], Tiny], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with ktcore.load(tiny("qwen3-moe").folder, backend=backend, context=256) as model:
        assert model.engine.graphs is None

        assert re.fullmatch(why, model.engine.model.no_graphs)


def test_a_capture_that_the_device_refuses_says_what_to_do(
    tiny: Callable[[str], Tiny], monkeypatch: pytest.MonkeyPatch
) -> None:
    t = tiny("llama")

    def refuse(self: SimRuntime, stream: object, work: object) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    with ktcore.load(t.folder, backend="sim", context=256) as model:
        monkeypatch.setattr(SimRuntime, "capture", refuse)
        with pytest.raises(BackendError, match=r"cannot be captured on sim:0: .*not permitted") as caught:
            model.generate(t.ids[None, :20], max_new_tokens=4, temperature=0)
        assert "graphs=False" in str(caught.value.hint)
        monkeypatch.undo()
        assert model.generate(t.ids[None, :20], max_new_tokens=4, temperature=0).shape == (1, 24)
