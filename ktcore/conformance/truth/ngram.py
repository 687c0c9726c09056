"""Truth of n-gram embeddings: hashes in whole numbers of any size, and each token of a sequence for itself."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ktcore.conformance.truth.arithmetic import Arithmetic
from ktcore.conformance.truth.small import Values, linear
from ktcore.ops import NGramSpec, NGramTableSpec

WORD = 1 << 64


def table_rows(spec: NGramTableSpec, ids: Sequence[int], t: int) -> list[int]:
    """Rows of the table that token t of a whole sequence names."""
    orders = len(spec.multipliers)
    earlier = [ids[t]]
    for back in range(1, orders):
        ended = t - back < 0 or spec.eos in ids[t - back : t]
        earlier.append(spec.eos if ended else ids[t - back])
    named, each = [], len(spec.sizes) // (orders - 1)
    for n in range(2, orders + 1):
        mixed = 0
        for token, multiplier in zip(earlier[:n], spec.multipliers, strict=False):
            mixed ^= token * multiplier % WORD
        mixed = mixed - WORD if mixed >= WORD // 2 else mixed
        named += [mixed % spec.sizes[j] + spec.offsets[j] for j in range((n - 2) * each, (n - 1) * each)]
    return named


def table(spec: NGramTableSpec, values: torch.Tensor, ids: Sequence[int]) -> torch.Tensor:
    """Embeddings [L, width] of a whole sequence, `values` [rows, dim]."""
    return torch.stack([torch.cat([values[row] for row in table_rows(spec, ids, t)]) for t in range(len(ids))])


def ngram(
    spec: NGramSpec, w: Values, x: torch.Tensor, ids: Sequence[int], a: Arithmetic, prefix: str = ""
) -> torch.Tensor:
    """A whole sequence x [L, N * hidden] -> the same shape."""
    values = a.cast(w[f"{prefix}table.table"]).reshape(-1, spec.table.dim)
    e = table(spec.table, values, ids)
    shape = (len(ids), spec.streams, spec.hidden)

    def normed(y: torch.Tensor, role: str) -> torch.Tensor:
        y = a.cast(y).reshape(shape)
        y = y / torch.sqrt((y * y).sum(-1, keepdim=True) / spec.hidden + spec.eps)
        return y * (a.cast(w[f"{prefix}{role}"]).reshape(shape[1:]) + spec.norm_offset)

    key = normed(linear(spec.key, w, e, a, f"{prefix}key."), "norm_key")
    score = (key * normed(x, "norm_query")).sum(-1) / spec.hidden**0.5
    root = torch.sqrt(torch.maximum(score.abs(), torch.full_like(score, 1e-6)))
    gate = 1 / (1 + torch.exp(-torch.sign(score) * root))
    p = gate[..., None] * linear(spec.value, w, e, a, f"{prefix}value.")[:, None]
    inputs, factors = normed(p, "norm_conv").flatten(1), a.cast(w[f"{prefix}conv"])
    mixed = torch.zeros_like(inputs)
    for t in range(len(ids)):
        for i in range(spec.conv_width):
            at = t - (spec.conv_width - 1 - i) * spec.dilation
            if at >= 0:
                mixed[t] += factors[:, i] * inputs[at]
    return a.cast(x) + p.flatten(1) + mixed / (1 + torch.exp(-mixed))
