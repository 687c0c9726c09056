"""Tiny random models of two families, written as transformers writes them, with float64 answers from transformers."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from ktcore.conformance.levels.tiny_configs import deepseek_v3, qwen3_moe

PROMPTS = 8
DRAWN = 32
NEW_TOKENS = 12
LENGTHS = (5, 1, 17, 33, 2, 64, 65, 40)
LONG = 130
VOCAB = 128
MARGIN = 0.02
"""Every token is the largest by this much of the logits' standard deviation: no rounding decides."""
SHAKES, SHAKE = 3, 2e-3
"""How often, and by how much of itself, an embedding is shaken to see whether an answer is steady."""
FAMILIES = ("moe", "mla")

_SMALL: dict[str, Any] = {"vocab_size": VOCAB, "max_position_embeddings": 2560, "initializer_range": 0.15}


@dataclass(frozen=True)
class TinyModel:
    """A model folder and what is right.

    Attributes:
        prompts: ids and the greedy answer to them.
        long_logits: float64 [tokens, vocab] of `long_prompt`.
    """

    folder: Path
    prompts: tuple[tuple[list[int], list[int]], ...]
    long_prompt: list[int]
    long_logits: torch.Tensor


@contextmanager
def tiny_model(family: str, seed: int) -> Iterator[TinyModel]:
    """The model of a family; its folder is gone afterwards, its answers are kept for the next time."""
    with tempfile.TemporaryDirectory(prefix="ktcore-conformance-") as folder:
        model = _make(family, seed)
        model.save_pretrained(folder)
        prompts, long_prompt, long_logits = _answers(family, seed)
        yield TinyModel(Path(folder), prompts, long_prompt, long_logits)


@lru_cache(maxsize=4)
def own_logits(family: str, seed: int, dtype: str) -> torch.Tensor:
    """Logits float64 [tokens, vocab] of the long prompt as torch itself computes the whole model in a precision."""
    model = _make(family, seed).to(getattr(torch, dtype))
    with torch.no_grad():
        out: torch.Tensor = model(torch.tensor([_answers(family, seed)[1]])).logits[0]
    return out.double()


def _make(family: str, seed: int) -> Any:
    from transformers import AutoModelForCausalLM

    config = _config(family)
    config._attn_implementation = config._experts_implementation = "eager"  # the plain ones know float64
    generator_state = torch.get_rng_state()
    torch.manual_seed(1000 + seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, value in [*model.named_parameters(), *model.named_buffers()]:
            if value.dim() == 1 and "inv_freq" not in name:
                value.add_(torch.randn_like(value) * 0.2)
    torch.set_rng_state(generator_state)
    return model


@lru_cache(maxsize=4)
def _answers(family: str, seed: int) -> tuple[Any, list[int], torch.Tensor]:
    model = _make(family, seed).double()
    generator = torch.Generator().manual_seed(seed)
    chosen = []
    for length in LENGTHS:
        best: tuple[float, list[int], list[int]] = (-1.0, [], [])
        for _ in range(DRAWN):
            prompt = torch.randint(3, VOCAB, (length,), generator=generator).tolist()
            answer, margin = _greedy(model, prompt)
            if margin <= max(MARGIN, best[0]) or not _steady(model, prompt, answer, generator):
                continue
            best = (margin, prompt, answer)
            if margin > 2 * MARGIN:
                break
        if not best[1]:
            raise AssertionError("the case is badly made: every prompt has a token, or an expert, that is nearly a tie")
        chosen.append((best[1], best[2]))
    long_prompt = torch.randint(3, VOCAB, (LONG,), generator=generator).tolist()
    with torch.no_grad():
        logits = model(torch.tensor([long_prompt])).logits[0]
    return tuple(chosen), long_prompt, logits


def _steady(model: Any, prompt: list[int], answer: list[int], generator: torch.Generator) -> bool:
    """Whether the answer stays when every embedding is off a little: no choice of an expert hangs by a hair either."""
    table = model.get_input_embeddings().weight
    kept = table.detach().clone()
    try:
        for _ in range(SHAKES):
            with torch.no_grad():
                table.copy_(kept * (1 + SHAKE * torch.randn(kept.shape, generator=generator, dtype=kept.dtype)))
            if _greedy(model, prompt)[0] != answer:
                return False
        return True
    finally:
        with torch.no_grad():
            table.copy_(kept)


def _greedy(model: Any, prompt: list[int]) -> tuple[list[int], float]:
    """The answer, and the smallest margin by which a token of it was the largest."""
    tokens, margin = list(prompt), float("inf")
    with torch.no_grad():
        past = None
        feed = torch.tensor([tokens])
        for _ in range(NEW_TOKENS):
            out = model(feed, past_key_values=past, use_cache=True)
            past, row = out.past_key_values, out.logits[0, -1]
            top = row.topk(2)
            margin = min(margin, float((top.values[0] - top.values[1]) / row.std()))
            tokens.append(int(top.indices[0]))
            feed = torch.tensor([tokens[-1:]])
    return tokens[len(prompt) :], margin


def _config(family: str) -> Any:
    from transformers import DeepseekV3Config, Qwen3MoeConfig

    if family == "moe":
        return Qwen3MoeConfig(**qwen3_moe(**_SMALL))
    return DeepseekV3Config(**deepseek_v3(**_SMALL, num_hidden_layers=3, first_k_dense_replace=1))
