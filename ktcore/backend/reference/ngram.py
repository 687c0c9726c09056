"""References of n-gram embeddings: rows read from the mapped file by token ids, and what streams get of them."""

from __future__ import annotations

from typing import Any, cast

import torch

from ktcore.backend.implementation import LoadRequest, Module
from ktcore.backend.reference.base import FLOAT_BYTES, ReferenceImplementation, loaded
from ktcore.errors import RequestError
from ktcore.ops.batch import StepBatch
from ktcore.ops.ngram import NGramSpec, NGramTableSpec, PrecededSpec, dilated_conv, gated_values, ngram_rows
from ktcore.ops.streams import stream_norm


class ReferenceNGramTable(ReferenceImplementation):
    """Keeps nothing of the table: each step asks the system for the pages that its rows lie in, then reads them."""

    id = "reference.ngram_table"
    spec_type = NGramTableSpec

    def load(self, request: LoadRequest) -> Module:
        return _NGramTable(request)

    def packed_bytes(self, spec: NGramTableSpec, stored_bytes: int) -> int:
        return 0


class _NGramTable:
    def __init__(self, request: LoadRequest) -> None:
        self._spec = cast(NGramTableSpec, request.spec)
        self._state = request.children["state"]
        self._device = request.runtime.device
        self._table = request.weights["table"]
        self._table.scattered()

    def __call__(self, step: StepBatch) -> torch.Tensor:
        s, orders = self._spec, len(self._spec.multipliers) - 1
        (held,) = self._state.read(step)
        rows, after = [], []
        for i in range(step.sequences):
            ids = step.token_ids[step.q_start[i] : step.q_start[i + 1]]
            before = torch.full((orders,), s.eos) if step.starts(i) else held[i].cpu().long()
            if int(ids.min()) < 0:
                raise RequestError(f"token {int(ids.min())} is no id that a table of n-grams knows")
            rows.append(ngram_rows(ids, before, s))
            after.append(torch.cat((before, ids))[-orders:])
        self._state.write(step, torch.stack(after).to(self._device, torch.float32))
        values = self._table.gather(torch.cat(rows).flatten().numpy())
        return values.view(step.tokens, s.width).to(self._device)


class ReferenceNGram(ReferenceImplementation):
    """Composed of the table and two projections."""

    id = "reference.ngram"
    spec_type = NGramSpec
    handles = frozenset({"norm_offset"})

    def load(self, request: LoadRequest) -> Module:
        return _NGram(request)

    def packed_bytes(self, spec: NGramSpec, stored_bytes: int) -> int:
        return FLOAT_BYTES * spec.streams * spec.hidden * (3 + spec.conv_width)


class _NGram:
    def __init__(self, request: LoadRequest) -> None:
        self._spec = spec = cast(NGramSpec, request.spec)
        self._parts = request.children
        roles = ("norm_key", "norm_query", "norm_conv")
        self._key, self._query, self._conv_norm = (loaded(request, role) + spec.norm_offset for role in roles)
        self._conv = loaded(request, "conv")

    def __call__(self, x: torch.Tensor, step: StepBatch) -> torch.Tensor:
        s, parts = self._spec, self._parts
        e = parts["table"](step)
        key = stream_norm(parts["key"](e), self._key, s.streams, s.eps)
        query = stream_norm(x, self._query, s.streams, s.eps)
        p = gated_values(s, key, query, parts["value"](e))
        normed = stream_norm(p, self._conv_norm, s.streams, s.eps)
        (before,) = parts["state"].read(step)
        mixed, after = [], []
        for i in range(step.sequences):
            y, last = dilated_conv(normed[step.q_start[i] : step.q_start[i + 1]], before[i], self._conv, s.dilation)
            mixed.append(y)
            after.append(last)
        parts["state"].write(step, torch.stack(after))
        return x + p + torch.cat(mixed)


class ReferencePreceded(ReferenceImplementation):
    """One after the other."""

    id = "reference.preceded"
    spec_type = PrecededSpec

    def load(self, request: LoadRequest) -> Module:
        parts = request.children

        def run(x: torch.Tensor, step: StepBatch) -> Any:
            return parts["branch"](parts["before"](x, step), step)

        return run
