"""Stand-in for `npu_fused_infer_attention_score` over pages in layout TND, grouped queries and latents.

Limits are those of op-plugin's page for Atlas A2 and A3.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from tests.vendors.npu_checks import HALVES, check, contiguous, dtype, shape
from tests.vendors.npu_module import NpuModule

NAME = "FusedInferAttentionScoreV3"


class FusedInferAttention:
    """The operator, its `out` form, and what its workspace takes."""

    def __init__(self, npu: NpuModule) -> None:
        self._npu = npu

    def __call__(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **given: Any) -> Any:
        check(NAME, not self._npu.capturing, "lists of lengths are baked into the graph: capture the out form")
        out, lse = torch.empty_like(query), torch.empty(1, device=query.device)
        self._issue(query, key, value, out, **given)
        return out, lse

    def out(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **given: Any) -> None:
        """Into `out`, [attention, lse], with a `workspace` that is large enough."""
        (out, _), workspace = given.pop("out"), given.pop("workspace")
        needed = _scratch(query, given["actual_seq_lengths_kv"])
        check(NAME, workspace.numel() >= needed, f"a workspace of {workspace.numel()}, {needed} are needed")
        shape(NAME, "out", out, *query.shape)
        self._issue(query, key, value, out, **given)

    def max_workspace(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **given: Any) -> torch.Tensor:
        """Enough for these lengths."""
        return torch.empty(_scratch(query, given["actual_seq_lengths_kv"]), dtype=torch.uint8, device=query.device)

    def _issue(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        out: torch.Tensor,
        *,
        atten_mask: torch.Tensor | None = None,
        actual_seq_lengths: Sequence[int] | None = None,
        actual_seq_lengths_kv: Sequence[int] | None = None,
        block_table: torch.Tensor | None = None,
        query_rope: torch.Tensor | None = None,
        key_rope: torch.Tensor | None = None,
        num_heads: int = 1,
        scale: float = 1.0,
        input_layout: str = "BSH",
        num_key_value_heads: int = 0,
        sparse_mode: int = 0,
        block_size: int = 0,
    ) -> None:
        contiguous(NAME, query=query, key=key, value=value, query_rope=query_rope, key_rope=key_rope)
        check(NAME, input_layout == "TND", f"layout {input_layout}")
        dtype(NAME, "query", query, *HALVES)
        dtype(NAME, "key", key, query.dtype)
        dtype(NAME, "value", value, query.dtype)
        assert atten_mask is not None, "sparse mode 3 without a mask"
        assert block_table is not None, "no block table"
        check(NAME, sparse_mode == 3, f"sparse mode {sparse_mode}")
        dtype(NAME, "atten_mask", atten_mask, torch.bool, torch.int8, torch.uint8)
        shape(NAME, "atten_mask", atten_mask, 2048, 2048)
        ends, seen = _lengths(actual_seq_lengths), _lengths(actual_seq_lengths_kv)
        check(NAME, len(ends) == len(seen) <= 4096, f"{len(ends)} ends of queries, {len(seen)} lengths of keys")
        check(NAME, all(a <= b for a, b in zip([0, *ends], ends, strict=False)), "ends of queries are cumulative")
        check(NAME, ends[-1] == query.shape[0], f"{query.shape[0]} tokens, lengths end at {ends[-1]}")
        dtype(NAME, "block_table", block_table, torch.int32)
        check(NAME, block_table.dim() == 2 and block_table.shape[0] == len(ends), f"table {list(block_table.shape)}")
        check(NAME, max(seen) <= block_table.shape[1] * block_size, "more keys than the table has pages for")
        check(NAME, query.dim() == 3 and query.shape[1] == num_heads, f"query {list(query.shape)}, {num_heads} heads")
        check(NAME, block_size % 16 == 0 and 16 <= block_size <= 1024, f"pages of {block_size}")
        kv_heads = num_key_value_heads or num_heads
        if query_rope is None:
            _grouped(query, key, value, num_heads, kv_heads, block_size)
        else:
            assert key_rope is not None, "query_rope without key_rope"
            _latent(query, key, query_rope, key_rope, num_heads, kv_heads, block_size)
            longest = max(b - a for a, b in zip([0, *ends], ends, strict=False))
            check(NAME, longest <= 16, f"a request of {longest} query tokens over latents")

        def task(*tensors: torch.Tensor) -> None:
            with torch.inference_mode():
                _attend(tensors, ends, seen, scale, kv_heads)

        rope = [] if query_rope is None else [query_rope, key_rope]
        self._npu.issue(NAME, task, [out, query, key, value, atten_mask, block_table, *rope])  # type: ignore[list-item]


def _grouped(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, heads: int, kv_heads: int, page: int) -> None:
    d = query.shape[2]
    check(NAME, d in (128, 192), f"heads of {d} in TND")
    check(NAME, heads <= 256 and heads % kv_heads == 0 and heads // kv_heads <= 64, f"{heads} heads over {kv_heads}")
    check(NAME, kv_heads * d <= 65535, f"rows of {kv_heads * d}")
    shape(NAME, "key", key, key.shape[0], page, kv_heads * d)
    shape(NAME, "value", value, *key.shape)


def _latent(
    query: torch.Tensor,
    key: torch.Tensor,
    query_rope: torch.Tensor,
    key_rope: torch.Tensor,
    heads: int,
    kv_heads: int,
    page: int,
) -> None:
    check(NAME, query.shape[2] == 512, f"latents of {query.shape[2]}")
    check(NAME, heads in (1, 2, 4, 8, 16, 32, 64, 128), f"{heads} heads over latents")
    check(NAME, kv_heads == 1, f"{kv_heads} key heads of latents")
    dtype(NAME, "query_rope", query_rope, query.dtype)
    dtype(NAME, "key_rope", key_rope, key.dtype)
    shape(NAME, "query_rope", query_rope, *query.shape[:2], 64)
    shape(NAME, "key", key, key.shape[0], 1, page, 512)
    shape(NAME, "key_rope", key_rope, key.shape[0], 1, page, 64)


def _attend(
    tensors: Sequence[torch.Tensor], ends: Sequence[int], seen: Sequence[int], scale: float, kv_heads: int
) -> None:
    out, query, key, value, mask, table = (t for t in tensors[:6])
    assert mask[:2, :2].tolist() == [[0, 1], [0, 0]], "True must mean masked out"
    q = query.float()
    k, v = (t.reshape(-1, kv_heads, q.shape[2]) for t in (key, value))
    if len(tensors) > 6:
        q = torch.cat((q, tensors[6].float()), -1)
        k = torch.cat((k, tensors[7].reshape(-1, 1, 64)), -1)
    page = key.shape[1] if len(tensors) == 6 else key.shape[2]
    start = 0
    for i, (end, length) in enumerate(zip(ends, seen, strict=True)):
        at = torch.arange(length)
        rows = table[i].long()[at // page] * page + at % page
        group = q.shape[1] // kv_heads
        keys, values = (t[rows].float().repeat_interleave(group, 1) for t in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q[start:end], keys) * scale
        # bottom right: the last query sees all keys
        hidden = at[None] > torch.arange(length - (end - start), length)[:, None]
        shares = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        out[start:end] = torch.einsum("hqk,khd->qhd", shares, values)
        start = end


def _scratch(query: torch.Tensor, seen: Sequence[int]) -> int:
    return 64 + 4 * query.shape[1] * max(seen)


def _lengths(given: Sequence[int] | None) -> list[int]:
    check(NAME, given is not None, "lengths must be given in TND and over pages")
    assert given is not None
    check(NAME, isinstance(given, list) and all(type(v) is int for v in given), "lengths are a list of int")
    return list(given)
