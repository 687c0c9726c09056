"""Sampling the next token: temperature, repetition penalty, top-k, top-p and min-p, in transformers' order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from ktcore.errors import RequestError
from ktcore.ops.base import Spec


@dataclass(frozen=True)
class SamplingSpec(Spec):
    """Call: logits float32 [vocab], parameters, ids seen so far, generator -> token id."""

    op: ClassVar[str] = "sampling"
    vocab: int


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is drawn.

    Attributes:
        temperature: 0 is greedy and deterministic.
        top_k: keep the k likeliest; 0 keeps all.
        top_p: keep the smallest set whose probability reaches p (Holtzman et al., 2020); 1 keeps all.
        min_p: drop what is less likely than min_p times the likeliest; 0 drops nothing.
        repetition_penalty: divides positive and multiplies negative logits of seen tokens (Keskar et al., 2019).
        seed: the same seed gives the same text; None draws a fresh one.
    """

    temperature: float = 0.7
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        checks = {
            "temperature": (self.temperature >= 0, "must be 0 (greedy) or above"),
            "top_k": (self.top_k >= 0, "must be 0 (off) or above"),
            "top_p": (0 < self.top_p <= 1, "must be above 0 and at most 1"),
            "min_p": (0 <= self.min_p < 1, "must be at least 0 and below 1"),
            "repetition_penalty": (self.repetition_penalty > 0, "must be above 0 (1 is off)"),
            "seed": (self.seed is None or -(2**63) <= self.seed < 2**63, "must fit into 64 bits"),
        }
        for name, (fine, rule) in checks.items():
            if not fine:
                raise RequestError(f"{name}={getattr(self, name)} {rule}")


def sample(logits: torch.Tensor, params: SamplingParams, seen: Sequence[int], generator: torch.Generator | None) -> int:
    """Draw one token id from logits float32 [vocab].

    Args:
        seen: ids of prompt and answer so far, for the repetition penalty.
        generator: on the logits' device; may be None only with temperature 0.
    """
    if params.repetition_penalty != 1.0 and seen:
        repeated = torch.tensor(sorted(set(seen)), device=logits.device)
        values = logits[repeated]
        penalty = params.repetition_penalty
        logits = logits.clone()
        logits[repeated] = torch.where(values > 0, values / penalty, values * penalty)
    if params.temperature == 0:
        return int(logits.argmax())
    probs, index = _candidates(logits / params.temperature, params)
    choice = torch.multinomial(probs, 1, generator=generator)
    return int(choice if index is None else index[choice])


def _candidates(logits: torch.Tensor, params: SamplingParams) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Unnormalised probabilities of what may be drawn, and their token ids (None: all ids in order)."""
    if params.top_k == 0 and params.top_p == 1.0 and params.min_p == 0.0:
        return logits.softmax(-1), None
    if 0 < params.top_k < logits.shape[-1]:
        logits, index = logits.topk(params.top_k)
    else:
        logits, index = logits.sort(descending=True)
    probs = logits.softmax(-1)
    keep = torch.ones_like(probs, dtype=torch.bool)
    if params.top_p < 1.0:
        keep &= probs.cumsum(-1) - probs < params.top_p
    if params.min_p > 0.0:
        # relative to the distribution that top-p left, which renormalising does not change
        keep &= probs >= params.min_p * probs[0]
    keep[0] = True  # a top-p too small for float32 would drop even the likeliest
    return probs[keep], index[keep]
