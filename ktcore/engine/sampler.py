"""From a step's logits to the next token of each of its sequences, every one by its own parameters and generator."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from ktcore.engine.scores import Scores
from ktcore.engine.sequence import Chosen, Finish, Sequence
from ktcore.errors import RequestError

FEW = 1024
"""Most candidates that are fetched from a device in place of a row."""


def draw(sampler: Callable[..., int], sequences: Iterable[Sequence], scores: Scores) -> None:
    """Append a token to each sequence, drawn from its row of a step's scores.

    Rows know nothing of each other, so that what else is in the batch cannot change an answer. Logits on a device stay
    there where an answer takes the likeliest token, or one of the k likeliest, and nothing else is asked of them; the
    tokens are those that whole rows would give.

    Args:
        sampler: the model's sampling operator (`ktcore.ops.sampling.SamplingSpec`).
    """
    waiting = list(sequences)
    needs = [_needed(s) for s in waiting] if not scores.on_host else [None] * len(waiting)
    ids = scores.likeliest() if 0 in needs else []
    rows: dict[int, torch.Tensor] = {}
    some = [i for i, need in enumerate(needs) if need]
    if some:
        count = max(need for need in needs if need)
        rows |= zip(some, scores.candidates(some, count), strict=True)
    whole = [i for i, need in enumerate(needs) if need is None]
    if whole:
        rows |= zip(whole, scores.rows(whole), strict=True)
    for i, sequence in enumerate(waiting):
        if i not in rows:
            sequence.append(ids[i])
            continue
        try:
            _next(sampler, sequence, rows[i])
        except RequestError as error:  # its form cannot be followed: no other answer's concern
            sequence.fail(error)


def _needed(sequence: Sequence) -> int | None:
    """Highest logits that a token is drawn from: 0 for the very highest, None for all of them."""
    p = sequence.params
    changed = p.logit_bias or p.repetition_penalty != 1.0 or p.presence_penalty or p.frequency_penalty
    if changed or sequence.guide is not None or sequence.top_logprobs is not None:
        return None
    if p.temperature == 0:
        return 0
    return p.top_k if 0 < p.top_k <= FEW else None


def _next(sampler: Callable[..., int], sequence: Sequence, row: torch.Tensor) -> None:
    guide = sequence.guide
    free = row if guide is None else guide.allowed(row)
    token = sampler(free, sequence.params, sequence.tokens, sequence.generator, sequence.prompt_len)
    if sequence.top_logprobs is not None:
        sequence.chosen.append(_noted(row, token, sequence.top_logprobs))
    sequence.append(token)
    if guide is not None and sequence.finish is not Finish.STOP and guide.accept(token):
        sequence.finish = Finish.STOP


def _noted(row: torch.Tensor, token: int, count: int) -> Chosen:
    total = row.logsumexp(-1)
    values, ids = row.topk(min(count, row.shape[-1]))
    top = zip(ids.tolist(), (values - total).tolist(), strict=True)
    return Chosen(token, float(row[token] - total), tuple(top))
