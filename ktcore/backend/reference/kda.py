"""Reference of Kimi delta attention; its states lie in the slots of the gated delta net."""

from __future__ import annotations

from typing import Any, cast

import torch

from ktcore.backend.implementation import LoadRequest, Module
from ktcore.backend.reference.base import FLOAT_BYTES, ReferenceImplementation, loaded
from ktcore.ops.batch import StepBatch
from ktcore.ops.kda import KimiDeltaSpec, channel_decay, channel_rule, channel_rule_chunked, output_gate
from ktcore.ops.linear_attention import causal_conv, l2_normalised


class ReferenceKimiDelta(ReferenceImplementation):
    """Composed of its projections; single tokens go through the recurrence, longer runs through the chunked form.

    Option `chunked` (default true): false takes the recurrence always.
    """

    id = "reference.kimi_delta_attention"
    spec_type = KimiDeltaSpec
    handles = frozenset({"decay_log", "lower_bound", "norm", "residual"})
    options = frozenset({"chunked"})

    def load(self, request: LoadRequest) -> Module:
        return _KimiDelta(request)

    def packed_bytes(self, spec: KimiDeltaSpec, stored_bytes: int) -> int:
        channels = spec.heads * spec.head_dim
        return FLOAT_BYTES * (3 * channels * spec.conv_width + channels + spec.heads)


class _KimiDelta:
    def __init__(self, request: LoadRequest) -> None:
        self.spec = spec = cast(KimiDeltaSpec, request.spec)
        self.parts = request.children
        self.chunked = bool(request.options.get("chunked", True))
        self.conv = torch.cat([loaded(request, f"conv_{role}") for role in "qkv"])
        decay = loaded(request, "decay")
        self.decay = -decay.exp() if spec.decay_log else decay
        self.dt_bias = loaded(request, "dt_bias")

    def __call__(self, x: torch.Tensor, step: StepBatch) -> Any:
        spec, parts = self.spec, self.parts
        n = parts["norm"](x) if spec.norm else x
        mixed = torch.cat([parts[role](n) for role in "qkv"], -1)
        beta = parts["b"](n).sigmoid()
        f = (parts["f_b"](parts["f_a"](n)) + self.dt_bias).view(-1, spec.heads, spec.head_dim)
        g = channel_decay(f, self.decay, spec.lower_bound)
        convs, states = parts["state"].read(step)
        out, new_convs, new_states = [], [], []
        for i in range(step.sequences):
            span = slice(step.q_start[i], step.q_start[i + 1])
            mine, conv = causal_conv(mixed[span], convs[i], self.conv)
            y, state = self._sequence(mine, g[span], beta[span], states[i])
            out.append(y)
            new_convs.append(conv)
            new_states.append(state)
        parts["state"].write(step, torch.stack(new_convs), torch.stack(new_states))
        gate = output_gate(parts["g_b"](parts["g_a"](n)))
        y = parts["o"](parts["out_norm"](torch.cat(out)).flatten(1) * gate)
        return x + y if spec.residual else y

    def _sequence(
        self, mixed: torch.Tensor, g: torch.Tensor, beta: torch.Tensor, state: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        q, k, v = mixed.view(len(mixed), 3, self.spec.heads, self.spec.head_dim).unbind(1)
        rule = channel_rule_chunked if self.chunked and len(mixed) > 1 else channel_rule
        return rule(l2_normalised(q) * self.spec.head_dim**-0.5, l2_normalised(k), v, g, beta, state)
