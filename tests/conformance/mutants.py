"""Backends that are wrong in one way each, and the case that must notice."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from ktcore.backend import LoadRequest
from ktcore.backend.host import HostRuntime
from ktcore.backend.reference import reference_implementations
from ktcore.conformance import Expectations, Precision
from ktcore.ops import (
    AttentionSpec,
    ExpertsSpec,
    KVCacheSpec,
    LinearSpec,
    MLASpec,
    MLPSpec,
    MoESpec,
    RMSNormSpec,
    RopeSpec,
    RouterSpec,
    SamplingSpec,
    Spec,
    StepBatch,
)
from ktcore.ops.kv_cache import attend
from ktcore.ops.moe import route
from ktcore.weights import dequantize

from . import plain
from .plain import Cache, weight
from .runtimes import CLEAN, EarlyCallback, LeakyPinned, NoWait, QuickSynchronize, SharedPinned

Maker = Callable[[LoadRequest], Any]


@dataclass(frozen=True)
class Mutant:
    """A broken backend. `case` must fail on it and pass on the right one."""

    name: str
    case: str
    makers: Mapping[type[Spec], Maker] = field(default_factory=dict)
    runtime: type[HostRuntime] = plain.PlainRuntime
    right_runtime: type[HostRuntime] = plain.PlainRuntime
    precision: Precision = field(default_factory=Precision)


def with_spec(make: Maker, **changes: Any) -> Maker:
    """As if the spec had other values."""
    return lambda request: make(dataclasses.replace(request, spec=dataclasses.replace(request.spec, **changes)))


def linear_with(change: Callable[[LoadRequest], torch.Tensor]) -> Maker:
    """A projection with another weight than the stored one."""

    def make(request: LoadRequest) -> Any:
        w = change(request)
        return lambda x: torch.nn.functional.linear(x, w)

    return make


def neighbours_scale(request: LoadRequest) -> torch.Tensor:
    w = request.weights["weight"]
    raw = w.raw().reshape(w.shape[0], -1, 18).copy()
    raw[:, :, :2] = np.roll(raw[:, :, :2], 1, axis=1)
    return dequantize(w.format, raw.reshape(-1), w.shape)


def transposed_scales(request: LoadRequest) -> torch.Tensor:
    w = request.weights["weight"]
    raw = w.raw().reshape(w.shape[0], -1, 34).copy()
    scales = raw[:, :, :2].copy().view(np.float16)[..., 0]
    raw[:, :, :2] = scales.T.reshape(scales.shape).copy()[..., None].view(np.uint8)
    return dequantize(w.format, raw.reshape(-1), w.shape)


def other_fp8(request: LoadRequest) -> torch.Tensor:
    w = request.weights["weight"]
    return dequantize("F8_E4M3FNUZ", w.raw().reshape(-1), w.shape).nan_to_num(0.0)


def bfloat16_linear(request: LoadRequest) -> Any:
    w = weight(request, "weight").bfloat16()
    return lambda x: torch.nn.functional.linear(x.bfloat16(), w).float()


def any_width(request: LoadRequest) -> Any:
    run, outside = plain.linear(request), request.weights["weight"].shape[0]

    def swallowing(x: torch.Tensor) -> Any:
        try:
            return run(x)
        except RuntimeError:
            return torch.zeros(x.shape[0], outside)

    return swallowing


def any_order(request: LoadRequest) -> Any:
    w = weight(request, "weight")

    def run(x: torch.Tensor) -> torch.Tensor:
        order = torch.randperm(x.shape[1])
        return x[:, order] @ w[:, order].T

    return run


def keeps_everything(request: LoadRequest) -> Any:
    run, kept = plain.linear(request), []

    def leaking(x: torch.Tensor) -> Any:
        kept.append(torch.ones(1 << 18))
        return run(x)

    return leaking


def one_buffer(request: LoadRequest) -> Any:
    run, buffers = plain.linear(request), {}

    def reusing(x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = buffers.setdefault(x.shape[0], torch.empty(x.shape[0], request.weights["weight"].shape[0]))
        return out.copy_(run(x))

    return reusing


def last_loaded() -> Maker:
    """All modules use the weight that was loaded last, as a class attribute would."""
    shared: dict[str, torch.Tensor] = {}

    def make(request: LoadRequest) -> Any:
        shared["w"] = weight(request, "weight")
        return lambda x: torch.nn.functional.linear(x, shared["w"])

    return make


def batch_dependent(request: LoadRequest) -> Any:
    w = weight(request, "weight")
    return lambda x: x @ w.T if x.shape[0] > 1 else (x.double() @ w.T.double()).float()


def mixing_rows(request: LoadRequest) -> Any:
    run = plain.linear(request)
    return lambda x: run(x - x.mean(0, keepdim=True)) + run(x.mean(0, keepdim=True)) * (1 + 0.02 * (x.shape[0] > 1))


def without_nan(request: LoadRequest) -> Any:
    run = plain.linear(request)
    return lambda x: run(x.nan_to_num(0.0))


def experts_without_nan(request: LoadRequest) -> Any:
    run = plain.MAKERS[ExpertsSpec](request)
    return lambda x, ids, weights: run(x.nan_to_num(0.0), ids, weights)


def router_without_nan(request: LoadRequest) -> Any:
    run = plain.router(request)

    def weights_are_numbers(x: torch.Tensor) -> Any:
        ids, weights = run(x)
        return ids, weights.nan_to_num(0.0)

    return weights_are_numbers


class NumbersOnly(Cache):
    """As a softmax whose maximum passes over what is no number."""

    def attend(self, step: StepBatch, q: torch.Tensor, scale: float) -> torch.Tensor:
        return super().attend(step, q.nan_to_num(0.0), scale)


def in_place_norm(request: LoadRequest) -> Any:
    run = plain.norm(request)
    return lambda x: x.copy_(run(x))


def swapped_pairing(request: LoadRequest) -> Any:
    spec: Any = request.spec
    return with_spec(plain.turn, pairing="half" if spec.pairing == "interleaved" else "interleaved")(request)


def short_positions(request: LoadRequest) -> Any:
    run = plain.turn(request)
    return lambda x, positions: run(x, positions.to(torch.int16).to(torch.int64))


def yarn_lost(request: LoadRequest) -> Any:
    spec: Any = request.spec
    return with_spec(plain.mla, scale=(spec.nope_dim + spec.rope_dim) ** -0.5)(request)


def absorbed_width(request: LoadRequest) -> Any:
    spec: Any = request.spec
    ratio = ((spec.nope_dim + spec.rope_dim) / (spec.latent + spec.rope_dim)) ** 0.5
    return with_spec(plain.mla, scale=spec.scale * ratio)(request)


class NextPage(Cache):
    """Takes the page one token too early."""

    def read(self, step: StepBatch, i: int) -> torch.Tensor:
        position = torch.arange(step.context_lens[i])
        block = ((position + 1) // step.page_size).clamp(max=(step.context_lens[i] - 1) // step.page_size)
        return step.block_table[i].long()[block] * step.page_size + position % step.page_size


class StalePages(Cache):
    """Never overwrites what is there."""

    def append(self, step: StepBatch, first: torch.Tensor, second: torch.Tensor) -> None:
        free = self.k[step.slots()].flatten(1).abs().sum(1) == 0
        old_k, old_v = self.k[step.slots()], self.v[step.slots()]
        super().append(step, first, second)
        kept = step.slots()[~free]
        self.k[kept], self.v[kept] = old_k[~free], old_v[~free]


class ForgetsLast(Cache):
    """Writes the step's last key after the attention has read it."""

    def append(self, step: StepBatch, first: torch.Tensor, second: torch.Tensor) -> None:
        last = step.slots()[-1]
        before = self.k[last].clone()
        super().append(step, first, second)
        self.k[last] = before


