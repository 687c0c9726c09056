"""Sequences in a model with recurrent states: more than there are slots, ended early, each as if it were alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3NextConfig

import ktcore
from ktcore.engine.schedule.sequence import Finish, Sequence
from ktcore.engine.step.engine import Engine
from ktcore.ops import SamplingParams

CONFIG = Qwen3NextConfig(
    vocab_size=256,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=16,
    moe_intermediate_size=16,
    shared_expert_intermediate_size=16,
    num_experts=4,
    num_experts_per_tok=2,
    linear_key_head_dim=8,
    linear_value_head_dim=8,
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    initializer_range=0.2,
)


@pytest.fixture
def model(tmp_path: Path) -> Iterator[ktcore.Model]:
    torch.manual_seed(3)
    AutoModelForCausalLM.from_config(CONFIG, dtype=torch.float32).save_pretrained(tmp_path)
    with ktcore.load(tmp_path, backend="cpu", rules="reference", context=1024) as loaded:
        yield loaded


def _prompts(count: int) -> list[list[int]]:
    g = torch.Generator().manual_seed(4)
    return [torch.randint(3, 256, (5 + 7 * i % 40,), generator=g).tolist() for i in range(count)]


def _sequence(prompt: list[int], new: int) -> Sequence:
    return Sequence(prompt, SamplingParams(temperature=0), new)


def _alone(model: ktcore.Model, prompt: list[int], new: int) -> list[int]:
    return list(model.generate(torch.tensor([prompt]), max_new_tokens=new, temperature=0)[0].tolist())


def test_the_numbers_are_transformers(model: ktcore.Model, tmp_path: Path) -> None:
    prompt = _prompts(3)[2]
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    with torch.inference_mode():
        expected = theirs(torch.tensor([prompt])).logits[0]
    torch.testing.assert_close(model.logits(prompt), expected, rtol=1e-3, atol=1e-3)


def test_more_sequences_than_slots_and_prompts_in_pieces(model: ktcore.Model) -> None:
    expected = [_alone(model, prompt, 9) for prompt in _prompts(7)]
    engine = Engine(model.engine.model, 1024, 16, chunk=13, state_slots=3)
    sequences = [_sequence(prompt, 9) for prompt in _prompts(7)]
    for sequence in sequences:
        engine.add(sequence)
    most = 0
    while engine.step():
        most = max(most, len(engine.scheduler.running))
    assert most <= 3
    assert [s.tokens for s in sequences] == expected
    assert engine.scheduler.slots is not None
    assert engine.scheduler.slots.free == 3
    assert all(s.state_slot is None for s in sequences)


def test_a_slot_of_a_cancelled_sequence_serves_the_next(model: ktcore.Model) -> None:
    first, second, third = _prompts(3)
    expected = [_alone(model, prompt, 12) for prompt in (second, third)]
    engine = Engine(model.engine.model, 1024, 16, state_slots=2)
    stopped, kept, late = (_sequence(prompt, 12) for prompt in (first, second, third))
    for sequence in (stopped, kept, late):
        engine.add(sequence)
    for _ in range(4):
        engine.step()
    assert late.state_slot is None
    engine.cancel(stopped)
    while engine.step():
        pass
    assert stopped.finish is Finish.CANCELLED
    assert [kept.tokens, late.tokens] == expected


def test_the_plan_counts_the_states(model: ktcore.Model) -> None:
    need = model.plan.memory(1024)["cpu:0"]
    tokens = 1024 * model.plan.cache_bytes_per_token
    # three layers: 3 inputs of the convolution, and a matrix a value head, in float32 for 16 sequences
    assert need.kv == tokens + 16 * 3 * 4 * (3 * (2 * 2 * 8 + 4 * 8) + 4 * 8 * 8)
