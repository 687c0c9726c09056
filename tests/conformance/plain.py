"""A host backend written for these tests: every operator in a few lines of torch, right, and easy to break."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch

from ktcore.backend import (
    API_VERSION,
    Backend,
    BackendSpec,
    Capabilities,
    Implementation,
    LoadRequest,
    Probe,
    Registry,
    Supported,
    Unsupported,
)
from ktcore.backend.discovery import Found
from ktcore.backend.handles import known_names
from ktcore.backend.host import HostRuntime
from ktcore.backend.record import BackendRecord
from ktcore.conformance import Expectations, Precision
from ktcore.conformance.target import Target
from ktcore.ops import (
    AttentionSpec,
    BlockIndexCacheSpec,
    BlockIndexerSpec,
    CompressedAttentionSpec,
    EmbeddingSpec,
    EntryCacheSpec,
    EntryIndexerSpec,
    ExpertsSpec,
    GatedDeltaNetSpec,
    GatedStreamsSpec,
    HyperConnectionSpec,
    IndexCacheSpec,
    KimiDeltaSpec,
    KVCacheSpec,
    LinearSpec,
    MLASpec,
    MLPSpec,
    MoESpec,
    NGramSpec,
    NGramTableSpec,
    PrecededSpec,
    RMSNormSpec,
    RopeSpec,
    RouterSpec,
    SamplingSpec,
    Spec,
    StateCacheSpec,
    StepBatch,
    StreamBranchSpec,
    StreamEndSpec,
    TokenIndexerSpec,
    WindowCacheSpec,
)
from ktcore.ops.attention import gate_heads, tempered
from ktcore.ops.kv_cache import attend
from ktcore.ops.linear import capped
from ktcore.ops.linear_attention import causal_conv, delta_rule, l2_normalised
from ktcore.ops.mla import absorb_query, expand_output, split_up_projection
from ktcore.ops.mlp import ACTIVATIONS, within
from ktcore.ops.moe import route, routed_experts
from ktcore.ops.norm import norm_factors, rms_norm
from ktcore.ops.rope import inverse_frequencies, rope
from ktcore.ops.sampling import sample
from ktcore.ops.streams import connection_weights, entered, left, stream_norm
from ktcore.weights import known_formats

from .plain_compressed import Compressed, Entries, Window, entry_indexer
from .plain_indexers import Blocks, Index, block_indexer, indexer
from .plain_kda import kimi
from .plain_ngram import ngram, ngram_table, preceded

NAME = "plain"
DECLARED = Capabilities(NAME, "host memory", features=frozenset({"f32"}))


class Plain(Implementation):
    """One operator; `make` gives its module."""

    def __init__(self, spec_type: type[Spec], make: Callable[[LoadRequest], Any]) -> None:
        self.id = f"{NAME}.{spec_type.op}"
        self.spec_type = spec_type
        self.handles = known_names(spec_type, False)
        self.make = make

    def supports(self, spec: Any, device: Capabilities) -> Supported | Unsupported:
        unknown = [f for f in spec.formats() if f not in known_formats()]
        return Unsupported(f"unknown format {unknown[0]}") if unknown else Supported()

    def load(self, request: LoadRequest) -> Any:
        return self.make(request)

    def page_sizes(self, spec: Any) -> tuple[int, ...]:
        return (16, 64)


def weight(request: LoadRequest, role: str) -> torch.Tensor:
    return request.weights[role].tensor()


def linear(request: LoadRequest) -> Any:
    w = weight(request, "weight")
    b = weight(request, "bias") if request.spec.bias else None  # type: ignore[attr-defined]
    return lambda x: capped(torch.nn.functional.linear(x, w, b), request.spec.softcap)  # type: ignore[attr-defined]


def embedding(request: LoadRequest) -> Any:
    w = weight(request, "weight")
    return lambda ids: w[ids] * request.spec.scale  # type: ignore[attr-defined]


def norm(request: LoadRequest) -> Any:
    spec: Any = request.spec
    w = norm_factors(spec, weight(request, "weight") if spec.weight_format else None)
    return lambda x: rms_norm(x, w, spec.eps)


def turn(request: LoadRequest) -> Any:
    spec: Any = request.spec
    freq, factor = inverse_frequencies(spec, weight(request, "freq_factors") if spec.freq_factors else None)
    return lambda x, positions: rope(x, positions, freq, factor, spec.pairing)


class Cache:
    """Pages as rows, without any check."""

    def __init__(self, spec: KVCacheSpec) -> None:
        self.spec = spec

    def allocate_pages(self, pages: int, page_size: int) -> None:
        s, self.pages = self.spec, pages
        self.k = torch.zeros(pages * page_size, s.kv_heads, s.key_dim)
        self.v = torch.zeros(pages * page_size, s.kv_heads, s.value_dim)

    def page_tensors(self) -> tuple[torch.Tensor, ...]:
        return self.k.view(self.pages, -1), self.v.view(self.pages, -1)

    def append(self, step: StepBatch, first: torch.Tensor, second: torch.Tensor) -> None:
        if self.spec.kind == "mla":
            first, second = torch.cat((first, second), -1)[:, None], first[:, None]
        self.k[self.slots(step)], self.v[self.slots(step)] = first, second

    def slots(self, step: StepBatch) -> torch.Tensor:
        return step.slots()

    def read(self, step: StepBatch, i: int) -> torch.Tensor:
        position = torch.arange(step.context_lens[i])
        return step.block_table[i].long()[position // step.page_size] * step.page_size + position % step.page_size

    def attend(
        self, step: StepBatch, q: torch.Tensor, scale: float, sinks: Any = None, chosen: Any = None
    ) -> torch.Tensor:
        out, s = [], self.spec
        for i in range(step.sequences):
            rows = self.read(step, i)
            span = slice(step.q_start[i], step.q_start[i + 1])
            extra = sinks if s.sinks else None
            seen = chosen[span] if s.chosen else None
            out.append(attend(q[span], self.k[rows], self.v[rows], scale, s.window, s.chunk, extra, seen))
        return torch.cat(out)


def attention(request: LoadRequest) -> Any:
    spec: Any = request.spec
    p = request.children
    sinks = (weight(request, "sinks"),) if spec.sinks else ()

    def normed(q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if spec.norm_whole:
            return p["q_norm"](q.flatten(1)).view(q.shape), p["k_norm"](k.flatten(1)).view(k.shape)
        return p["q_norm"](q) if spec.q_norm else q, p["k_norm"](k) if spec.k_norm else k

    def run(x: torch.Tensor, step: StepBatch) -> torch.Tensor:
        n = p["norm"](x) if spec.norm else x
        q, k = (p[r](n).view(x.shape[0], -1, spec.head_dim) for r in "qk")
        v = p["v"](n).view(x.shape[0], -1, spec.value_width)
        v = (p["v_norm"](v) if spec.v_norm else v) * spec.value_scale
        q, k = (q, k) if spec.norm_after_rope else normed(q, k)
        if spec.rope:
            q, k = p["rope"](q, step.positions), p["rope"](k, step.positions)
        q, k = normed(q, k) if spec.norm_after_rope else (q, k)
        q = tempered(q, step.positions, spec.temperature) if spec.temperature else q
        p["cache"].append(step, k, v)
        chosen = {"chosen": p["indexer"](n, step)} if spec.indexer else {}
        y = p["cache"].attend(step, q, spec.scale, *sinks, **chosen).flatten(1)
        y = p["o"](gate_heads(y, p["gate"](n), spec) if spec.gate else y)
        y = p["post_norm"](y) if spec.post_norm else y
        return x + y if spec.residual else y

    return run


def mla(request: LoadRequest) -> Any:
    spec: Any = request.spec
    p = request.children
    if spec.split_kv_b:
        up_k, up_v = weight(request, "k_b").transpose(1, 2), weight(request, "v_b")
    else:
        up_k, up_v = split_up_projection(weight(request, "kv_b"), spec.heads, spec.nope_dim, spec.value_dim)

    def run(x: torch.Tensor, step: StepBatch) -> torch.Tensor:
        n = p["norm"](x) if spec.norm else x
        low = p["q_a_norm"](p["q_a"](n)) if spec.q_a else n
        q = p["q_b"](low) if spec.q_a else p["q"](n)
        nope, turned = q.view(x.shape[0], spec.heads, -1).split((spec.nope_dim, spec.rope_dim), -1)
        latent, key = p["kv_a"](n).split((spec.latent, spec.rope_dim), -1)
        if spec.rope:
            turned = p["rope"](turned, step.positions)
            key = p["rope"](key[:, None], step.positions)[:, 0]
        if spec.temperature:
            nope, turned = (tempered(part, step.positions, spec.temperature) for part in (nope, turned))
        p["cache"].append(step, p["kv_a_norm"](latent), key)
        if spec.indexer:
            step.hand_on(p["indexer"](n, low, step))
        more = {"chosen": step.handed_on()} if spec.indexer or spec.shared_index else {}
        got = p["cache"].attend(step, torch.cat((absorb_query(nope, up_k), turned), -1), spec.scale, **more)
        y = p["o"](expand_output(got, up_v).flatten(1))
        return x + y if spec.residual else y

    return run


def mlp(request: LoadRequest) -> Any:
    spec: Any = request.spec
    p = request.children

    def run(x: torch.Tensor) -> torch.Tensor:
        n = p["norm"](x) if spec.norm else x
        y = p["down"](within(p["gate"](n), p["up"](n), spec.activation, spec.clamped))
        y = p["post_norm"](y) if spec.post_norm else y
        y = x + y if spec.residual else y
        return y * weight(request, "out_scale") if spec.out_scale else y

    return run


def router(request: LoadRequest) -> Any:
    spec: Any = request.spec
    w, bias = weight(request, "weight"), weight(request, "bias") if spec.choice_bias else None
    shift = weight(request, "logit_bias") if spec.logit_bias else 0.0
    scales = weight(request, "expert_scale") if spec.expert_scale else None
    table = weight(request, "table").long() if spec.by_token else None

    def run(x: torch.Tensor, *step: StepBatch) -> Any:
        named = table[step[0].token_ids] if table is not None else None
        return route(x @ w.T + shift, spec, bias, scales, named)

    return run


def experts(request: LoadRequest) -> Any:
    spec: Any = request.spec
    gate, up, down = (weight(request, r) for r in ("gate", "up", "down"))
    biases: Any = tuple(weight(request, f"{r}_bias") for r in ("gate", "up", "down")) if spec.bias else None
    return lambda x, ids, weights: routed_experts(x, ids, weights, gate, up, down, spec, biases)


def moe(request: LoadRequest) -> Any:
    spec: Any = request.spec
    p = request.children

    def run(x: torch.Tensor, before: Any = None) -> torch.Tensor:
        n = p["norm"](x) if spec.norm else x
        read = before if spec.early_router else p["router_norm"](x) if spec.router_norm else n
        y = p["experts"](n, *p["router"](read, *((before,) if spec.router.by_token else ())))
        y = p["routed_norm"](y) if spec.routed_norm else y
        if spec.shared:
            part = p["shared"](x if spec.shared_apart else n)
            y = y + (part * p["shared_gate"](n).sigmoid() if spec.shared_gate else part)
        y = p["post_norm"](y) if spec.post_norm else y
        y = x + y if spec.residual else y
        return y * weight(request, "out_scale") if spec.out_scale else y

    return run


class States:
    """Recurrent states by slot."""

    def __init__(self, spec: StateCacheSpec) -> None:
        self.spec = spec

    def allocate_states(self, slots: int) -> None:
        self.held = [torch.zeros(slots, *shape) for shape in self.spec.shapes]

    def state_tensors(self) -> tuple[torch.Tensor, ...]:
        return tuple(self.held)

    def copy_states(self, source: Sequence[int], target: Sequence[int]) -> None:
        for held in self.held:
            held[list(target)] = held[list(source)]

    def read(self, step: StepBatch) -> tuple[torch.Tensor, ...]:
        fresh = torch.tensor([step.starts(i) for i in range(step.sequences)])
        read = (held[list(step.state_slots)] for held in self.held)
        return tuple(torch.where(fresh.view(-1, *[1] * (r.dim() - 1)), 0.0, r) for r in read)

    def write(self, step: StepBatch, *states: torch.Tensor) -> None:
        for held, state in zip(self.held, states, strict=True):
            held[list(step.state_slots)] = state


def delta(request: LoadRequest) -> Any:
    spec: Any = request.spec
    p = request.children
    conv, decay, dt = (weight(request, r) for r in ("conv", "decay", "dt_bias"))
    rate = -decay.exp() if spec.decay_log else decay
    keys = spec.key_heads * spec.key_dim
    order = torch.arange(spec.value_heads)
    order = order % spec.key_heads if spec.tiled else order // (spec.value_heads // spec.key_heads)

    def one(mixed: torch.Tensor, g: torch.Tensor, beta: torch.Tensor, state: torch.Tensor) -> Any:
        q, k, v = mixed.split((keys, keys, spec.value_heads * spec.value_dim), -1)
        q, k = (l2_normalised(t.view(len(t), -1, spec.key_dim))[:, order] for t in (q, k))
        return delta_rule(q * spec.key_dim**-0.5, k, v.view(len(v), -1, spec.value_dim), g, beta, state)

    def run(x: torch.Tensor, step: StepBatch) -> torch.Tensor:
        n = p["norm"](x) if spec.norm else x
        qkv, beta = p["qkv"](n), p["b"](n).sigmoid()
        g = rate * torch.nn.functional.softplus(p["a"](n) + dt)
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
        z = p["z"](n)
        z = z.sigmoid() if spec.sigmoid_gate else torch.nn.functional.silu(z)
        y = p["out_norm"](torch.cat(out)).flatten(1) * z
        return x + p["o"](y) if spec.residual else p["o"](y)

    return run


class Connection:
    """Hyper-connections."""

    def __init__(self, request: LoadRequest) -> None:
        self.spec: Any = request.spec
        self.weights = [weight(request, role) for role in ("fn", "base", "scale")]

    def enter(self, x: torch.Tensor) -> Any:
        pre, *carry = connection_weights(self.spec, x, *self.weights)
        return entered(x, pre), carry

    def leave(self, x: torch.Tensor, y: torch.Tensor, carry: Any) -> torch.Tensor:
        return left(x, y, *carry)


class Gates:
    """Gated streams."""

    def __init__(self, request: LoadRequest) -> None:
        self.spec: Any = request.spec
        self.parts = request.children
        self.norm = weight(request, "norm") + self.spec.norm_offset

    def enter(self, x: torch.Tensor) -> Any:
        s, p = self.spec, self.parts
        n = stream_norm(x, self.norm, s.streams, s.eps)
        mix = p["up"](torch.nn.functional.silu(p["down"](n) / s.streams)).sigmoid()
        inject = 2 * (p["inject"](n) / s.streams).sigmoid() if s.inject else None
        return (mix * n).view(len(x), s.streams, -1).mean(1), inject

    def leave(self, x: torch.Tensor, y: torch.Tensor, carry: Any) -> torch.Tensor:
        return x + (carry[..., None] * y[:, None]).flatten(1)


def between_streams(request: LoadRequest) -> Any:
    mix, branch = request.children["mix"], request.children["branch"]

    def run(x: torch.Tensor, *more: Any) -> torch.Tensor:
        inside, carry = mix.enter(x)
        return mix.leave(x, branch(inside, *more), carry)

    return run


def end_of_streams(request: LoadRequest) -> Any:
    spec: Any = request.spec
    p = request.children

    def run(x: torch.Tensor) -> torch.Tensor:
        one = p["mix"].enter(x)[0] if spec.mix else x.view(len(x), spec.streams, -1).mean(1)
        return p["norm"](one) if spec.norm else one

    return run


def sampling(request: LoadRequest) -> Any:
    return lambda logits, params, seen=(), generator=None, prompt=0: sample(logits, params, seen, generator, prompt)


MAKERS: dict[type[Spec], Callable[[LoadRequest], Any]] = {
    EmbeddingSpec: embedding,
    LinearSpec: linear,
    RMSNormSpec: norm,
    RopeSpec: turn,
    KVCacheSpec: lambda request: Cache(request.spec),  # type: ignore[arg-type]
    AttentionSpec: attention,
    MLASpec: mla,
    IndexCacheSpec: lambda request: Index(request.spec),  # type: ignore[arg-type]
    TokenIndexerSpec: indexer,
    BlockIndexCacheSpec: lambda request: Blocks(request.spec),  # type: ignore[arg-type]
    BlockIndexerSpec: block_indexer,
    MLPSpec: mlp,
    RouterSpec: router,
    ExpertsSpec: experts,
    MoESpec: moe,
    StateCacheSpec: lambda request: States(request.spec),  # type: ignore[arg-type]
    GatedDeltaNetSpec: delta,
    HyperConnectionSpec: Connection,
    GatedStreamsSpec: Gates,
    StreamBranchSpec: between_streams,
    StreamEndSpec: end_of_streams,
    KimiDeltaSpec: kimi,
    WindowCacheSpec: lambda request: Window(request.spec),  # type: ignore[arg-type]
    EntryCacheSpec: lambda request: Entries(request.spec),  # type: ignore[arg-type]
    EntryIndexerSpec: entry_indexer,
    CompressedAttentionSpec: Compressed,
    NGramTableSpec: ngram_table,
    NGramSpec: ngram,
    PrecededSpec: preceded,
    SamplingSpec: sampling,
}
assert len(ACTIVATIONS) == 3, "the operators' activations changed: so must this backend"


class PlainRuntime(HostRuntime):
    """The host, under this backend's name."""

    def __init__(self) -> None:
        super().__init__(Capabilities(NAME, "host memory", features=DECLARED.features, live=True))


