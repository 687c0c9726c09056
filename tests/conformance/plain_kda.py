"""Kimi delta attention of the plain backend."""

from __future__ import annotations

from typing import Any

import torch

from ktcore.backend import LoadRequest
from ktcore.ops import StepBatch
from ktcore.ops.kda import channel_decay, channel_rule
from ktcore.ops.linear_attention import causal_conv, l2_normalised


def kimi(request: LoadRequest) -> Any:
    spec: Any = request.spec
    p = request.children
    conv = torch.cat([request.weights[f"conv_{role}"].tensor() for role in "qkv"])
    decay, dt = (request.weights[role].tensor() for role in ("decay", "dt_bias"))
    rate = -decay.exp() if spec.decay_log else decay

    def one(mixed: torch.Tensor, g: torch.Tensor, beta: torch.Tensor, state: torch.Tensor) -> Any:
        q, k, v = mixed.view(len(mixed), 3, spec.heads, spec.head_dim).unbind(1)
        return channel_rule(l2_normalised(q) * spec.head_dim**-0.5, l2_normalised(k), v, g, beta, state)

    def run(x: torch.Tensor, step: StepBatch) -> torch.Tensor:
        n = p["norm"](x) if spec.norm else x
        qkv, beta = torch.cat([p[role](n) for role in "qkv"], -1), p["b"](n).sigmoid()
        f = (p["f_b"](p["f_a"](n)) + dt).view(len(n), spec.heads, spec.head_dim)
        g = channel_decay(f, rate, spec.lower_bound)
        before, states = p["state"].read(step)
        out, ends, after = [], [], []
        for i in range(step.sequences):
            at = slice(step.q_start[i], step.q_start[i + 1])
            mixed, end = causal_conv(qkv[at], before[i], conv)
            y, state = one(mixed, g[at], beta[at], states[i])
            out.append(y)
            ends.append(end)
            after.append(state)
        p["state"].write(step, torch.stack(ends), torch.stack(after))
        y = p["out_norm"](torch.cat(out)).flatten(1) * p["g_b"](p["g_a"](n)).sigmoid()
        return x + p["o"](y) if spec.residual else p["o"](y)

    return run
