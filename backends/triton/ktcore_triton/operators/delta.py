"""Gated delta net with its recurrent states on the device: composed of the projections that the rules chose."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch

from ktcore.backend import Capabilities, LoadRequest, Module, Supported, Unsupported
from ktcore.backend.loading import on_device
from ktcore.backend.mirror import mirrored
from ktcore.backend.runtime import DeviceRuntime
from ktcore.errors import BackendError
from ktcore.ops.batch import StepBatch
from ktcore.ops.linear_attention import GatedDeltaNetSpec, StateCacheSpec
from ktcore_triton.operators.base import FLOAT_BYTES, TritonImplementation
from ktcore_triton.tuning import Tuning

if TYPE_CHECKING:
    from ktcore_triton.delta import Runs

WIDEST_HEAD, WIDEST_CONV = 256, 17


class TritonStateCache(TritonImplementation):
    """Float32 slots; a step's slots reach kernels by a mirror, so steps can be captured."""

    spec_type = StateCacheSpec

    def load(self, request: LoadRequest) -> Module:
        """No slots yet."""
        return DeviceStates(request.name, cast(StateCacheSpec, request.spec), request.runtime)

    def state_bytes(self, spec: StateCacheSpec) -> int:
        """Float32."""
        return FLOAT_BYTES * spec.values


