"""The demo model against transformers' LlamaForCausalLM on the same dequantised weights, in float32."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import ktcore
from ktcore.engine.schedule.sequence import Sequence
from ktcore.ops.sampling import SamplingParams

from .smollm2 import PROMPTS, transformers_model

TEXT = Path(__file__).parents[1] / "data" / "pride.txt"
NEW_TOKENS = 24
POSITIONS = 512


@pytest.fixture(scope="module")
def oracle(smollm2_path: Path) -> torch.nn.Module:
    return transformers_model(smollm2_path)


@pytest.fixture(scope="module")
def text_ids(smollm2_path: Path) -> list[int]:
    with ktcore.load(smollm2_path, backend="cpu") as model:
        return model.tokenizer.encode(TEXT.read_text())[:POSITIONS]


@pytest.fixture(scope="module")
def expected(oracle: torch.nn.Module, text_ids: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return oracle(torch.tensor([text_ids])).logits[0].double().log_softmax(-1)


def _divergence(expected: torch.Tensor, logits: torch.Tensor) -> tuple[float, float]:
    """Mean KL divergence in nats of logits from the expected log-probabilities, and the top-1 agreement."""
    ours = logits.double().log_softmax(-1)
    kl = (expected.exp() * (expected - ours)).sum(-1).mean().item()
    return kl, (ours.argmax(-1) == expected.argmax(-1)).double().mean().item()


@pytest.mark.timeout(900)  # 135M parameters in float32 on both sides, on machines with little to spare
def test_reference_greedy_tokens_equal_transformers(smollm2_path: Path, oracle: torch.nn.Module) -> None:
    with ktcore.load(smollm2_path, backend="cpu", rules="reference", context=1024) as model:
        prompts = [model.tokenizer.encode(p) for p in PROMPTS]
        stop = model.tokenizer.stop_ids
        ours = [
            model.generate(torch.tensor([i]), max_new_tokens=NEW_TOKENS, temperature=0)[0].tolist() for i in prompts[:2]
        ]
        # the rest runs as one ragged batch
        batch = [Sequence(list(p), SamplingParams(temperature=0), NEW_TOKENS, stop) for p in prompts[2:]]
        for sequence in batch:
            model.engine.add(sequence)
        while model.engine.step():
            pass
    for prompt, tokens in zip(prompts, ours + [s.tokens for s in batch], strict=True):
        answer = tokens[len(prompt) :]
        assert len(answer) == NEW_TOKENS or answer[-1] in stop
        # greedy is to take the likeliest token after each: all of them in one pass, where generate() needs one each
        with torch.inference_mode():
            likeliest = oracle(torch.tensor([tokens])).logits[0].argmax(-1).tolist()
        assert answer == likeliest[len(prompt) - 1 : -1]


def test_native_kernels_stay_close_to_float32(smollm2_path: Path, text_ids: list[int], expected: torch.Tensor) -> None:
    with ktcore.load(smollm2_path, backend="cpu") as model:
        assert model.plan.choices["layers.0.attn"].implementation.id == "cpu.attention"
        kl, agreement = _divergence(expected, model.logits(text_ids))
    assert kl <= 3e-3
    assert agreement >= 0.97


def test_perplexity_stays_within_a_fifth_of_a_percent(
    smollm2_path: Path, text_ids: list[int], expected: torch.Tensor
) -> None:
    with ktcore.load(smollm2_path, backend="cpu") as model:
        ours = model.logits(text_ids).double().log_softmax(-1)
    following = torch.tensor(text_ids[1:])[:, None]
    of_float32, of_ours = ((-p[:-1].gather(1, following).mean()).exp().item() for p in (expected, ours))
    assert 5 < of_float32 < 40
    assert abs(of_ours / of_float32 - 1) <= 0.002


def test_without_8bit_activations_the_native_kernels_are_all_but_exact(
    smollm2_path: Path, text_ids: list[int], expected: torch.Tensor, tmp_path: Path
) -> None:
    rules = tmp_path / "exact.yaml"
    rules.write_text(
        "version: 1\nrules:\n"
        "  - {name: a, match: {op: attention}, use: cpu.attention, device: host, options: {activations: f32}}\n"
        "  - {name: m, match: {op: mlp}, use: cpu.mlp, device: host, options: {activations: f32}}\n"
        "  - {name: h, match: {op: linear, name: head}, use: cpu.linear, device: host, options: {activations: f32}}\n"
    )
    with ktcore.load(smollm2_path, backend="cpu", rules=rules) as model:
        kl, agreement = _divergence(expected, model.logits(text_ids))
    assert kl <= 1e-5
    assert agreement >= 0.99


def test_decoding_and_prefill_agree(smollm2_path: Path, text_ids: list[int]) -> None:
    """Tokens drawn one by one are those that a prefill over the whole answer would predict."""
    with ktcore.load(smollm2_path, backend="cpu") as model:
        prompt = text_ids[:100]
        answer = model.generate(torch.tensor([prompt]), max_new_tokens=32, temperature=0)[0].tolist()
        logits = model.logits(answer)
    margin = logits.topk(2, -1).values
    for position in range(len(prompt) - 1, len(answer) - 1):
        if margin[position, 0] - margin[position, 1] > 0.05:
            assert int(logits[position].argmax()) == answer[position + 1]
