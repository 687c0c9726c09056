"""From a step's logits to the next token of each of its sequences, every one by its own parameters and generator."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from ktcore.engine.schedule.sequence import Chosen, Finish, Sequence
from ktcore.engine.step.scores import Scores
from ktcore.errors import LogitsError, RequestError
from ktcore.ops.sampling import check_highest, highest

FEW = 1024
"""Most candidates that are fetched from a device in place of a row."""


def draw(
    sampler: Callable[..., int],
    sequences: Iterable[Sequence],
    scores: Scores,
    guesses: Iterable[tuple[int, ...]] | None = None,
) -> None:
    """Append a token to each sequence, drawn from its row of a step's scores.

    Rows know nothing of each other, so that what else is in the batch cannot change an answer. Logits on a device stay
    there where an answer takes the likeliest token, or one of the k likeliest, and nothing else is asked of them; the
    tokens are those that whole rows would give.

    A sequence that ran guessed tokens behind its last one has a row for that one and one for each guess. Each place is
    drawn from its row as without guesses; the first token that was guessed otherwise is the last one to be drawn, since
    the rows behind belong to another text.

    Args:
        sampler: the model's sampling operator (`ktcore.ops.sampling.SamplingSpec`).
        guesses: of each sequence; None: there are none.
    """
    waiting = list(sequences)
    guessed = [()] * len(waiting) if guesses is None else list(guesses)
    needs: list[int | None] = []
    for sequence, guess in zip(waiting, guessed, strict=True):
        needs += [_needed(sequence) if not scores.on_host else None] * (1 + len(guess))
    ids = scores.likeliest() if 0 in needs else []
    rows: dict[int, torch.Tensor] = {}
    some = [i for i, need in enumerate(needs) if need]
    if some:
        count = max(need for need in needs if need)
        rows |= zip(some, scores.candidates(some, count), strict=True)
    whole = [i for i, need in enumerate(needs) if need is None]
    if whole:
        rows |= zip(whole, scores.rows(whole), strict=True)
    at = 0
    for sequence, guess in zip(waiting, guessed, strict=True):
        right = 0
        for i, expected in enumerate((*guess, None), at):
            _append(sampler, sequence, rows.get(i), ids[i] if i not in rows else None)
            if sequence.finish is not None or sequence.tokens[-1] != expected:
                break
            right += 1
        at += 1 + len(guess)
        sequence.cached += right
        sequence.learn(len(guess), right)


def _append(
    sampler: Callable[..., int], sequence: Sequence, row: torch.Tensor | None, likeliest: tuple[int, float] | None
) -> None:
    try:
        if row is not None:
            if sequence.guide is not None or sequence.top_logprobs is not None:
                # before a form hides what is not a number, and before logprobs tell of it; else drawing sees to it
                check_highest(float(row[highest(row)]))
            _next(sampler, sequence, row)
        else:
            assert likeliest is not None
            token, logit = likeliest
            check_highest(logit)
            sequence.append(token)
    # its form cannot be followed, or its logits are no numbers: no other answer's concern
    except (RequestError, LogitsError) as error:
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