class DeviceStates:
    """One layer's states.

    Attributes:
        tensors: float32 [slots, *shape] of each shape; kernels write into them.
    """

    def __init__(self, name: str, spec: StateCacheSpec, runtime: DeviceRuntime) -> None:
        self._name = name
        self._spec = spec
        self._runtime = runtime
        self._slots = 0
        self.tensors: tuple[torch.Tensor, ...] = ()

    def allocate_states(self, slots: int) -> None:
        """Make room for `slots` sequences; earlier content is gone."""
        self.tensors = ()  # given back before the new ones are taken
        self.tensors = tuple(torch.zeros(slots, *shape, device=self._runtime.device) for shape in self._spec.shapes)
        self._slots = slots

    def state_tensors(self) -> tuple[torch.Tensor, ...]:
        """The states [slots, …] of each shape."""
        return self.tensors

    def copy_states(self, source: Sequence[int], target: Sequence[int]) -> None:
        """Copy slots `source` to slots `target`, pair by pair."""
        for a, b in zip(source, target, strict=True):
            for state in self.tensors:
                state[b].copy_(state[a])

    def places(self, step: StepBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """Slots int64 [n] and starts int32 [n] on the device: 1 where a sequence begins with the step.

        Raises:
            BackendError: the step's slots are not those of its sequences.
        """
        if len(step.state_slots) != step.sequences:
            raise BackendError(f"{self._name}: {step.sequences} sequences have {len(step.state_slots)} state slots")
        bad = [slot for slot in step.state_slots if not 0 <= slot < self._slots]
        if bad:
            raise BackendError(f"{self._name}: the step uses state slot {bad[0]}, {self._slots} were allocated")
        return (
            mirrored(self._runtime, step, "state_slots", lambda s: torch.tensor(s.state_slots, dtype=torch.int64)),
            mirrored(self._runtime, step, "state_starts", _starts),
        )

    def read(self, step: StepBatch) -> tuple[torch.Tensor, ...]:
        """As `StateCacheSpec` says."""
        slots, starts = self.places(step)
        return tuple(
            torch.where(starts.view(-1, *[1] * (state.dim() - 1)) != 0, 0.0, state.index_select(0, slots))
            for state in self.tensors
        )

    def write(self, step: StepBatch, *states: torch.Tensor) -> None:
        """As `StateCacheSpec` says."""
        slots, _ = self.places(step)
        for held, state in zip(self.tensors, states, strict=True):
            held.index_copy_(0, slots, state)


class TritonGatedDeltaNet(TritonImplementation):
    """Convolution and delta rule in float32, on states in place: up to 4 new tokens of a sequence by the recurrence,
    more in chunks; the two round differently."""

    spec_type = GatedDeltaNetSpec
    handles = frozenset({"decay_log", "tiled", "norm", "residual"})

    def supports(self, spec: GatedDeltaNetSpec, device: Capabilities) -> Supported | Unsupported:
        """As the kernels take them."""
        if max(spec.key_dim, spec.value_dim) > WIDEST_HEAD:
            return Unsupported(f"heads wider than {WIDEST_HEAD}")
        if not 2 <= spec.conv_width <= WIDEST_CONV:
            return Unsupported(f"a convolution that is not 2 to {WIDEST_CONV} tokens wide")
        return super().supports(spec, device)

    def load(self, request: LoadRequest) -> Module:
        """Bring the convolution and the rates to the device; the parts hold the other weights."""
        return _GatedDeltaNet(request, self.tuning(request.device))

    def packed_bytes(self, spec: GatedDeltaNetSpec, stored_bytes: int) -> int:
        """Float32 of the convolution and of two numbers a head."""
        return FLOAT_BYTES * (spec.qkv.out_features * spec.conv_width + 2 * spec.value_heads)


class _GatedDeltaNet:
    def __init__(self, request: LoadRequest, tuning: Tuning) -> None:
        self._spec = cast(GatedDeltaNetSpec, request.spec)
        self._parts = request.children
        self._runtime = request.runtime
        self._tuning = tuning
        self._conv = on_device(request, "conv").t().contiguous()
        decay = on_device(request, "decay")
        self._decay = -decay.exp() if self._spec.decay_log else decay
        self._dt_bias = on_device(request, "dt_bias")

    def __call__(self, x: torch.Tensor, step: StepBatch) -> Any:
        from ktcore_triton.rows import swiglu

        spec, parts = self._spec, self._parts
        n = parts["norm"](x) if spec.norm else x
        out = self._attend(step, parts["qkv"](n), parts["a"](n), parts["b"](n))
        normed = parts["out_norm"](out).reshape(x.shape[0], -1)
        y = parts["o"](swiglu(parts["z"](n).contiguous(), normed))
        return x + y if spec.residual else y

    def _attend(self, step: StepBatch, mixed: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Of the projections' rows, before the convolution -> [T, value_heads, value_dim]."""
        from ktcore_triton.delta import convolution, delta_rule

        holder = self._parts["state"]
        own = isinstance(holder, DeviceStates)
        conv, state = holder.tensors if own else (t.contiguous() for t in holder.read(step))
        runs = self._runs(step, holder if own else None)
        mixed = convolution(mixed.contiguous(), self._conv, conv, runs)
        tiles = self._tuning.delta(runs.most, self._spec.value_dim)
        out = delta_rule(
            mixed, a.contiguous(), b.contiguous(), self._decay, self._dt_bias, state, runs, self._spec.key_heads,
            tiled=self._spec.tiled, tiles=tiles,
        )  # fmt: skip
        if not own:
            holder.write(step, conv, state)
        return out

    def _runs(self, step: StepBatch, holder: DeviceStates | None) -> Runs:
        from ktcore_triton.delta import Runs

        lengths = [b - a for a, b in zip(step.q_start, step.q_start[1:], strict=False)]
        if holder is not None:
            slots, starts = holder.places(step)
        else:  # states that were read: row by row, and zero where they begin
            slots = torch.arange(step.sequences, device=self._runtime.device)
            starts = torch.zeros(step.sequences, dtype=torch.int32, device=self._runtime.device)
        q_start = mirrored(self._runtime, step, "q_start", lambda s: torch.tensor(s.q_start, dtype=torch.int32))
        return Runs(q_start, slots, starts, min(lengths, default=0), max(lengths, default=0))


def _starts(step: StepBatch) -> torch.Tensor:
    return torch.tensor([step.starts(i) for i in range(step.sequences)], dtype=torch.int32)
