"""Sampling the next token: biases, penalties, temperature and filters, in the order of transformers' processors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from ktcore.errors import LogitsError, RequestError
from ktcore.ops.base import Spec

# The likeliest tokens that are sorted first: where they settle top-p and min-p, the others need no sorting.
_FIRST = 1024


@dataclass(frozen=True)
class SamplingSpec(Spec):
    """Call: logits float32 [vocab], parameters, ids seen so far, generator, prompt's length in them -> token id."""

    op: ClassVar[str] = "sampling"
    vocab: int


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is drawn. The fields take effect in this order: logit_bias, the penalties, temperature, top_k,
    top_p, min_p, typical_p. Of tokens with equal logits the one with the lower id comes first.

    Attributes:
        temperature: 0 is greedy and deterministic.
        top_k: keep the k likeliest; 0 keeps all, and so does -1, which becomes 0.
        top_p: keep the smallest set whose probability reaches p (Holtzman et al., 2020), the likeliest always; 1 keeps
            all.
        min_p: drop what is less likely than min_p times the likeliest; 0 drops nothing.
        repetition_penalty: divides positive and multiplies negative logits of seen tokens (Keskar et al., 2019).
        seed: the same seed gives the same text; None draws a fresh one.
        typical_p: keep the smallest set of tokens of typical information content whose probability reaches p (Meister
            et al., 2022); 1 keeps all.
        presence_penalty: taken from the logit of every token that the answer holds (OpenAI's definition).
        frequency_penalty: taken from a token's logit once for each time that the answer holds it (OpenAI's definition).
        logit_bias: token id -> what is added to its logit.
    """

    temperature: float = 0.7
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    typical_p: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        checks = {
            "temperature": (0 <= self.temperature < math.inf, "must be 0 (greedy) or above, and finite"),
            "top_k": (self.top_k >= -1, "must be 0 or -1 (off), or above"),
            "top_p": (0 <= self.top_p <= 1, "must be from 0 to 1"),
            "min_p": (0 <= self.min_p <= 1, "must be from 0 to 1"),
            "repetition_penalty": (0 < self.repetition_penalty < math.inf, "must be above 0 and finite (1 is off)"),
            "seed": (self.seed is None or -(2**63) <= self.seed < 2**63, "must fit into 64 bits"),
            "typical_p": (0 < self.typical_p <= 1, "must be above 0 and at most 1"),
            "presence_penalty": (math.isfinite(self.presence_penalty), "must be finite (0 is off)"),
            "frequency_penalty": (math.isfinite(self.frequency_penalty), "must be finite (0 is off)"),
            "logit_bias": (all(map(math.isfinite, self.logit_bias.values())), "must hold finite numbers"),
        }
        for name, (fine, rule) in checks.items():
            if not fine:
                raise RequestError(f"{name}={getattr(self, name)} {rule}")
        if self.top_k == -1:
            # one spelling of "all", so that nothing behind has to know two
            object.__setattr__(self, "top_k", 0)


def sample(
    logits: torch.Tensor,
    params: SamplingParams,
    seen: Sequence[int],
    generator: torch.Generator | None,
    prompt_len: int = 0,
) -> int:
    """Draw one token id from logits float32 [vocab].

    Args:
        seen: ids of prompt and answer so far, for the penalties.
        generator: on the logits' device; may be None only with temperature 0.
        prompt_len: how many of `seen` are the prompt: presence and frequency count in the answer alone.

    Raises:
        LogitsError: the logits are not numbers.
    """
    logits = penalised(logits, params, seen, prompt_len)
    if params.temperature == 0:
        found = highest(logits)
        check_highest(float(logits[found]))
        return found
    probs, index = _candidates(logits / params.temperature, params)
    choice = _drawn(probs, generator)
    return int(choice if index is None else index[choice])


def highest(logits: torch.Tensor) -> int:
    """Index of the highest of logits float32 [vocab], the lowest of equals; of what is not a number the first."""
    # on the host by numpy, which takes many at a time: a tenth of the time that torch takes for 150,000. Neither starts
    # torch's threads, as max would: they hold up the native ones
    return int(logits.numpy().argmax() if logits.device.type == "cpu" else logits.argmax())


def check_highest(logit: float) -> None:
    """Refuse a row by its highest logit, which is NaN where any is.

    Raises:
        LogitsError: it is NaN or infinite: nothing can be drawn from the row.
    """
    if not math.isfinite(logit):
        raise LogitsError(
            f"no token can be drawn: the model's logits are not numbers (the highest is {logit})",
            "the model's weights are damaged, or a value overflowed; --rules reference computes in float32",
        )


def _drawn(probs: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
    """An index, drawn by inverting the distribution: one random number, where torch.multinomial takes one a token."""
    total = probs.double().cumsum(-1)
    if not (len(total) and total[-1] > 0):  # filters may leave nothing of what is not a number
        check_highest(math.nan)
    place = torch.rand(1, dtype=torch.float64, generator=generator, device=probs.device) * total[-1]
    # below the end, whatever rounding does, and to the right of equals: what has no probability is never taken
    place = torch.minimum(place, torch.nextafter(total[-1:], torch.zeros_like(total[-1:])))
    return torch.searchsorted(total, place, right=True)


def penalised(logits: torch.Tensor, params: SamplingParams, seen: Sequence[int], prompt_len: int = 0) -> torch.Tensor:
    """Logits float32 [vocab] with biases and penalties; the tensor itself where there are none.

    Formulas: transformers' SequenceBiasLogitsProcessor and RepetitionPenaltyLogitsProcessor; presence and frequency as
    OpenAI's API reference has them.
    """
    given = logits
    if params.logit_bias:
        logits = logits.clone()
        ids = torch.tensor(list(params.logit_bias), device=logits.device)
        logits[ids] += torch.tensor(list(params.logit_bias.values()), dtype=logits.dtype, device=logits.device)
    if params.repetition_penalty != 1.0 and seen:
        logits = logits.clone() if logits is given else logits
        ids = torch.tensor(list(set(seen)), device=logits.device)
        values, penalty = logits[ids], params.repetition_penalty
        logits[ids] = torch.where(values > 0, values / penalty, values * penalty)
    if (params.presence_penalty or params.frequency_penalty) and len(seen) > prompt_len:
        logits = logits.clone() if logits is given else logits
        answer = torch.tensor(seen[prompt_len:], device=logits.device)
        ids, counts = torch.unique(answer, return_counts=True)
        logits[ids] -= params.frequency_penalty * counts + params.presence_penalty
    return logits


def _candidates(logits: torch.Tensor, params: SamplingParams) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Unnormalised probabilities of what may be drawn, and their token ids (None: all ids in order)."""
    if params.top_k == 0 and params.top_p == 1.0 and params.min_p == 0.0 and params.typical_p == 1.0:
        return logits.softmax(-1), None
    probs, index = _likeliest(logits, params)
    keep = torch.ones_like(probs, dtype=torch.bool)
    if params.top_p < 1.0:
        keep &= probs.cumsum(-1) - probs < params.top_p
    if params.min_p > 0.0:
        # relative to the distribution that top-p left, which renormalising does not change
        keep &= probs >= params.min_p * probs[0]
    keep[0] = True  # a top-p too small for float32 would drop even the likeliest
    probs, index = probs[keep], index[keep]
    if params.typical_p < 1.0:
        typical = _typical(probs, params.typical_p)
        probs, index = probs[typical], index[typical]
    return probs, index


