"""Tables of n-grams, and what is mixed into streams, for the backend of these tests."""

from __future__ import annotations

from typing import Any

import torch

from ktcore.backend import LoadRequest
from ktcore.ops import StepBatch
from ktcore.ops.ngram import dilated_conv, gated_values, ngram_rows
from ktcore.ops.streams import stream_norm


def weight(request: LoadRequest, role: str) -> torch.Tensor:
    return request.weights[role].tensor()


def ngram_table(request: LoadRequest) -> Any:
    spec: Any = request.spec
    state = request.children["state"]
    rows = weight(request, "table").view(-1, spec.dim)

    def run(step: StepBatch) -> torch.Tensor:
        (held,) = state.read(step)
        named, after = [], []
        for i in range(step.sequences):
            ids = step.token_ids[step.q_start[i] : step.q_start[i + 1]]
            before = torch.full((held.shape[1],), spec.eos) if step.starts(i) else held[i].long()
            named.append(ngram_rows(ids, before, spec))
            after.append(torch.cat((before, ids))[len(ids) :].float())
        state.write(step, torch.stack(after))
        return rows[torch.cat(named)].flatten(1)

    return run


def ngram(request: LoadRequest) -> Any:
    spec: Any = request.spec
    p = request.children
    norms = [weight(request, f"norm_{role}") + spec.norm_offset for role in ("key", "query", "conv")]
    conv = weight(request, "conv")

    def run(x: torch.Tensor, step: StepBatch) -> torch.Tensor:
        e = p["table"](step)
        key, query = (
            stream_norm(y, w, spec.streams, spec.eps) for y, w in zip((p["key"](e), x), norms[:2], strict=True)
        )
        got = gated_values(spec, key, query, p["value"](e))
        inputs = stream_norm(got, norms[2], spec.streams, spec.eps)
        (before,) = p["state"].read(step)
        out, after = [], []
        for i in range(step.sequences):
            y, last = dilated_conv(inputs[step.q_start[i] : step.q_start[i + 1]], before[i], conv, spec.dilation)
            out.append(y)
            after.append(last)
        p["state"].write(step, torch.stack(after))
        return x + got + torch.cat(out)

    return run


def preceded(request: LoadRequest) -> Any:
    p = request.children
    return lambda x, step: p["branch"](p["before"](x, step), step)
