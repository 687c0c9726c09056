"""References of the gated delta net and of the slots that hold its states."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch

from ktcore.backend.capabilities import Capabilities
from ktcore.backend.implementation import LoadRequest, Module, Support, Supported
from ktcore.backend.reference.base import FLOAT_BYTES, ReferenceImplementation, loaded
from ktcore.errors import BackendError
from ktcore.ops.batch import StepBatch
from ktcore.ops.linear_attention import (
    GatedDeltaNetSpec,
    StateCacheSpec,
    causal_conv,
    delta_rule,
    delta_rule_chunked,
    for_value_heads,
    l2_normalised,
)


class ReferenceStateCache(ReferenceImplementation):
    """Float32 slots that remember how many tokens they hold, so that a wrong slot is an error."""

    id = "reference.state_cache"
    spec_type = StateCacheSpec

    def supports(self, spec: StateCacheSpec, device: Capabilities) -> Support:
        return Supported()

    def load(self, request: LoadRequest) -> Module:
        return StateSlots(request.name, cast(StateCacheSpec, request.spec), request.runtime.device)

    def state_bytes(self, spec: StateCacheSpec) -> int:
        return FLOAT_BYTES * spec.values


class StateSlots:
    """One layer's states; reading those of a sequence that has other tokens behind it raises `BackendError`."""

    def __init__(self, name: str, spec: StateCacheSpec, device: torch.device) -> None:
        self._name = name
        self._spec = spec
        self._device = device
        self._states: tuple[torch.Tensor, ...] = ()
        self._held = torch.empty(0, dtype=torch.int64)

    def allocate_states(self, slots: int) -> None:
        """Make room for `slots` sequences; earlier content is gone."""
        self._states = tuple(torch.zeros(slots, *shape, device=self._device) for shape in self._spec.shapes)
        self._held = torch.full((slots,), -1)

    def state_tensors(self) -> tuple[torch.Tensor, ...]:
        """How many tokens slots hold [slots], and the states."""
        return self._held, *self._states

    def copy_states(self, source: Sequence[int], target: Sequence[int]) -> None:
        """Copy slots `source` to slots `target`, pair by pair."""
        for a, b in zip(source, target, strict=True):
            for state in self._states:
                state[b] = state[a]
            self._held[b] = self._held[a]

    def read(self, step: StepBatch) -> tuple[torch.Tensor, ...]:
        """As `StateCacheSpec` says."""
        slots = self._slots(step)
        for i, slot in enumerate(slots):
            before = step.context_lens[i] - (step.q_start[i + 1] - step.q_start[i])
            if before and int(self._held[slot]) != before:
                held = int(self._held[slot])
                raise BackendError(
                    f"{self._name}: slot {slot} holds the state after {held} tokens, {before} are needed"
                )
        found = tuple(state[list(slots)] for state in self._states)
        for i in range(step.sequences):
            if step.starts(i):
                for state in found:
                    state[i] = 0
        return found

    def write(self, step: StepBatch, *states: torch.Tensor) -> None:
        """As `StateCacheSpec` says."""
        slots = self._slots(step)
        for held, state in zip(self._states, states, strict=True):
            held[list(slots)] = state
        for slot, tokens in zip(slots, step.context_lens, strict=True):
            self._held[slot] = tokens

    def _slots(self, step: StepBatch) -> tuple[int, ...]:
        if len(step.state_slots) != step.sequences:
            raise BackendError(f"{self._name}: {step.sequences} sequences have {len(step.state_slots)} state slots")
        bad = [slot for slot in step.state_slots if not 0 <= slot < len(self._held)]
        if bad:
            raise BackendError(f"{self._name}: the step uses state slot {bad[0]}, {len(self._held)} were allocated")
        return step.state_slots


class ReferenceGatedDeltaNet(ReferenceImplementation):
    """Composed of its projections; single tokens go through the recurrence, longer runs through the chunked form.

    Option `chunked` (default true): false takes the recurrence always.
    """

    id = "reference.gated_delta_net"
    spec_type = GatedDeltaNetSpec
    handles = frozenset({"decay_log", "tiled", "norm", "residual", "sigmoid_gate"})
    options = frozenset({"chunked"})

    def load(self, request: LoadRequest) -> Module:
        return _GatedDeltaNet(request)

    def packed_bytes(self, spec: GatedDeltaNetSpec, stored_bytes: int) -> int:
        return FLOAT_BYTES * (spec.qkv.out_features * spec.conv_width + 2 * spec.value_heads)


class _GatedDeltaNet:
    def __init__(self, request: LoadRequest) -> None:
        self.spec = spec = cast(GatedDeltaNetSpec, request.spec)
        self.parts = request.children
        self.chunked = bool(request.options.get("chunked", True))
        self.conv = loaded(request, "conv")
        decay = loaded(request, "decay")
        self.decay = -decay.exp() if spec.decay_log else decay
        self.dt_bias = loaded(request, "dt_bias")

    def __call__(self, x: torch.Tensor, step: StepBatch) -> Any:
        spec, parts = self.spec, self.parts
        n = parts["norm"](x) if spec.norm else x
        mixed = parts["qkv"](n)
        beta = parts["b"](n).sigmoid()
        g = self.decay * torch.nn.functional.softplus(parts["a"](n) + self.dt_bias)
        convs, states = parts["state"].read(step)
        out, new_convs, new_states = [], [], []
        for i in range(step.sequences):
            span = slice(step.q_start[i], step.q_start[i + 1])
            y, conv, state = self._sequence(mixed[span], g[span], beta[span], convs[i], states[i])
            out.append(y)
            new_convs.append(conv)
            new_states.append(state)
        parts["state"].write(step, torch.stack(new_convs), torch.stack(new_states))
        z = parts["z"](n)
        z = torch.sigmoid(z) if spec.sigmoid_gate else torch.nn.functional.silu(z)
        y = parts["o"](parts["out_norm"](torch.cat(out)).flatten(1) * z)
        return x + y if spec.residual else y

    def _sequence(
        self, mixed: torch.Tensor, g: torch.Tensor, beta: torch.Tensor, conv: torch.Tensor, state: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        s = self.spec
        mixed, conv = causal_conv(mixed, conv, self.conv)
        keys = s.key_heads * s.key_dim
        q, k, v = torch.split(mixed, [keys, keys, s.value_heads * s.value_dim], -1)
        q, k = (
            for_value_heads(l2_normalised(t.view(-1, s.key_heads, s.key_dim)), s.value_heads, s.tiled) for t in (q, k)
        )
        rule = delta_rule_chunked if self.chunked and len(mixed) > 1 else delta_rule
        out, state = rule(q * s.key_dim**-0.5, k, v.view(-1, s.value_heads, s.value_dim), g, beta, state)
        return out, conv, state