class PlainBackend(Backend):
    """With the makers and the runtime that a test gives it."""

    def __init__(self, makers: dict[type[Spec], Callable[[LoadRequest], Any]], runtime: type[HostRuntime]) -> None:
        self._makers = makers
        self._runtime = runtime

    def implementations(self) -> Sequence[Implementation]:
        return [Plain(spec_type, make) for spec_type, make in self._makers.items()]

    def runtime(self, index: int = 0, threads: int | None = None) -> HostRuntime:
        from ktcore.errors import BackendError

        if index:
            raise BackendError("there is one device")
        return self._runtime()


def plain_target(
    makers: dict[type[Spec], Callable[[LoadRequest], Any]] | None = None,
    runtime: type[HostRuntime] = PlainRuntime,
    expectations: Expectations | None = None,
) -> Target:
    """The backend as a target, with some operators exchanged."""
    home = ModuleType("ktcore_plain_backend")
    home.make = lambda: PlainBackend({**MAKERS, **(makers or {})}, runtime)  # type: ignore[attr-defined]
    sys.modules[home.__name__] = home
    spec = BackendSpec(
        NAME, API_VERSION, "nothing", f"{home.__name__}:make", lambda: Probe(True, "always", 1), (DECLARED,), False
    )
    registry = Registry([Found((BackendRecord(NAME, "plain 0", spec),))])
    return Target(registry, NAME, expectations or Expectations(precision={"*": Precision()}))
