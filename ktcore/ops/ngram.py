"""N-gram embeddings (Qwen3.8-Flash-Next): rows of a huge table that hashes of the last tokens name, mixed into streams.

The formulas are those of `Qwen4ExpTextPLELayer` and `Qwen4ExpTextNGramEmbedding` of transformers 5.24.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ktcore.ops.base import Spec
from ktcore.ops.linear import LinearSpec
from ktcore.ops.linear_attention import StateCacheSpec

LEAST_GATE = 1e-6


@dataclass(frozen=True)
class NGramTableSpec(Spec):
    """Call: step -> float32 [T, heads * dim], of the step's token ids alone. Weight `table` [rows, dim], or its rows in
    several parts, [parts, rows / parts, dim].

    With t_0 a token, t_1, t_2 … those before it, and t_s = eos unless none of t_1 … t_s is eos (none comes before the
    first), in 64-bit integers that wrap around:
        h_n = t_0 * multipliers[0] xor … xor t_(n-1) * multipliers[n-1]          for n = 2 … len(multipliers)
        row_j = h_n mod sizes[j] + offsets[j]         j over the heads of n = 2, then those of n = 3 …, as many each
    The result is the rows one after another.

    Attributes:
        multipliers, sizes, offsets: whole numbers below 2^63, as the checkpoint holds them.
        state: shape ((len(multipliers) - 1,)), the ids of the last tokens, oldest first.
    """

    op: ClassVar[str] = "ngram_table"
    rows: int
    dim: int
    multipliers: tuple[int, ...]
    sizes: tuple[int, ...]
    offsets: tuple[int, ...]
    eos: int
    table_format: str
    state: StateCacheSpec

    @property
    def width(self) -> int:
        """Values of the result."""
        return len(self.sizes) * self.dim


@dataclass(frozen=True)
class NGramSpec(Spec):
    """Call: X float32 [T, N * hidden], step -> X.

    With e of the table, norms that divide each stream by its own root mean square and multiply it with weight +
    norm_offset, and for each stream b:
        a_b = norm_key(key(e))_b . norm_query(X)_b / sqrt(hidden)
        p_b = sigmoid(sign(a_b) sqrt(max(|a_b|, 1e-6))) value(e)
        X = X + p + silu(conv(norm_conv(p))): causal and depthwise, over tokens that are `dilation` apart, no bias
    Weights of its own: `norm_key`, `norm_query`, `norm_conv` [N * hidden]; `conv` [N * hidden, conv_width], the
    oldest token's factor first.

    Attributes:
        key, value: [N * hidden, E] and [hidden, E], E the table's width.
        state: shape (((width - 1) * dilation, N * hidden),), the last inputs of the convolution, oldest first.
    """

    op: ClassVar[str] = "ngram"
    hidden: int
    streams: int
    eps: float
    conv_width: int
    dilation: int
    table: NGramTableSpec
    key: LinearSpec
    value: LinearSpec
    state: StateCacheSpec
    norm_offset: float = 0.0
    norm_format: str = "F32"
    conv_format: str = "F32"


@dataclass(frozen=True)
class PrecededSpec(Spec):
    """A branch with something in front of it. Call: x, step -> branch(before(x, step), step)."""

    op: ClassVar[str] = "preceded"
    before: Spec
    branch: Spec


def ngram_rows(ids: torch.Tensor, before: torch.Tensor, spec: NGramTableSpec) -> torch.Tensor:
    """Rows of the table int64 [T, heads] of tokens ids int64 [T] behind `before` int64 [len(multipliers) - 1].

    Where a sequence begins, `before` is all eos.
    """
    tokens, count = torch.cat((before, ids)), len(ids)
    orders = len(spec.multipliers) - 1
    sizes, offsets = torch.tensor(spec.sizes), torch.tensor(spec.offsets)
    mixed, whole = ids * spec.multipliers[0], torch.ones(count, dtype=torch.bool)
    hashes = []
    for back in range(1, orders + 1):
        earlier = tokens[orders - back : orders - back + count]
        whole = whole & (earlier != spec.eos)
        mixed = mixed ^ torch.where(whole, earlier, spec.eos) * spec.multipliers[back]
        hashes.append(mixed)
    of_heads = torch.stack(hashes, 1).repeat_interleave(len(spec.sizes) // orders, 1)
    return torch.remainder(of_heads, sizes) + offsets


def gated_values(spec: NGramSpec, key: torch.Tensor, query: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """p [T, N * hidden] of normed keys and queries [T, N * hidden] and values [T, hidden]."""
    apart = (-1, spec.streams, spec.hidden)
    a = (key.view(apart) * query.view(apart)).sum(-1) * spec.hidden**-0.5
    gate = torch.sigmoid(a.sign() * a.abs().clamp(min=LEAST_GATE).sqrt())
    return (gate[..., None] * value[:, None]).flatten(1)


def dilated_conv(
    x: torch.Tensor, before: torch.Tensor, weight: torch.Tensor, dilation: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """silu of the depthwise convolution of x [T, C] with weight [C, width] over tokens `dilation` apart.

    Args:
        before: [(width - 1) * dilation, C], the inputs before x; zeros where a sequence begins.

    Returns:
        [T, C], and the last of the inputs, which the next call takes as `before`.
    """
    inputs, width = torch.cat((before, x)), weight.shape[1]
    total = sum(inputs[i * dilation : i * dilation + len(x)] * weight[:, i] for i in range(width))
    return torch.nn.functional.silu(torch.as_tensor(total)), inputs[len(x) :]