def _likeliest(logits: torch.Tensor, params: SamplingParams) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities in falling order and their ids: as many as the filters can keep, if that is known to be few."""
    vocab = logits.shape[-1]
    if 0 < params.top_k < vocab:
        values, index = _highest(logits, params.top_k)
        return values.softmax(-1), index
    total = logits.logsumexp(-1)
    if vocab > 4 * _FIRST and (params.top_p < 1.0 or params.min_p > 0.0):
        values, index = _highest(logits, _FIRST)
        probs = (values - total).exp()
        settled = params.top_p < 1.0 and bool(probs[:-1].sum() >= params.top_p)
        if settled or probs[-1] < params.min_p * probs[0]:
            return probs, index
    values, index = logits.sort(descending=True, stable=True)
    return (values - total).exp(), index


def _highest(logits: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The highest logits in falling order and their ids; of equals the lower ids, which topk leaves open."""
    least = logits.topk(count).values[-1]
    # not "at least": what is not a number must not vanish
    index = (~(logits < least)).nonzero()[:, 0]
    values, order = logits[index].sort(descending=True, stable=True)
    return values[:count], index[order[:count]]


def _typical(probs: torch.Tensor, mass: float) -> torch.Tensor:
    """Which of some unnormalised probabilities are of typical information content, as transformers'
    TypicalLogitsWarper has it."""
    logs = (probs / probs.sum()).log()
    entropy = -(logs * logs.exp()).nansum()
    strange = (-logs - entropy).abs()
    ordered, order = strange.sort()
    cumulative = logs[order].exp().cumsum(-1)
    last = (cumulative < mass).sum().clamp(max=len(probs) - 1)
    return strange <= ordered[last]