class FirstTable(Cache):
    """Reads every sequence through the first one's block table."""

    def read(self, step: StepBatch, i: int) -> torch.Tensor:
        longest = int((step.block_table[0] >= 0).sum()) * step.page_size
        position = torch.arange(step.context_lens[i]) % longest
        return step.block_table[0].long()[position // step.page_size] * step.page_size + position % step.page_size


class SeesAhead(Cache):
    """No causal mask within the step."""

    def attend(self, step: StepBatch, q: torch.Tensor, scale: float, sinks: Any = None) -> torch.Tensor:
        out = []
        for i in range(step.sequences):
            rows, span = self.read(step, i), slice(step.q_start[i], step.q_start[i + 1])
            out += [attend(q[t : t + 1], self.k[rows], self.v[rows], scale) for t in range(span.start, span.stop)]
        return torch.cat(out)


def cache(kind: type[Cache]) -> dict[type[Spec], Maker]:
    return {KVCacheSpec: lambda request: kind(request.spec)}  # type: ignore[arg-type]


def experts_with(change: Callable[[torch.Tensor, torch.Tensor, int], tuple[torch.Tensor, torch.Tensor]]) -> Maker:
    """Routed experts that get other ids and weights than they were given."""

    def make(request: LoadRequest) -> Any:
        run, count = plain.experts(request), request.spec.experts  # type: ignore[attr-defined]
        return lambda x, ids, weights: run(x, *change(ids, weights, count))

    return make


def drop_last(ids: torch.Tensor, weights: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.where(ids == count - 1, -1, ids), weights


def count_first_twice(ids: torch.Tensor, weights: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    return ids, torch.where(ids == 0, 2 * weights, weights)


def count_once(ids: torch.Tensor, weights: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    seen = (ids[:, :, None] == ids[:, None, :]).tril(-1).any(-1)
    return torch.where(seen, -1, ids), weights


def wrap_negative(ids: torch.Tensor, weights: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    return ids % count, weights


def eight_bits(ids: torch.Tensor, weights: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.where(ids < 0, ids, ids % 256), weights


def one_batch_of_tokens(ids: torch.Tensor, weights: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    kept = torch.arange(ids.shape[0])[:, None] < 32
    return torch.where(kept, ids, -1), weights


def biased_weights(request: LoadRequest) -> Any:
    spec: Any = request.spec
    w, bias = weight(request, "weight"), weight(request, "bias") if spec.choice_bias else torch.zeros(spec.experts)

    def run(x: torch.Tensor) -> Any:
        ids, _ = route(x @ w.T, spec, bias)
        chosen = ((x @ w.T).sigmoid() + bias).gather(-1, ids)
        return ids, chosen / chosen.sum(-1, keepdim=True) * spec.scale

    return run


def last_of_equals(request: LoadRequest) -> Any:
    spec: Any = request.spec
    w, bias = weight(request, "weight").flip(0), weight(request, "bias").flip(0) if spec.choice_bias else None

    def run(x: torch.Tensor) -> Any:
        ids, weights = route(x @ w.T, spec, bias)
        return spec.experts - 1 - ids, weights

    return run


def no_shared(request: LoadRequest) -> Any:
    return with_spec(plain.moe, shared=None)(request)


def lower_top_p(request: LoadRequest) -> Any:
    run = plain.sampling(request)

    def cut(logits: torch.Tensor, params: Any, *rest: Any) -> Any:
        return run(logits, dataclasses.replace(params, top_p=params.top_p * 0.8), *rest)

    return cut


def ignores_penalty(request: LoadRequest) -> Any:
    run = plain.sampling(request)
    return lambda logits, params, seen, generator, prompt=0: run(logits, params, [], generator, 0)


def the_reference(spec_type: type[Spec]) -> Maker:
    """Under the backend's own id, without saying so."""
    return next(i.load for i in reference_implementations() if i.spec_type is spec_type)


def named(name: str, case: str, makers: Mapping[type[Spec], Maker], precision: Precision | None = None) -> Mutant:
    return Mutant(name, case, makers, precision=precision or Precision())


MUTANTS = [
    named("wrong group scale", "L2.linear.Q4_0.7x512x100", {LinearSpec: linear_with(neighbours_scale)}),
    named("transposed scales", "L2.linear.Q8_0.7x512x100", {LinearSpec: linear_with(transposed_scales)}),
    named("fp8 flavour mix-up", "L2.linear.F8_E4M3.7x512x100", {LinearSpec: linear_with(other_fp8)}),
    named("precision below the declared one", "L2.linear.F32.7x512x100", {LinearSpec: bfloat16_linear}),
    named("swallowed error", "L2.linear.wrong-width", {LinearSpec: any_width}),
    named("swallowed NaN", "L2.linear.not-a-number", {LinearSpec: without_nan}),
    named("NaN lost in 8-bit activations", "L2.nonfinite.linear.Q4_K", {LinearSpec: without_nan}),
    named("NaN lost in a clamp", "L2.nonfinite.experts.clamped", {ExpertsSpec: experts_without_nan}),
    named("NaN lost in a choice", "L2.nonfinite.router.sigmoid-groups", {RouterSpec: router_without_nan}),
    named("NaN lost in a softmax", "L2.nonfinite.kv_cache.gqa.query", cache(NumbersOnly)),
    named("NaN in a row spoils the batch", "L2.nonfinite.linear.F32", {LinearSpec: mixing_rows}),
    named("random order declared deterministic", "L2.linear.deterministic", {LinearSpec: any_order}),
    named("leaked buffer", "L2.linear.leak", {LinearSpec: keeps_everything}),
    named("buffer reused a step too early", "L2.linear.result-stays", {LinearSpec: one_buffer}),
    named("weights shared by all modules", "L2.linear.two-modules", {LinearSpec: last_loaded()}),
    named(
        "batch dependent, declared invariant",
        "L2.linear.company",
        {LinearSpec: batch_dependent},
        Precision(batch_invariant=True),
    ),
    named("rows mixed", "L2.linear.company", {LinearSpec: mixing_rows}),
    named("silent fallback", "L2.linear.own-code", {LinearSpec: the_reference(LinearSpec)}),
    named("silent fallback of experts", "L2.experts.own-code", {ExpertsSpec: the_reference(ExpertsSpec)}),
    named("input overwritten", "L2.rms_norm.inputs-unchanged", {RMSNormSpec: in_place_norm}),
    named("eps lost", "L2.rms_norm.small-input", {RMSNormSpec: with_spec(plain.norm, eps=0.0)}),
    named(
        "zero-centred norm read as plain", "L3.rms_norm.zero-centred", {RMSNormSpec: with_spec(plain.norm, offset=0.0)}
    ),
    named("wrong RoPE pairing", "L2.rope.interleaved.64-of-64", {RopeSpec: swapped_pairing}),
    named("positions in 16 bits", "L2.rope.half.long-context", {RopeSpec: short_positions}),
    named("frequencies not scaled", "L2.rope.half.llama3", {RopeSpec: with_spec(plain.turn, scaling=None)}),
    named("softmax scale without YaRN factor", "L2.mla.yarn-scale", {MLASpec: yarn_lost}),
    named("softmax scale of the absorbed width", "L2.mla.16-heads", {MLASpec: absorbed_width}),
    named("off-by-one page", "L2.kv_cache.gqa.page-edges", cache(NextPage)),
    named("stale KV page", "L2.kv_cache.gqa.reused-pages", cache(StalePages)),
    named("last key late", "L2.kv_cache.mla.4-heads-latent-64-32", cache(ForgetsLast)),
    named("one block table for all", "L2.attention.company", cache(FirstTable)),
    named("ignored causal mask", "L2.attention.chunks", cache(SeesAhead)),
    named("ignored window", "L3.attention.window", {KVCacheSpec: with_spec(plain.MAKERS[KVCacheSpec], window=0)}),
    named("norm of queries left out", "L2.attention.qk-norm", {AttentionSpec: with_spec(plain.attention, q_norm=None)}),
    named("dropped last expert", "L2.experts.last-only", {ExpertsSpec: experts_with(drop_last)}),
    named("double-counted expert", "L2.experts.first-only", {ExpertsSpec: experts_with(count_first_twice)}),
    named("repeated expert counted once", "L2.experts.repeated", {ExpertsSpec: experts_with(count_once)}),
    named("ignored mask of experts", "L2.experts.masked", {ExpertsSpec: experts_with(wrap_negative)}),
    named("expert ids in 8 bits", "L2.experts.384-experts", {ExpertsSpec: experts_with(eight_bits)}),
    named("tokens beyond a tile lost", "L2.experts.skewed", {ExpertsSpec: experts_with(one_batch_of_tokens)}),
    named("bias in the weights", "L2.router.bias-chooses-only", {RouterSpec: biased_weights}),
    named("groups ignored", "L2.router.sigmoid-groups-256", {RouterSpec: with_spec(plain.router, groups=1)}),
    named("not renormalised", "L2.router.softmax-128", {RouterSpec: with_spec(plain.router, renormalise=False)}),
    named("the last of equal experts", "L2.router.ties", {RouterSpec: last_of_equals}),
    named("shared expert left out", "L2.moe.F32.branch", {MoESpec: no_shared}),
    named("wrong activation", "L3.mlp.gelu_tanh", {MLPSpec: with_spec(plain.mlp, activation="silu")}),
    named("top-p too low", "L2.sampling.top-p", {SamplingSpec: lower_top_p}),
    named("repetition penalty ignored", "L2.sampling.greedy-penalty", {SamplingSpec: ignores_penalty}),
    Mutant("leaked pinned buffer", "L1.memory.pinned-leak", runtime=LeakyPinned),
    Mutant("one pinned buffer for all", "L1.copy.pinned-buffers-are-apart", runtime=SharedPinned),
    Mutant("missing stream wait", "L1.stream.wait-event", runtime=NoWait, right_runtime=CLEAN),
    Mutant(
        "synchronise that does not wait", "L1.stream.synchronize-stream", runtime=QuickSynchronize, right_runtime=CLEAN
    ),
    Mutant("callback too early", "L1.launch.callback.sees-earlier-work", runtime=EarlyCallback, right_runtime=CLEAN),
]


def expectations(mutant: Mutant) -> Expectations:
    """What the mutant declares."""
    return Expectations(precision={"*": mutant.precision})
