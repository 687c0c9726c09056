"""From a step's logits to the next token of each of its sequences, every one by its own parameters and generator."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from ktcore.engine.sequence import Chosen, Finish, Sequence
from ktcore.errors import RequestError


def draw(sampler: Callable[..., int], sequences: Iterable[Sequence], logits: torch.Tensor) -> None:
    """Append a token to each sequence, drawn from its row of logits float32 [n, vocab] on the CPU.

    Rows know nothing of each other, so that what else is in the batch cannot change an answer.

    Args:
        sampler: the model's sampling operator (`ktcore.ops.sampling.SamplingSpec`).
    """
    for row, sequence in zip(logits, sequences, strict=True):
        try:
            _next(sampler, sequence, row)
        except RequestError as error:  # its form cannot be followed: no other answer's concern
            sequence.fail(error)


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
