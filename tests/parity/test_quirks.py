"""One quirk of a family wrong moves the logits by far more than the tolerance, so the parity tests see each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ktcore.backend.reference import cache, kda, simple
from ktcore.ops import (
    AttentionSpec,
    ClampedGLU,
    CompressedAttentionSpec,
    EmbeddingSpec,
    EntryCacheSpec,
    ExpertsSpec,
    GatedDeltaNetSpec,
    HyperConnectionSpec,
    IndexCacheSpec,
    KimiDeltaSpec,
    KVCacheSpec,
    LinearSpec,
    MLASpec,
    MLPSpec,
    MoESpec,
    RMSNormSpec,
    RopeSpec,
    RouterSpec,
    Spec,
    Temperature,
    TokenIndexerSpec,
    WindowCacheSpec,
)
from ktcore.ops.kda import channel_decay, channel_rule
from ktcore.ops.norm import rms_norm
from ktcore.ops.pooled_index import choose_pools, pooled_keys
from ktcore.weights import open_checkpoint

from .conftest import Tiny
from .driver import Runner
from .gguf_writer import write_gguf

pytestmark = pytest.mark.usefixtures("one_thread")
TOLERANCE = 1e-4
Mutation = tuple[type[Spec], Callable[[Any], Spec]]


def _set(kind: type[Spec], **fields: Any) -> Mutation:
    return kind, lambda spec: replace(spec, **fields)


def _scaling(**fields: Any) -> Mutation:
    return RopeSpec, lambda spec: replace(spec, scaling=replace(spec.scaling, **fields))


def _dense(spec: MLASpec) -> MLASpec:
    return replace(spec, indexer=None, shared_index=False)


def _limited_after(spec: ExpertsSpec) -> ExpertsSpec:
    assert spec.clamped is not None
    return replace(spec, clamped=replace(spec.clamped, after=True))


def _small_inside(spec: RMSNormSpec) -> RMSNormSpec:
    return replace(spec, eps=1e-6) if spec.dim in (32, 48) else spec  # of the latent and the low-rank query


def _scaled(spec: RopeSpec, **fields: Any) -> RopeSpec:
    return replace(spec, scaling=spec.scaling and replace(spec.scaling, **fields))


def _earlier(spec: ExpertsSpec) -> ExpertsSpec:
    return spec if spec.clamped is None else replace(spec, clamped=replace(spec.clamped, after=False))


NO_SCALING = _set(RopeSpec, scaling=None)
MODEL_EPS_INSIDE = (RMSNormSpec, lambda spec: replace(spec, eps=1e-3))
ONE_EXPERT_LESS = (RouterSpec, lambda spec: replace(spec, top_k=spec.top_k - 1))

QUIRKS: dict[str, tuple[str, Mutation]] = {
    "llama: llama3 scaling": ("llama", NO_SCALING),
    "llama: pairing": ("smollm2", _set(RopeSpec, pairing="interleaved")),
    "llama: biases": ("llama-bias", _set(LinearSpec, bias=False)),
    "llama: linear scaling": ("llama-linear", NO_SCALING),
    "llama: yarn": ("llama-yarn", NO_SCALING),
    "llama: yarn's factor on cos and sin": ("llama-yarn", _scaling(attention_factor=1.0)),
    "mistral: window": ("mistral-window", _set(KVCacheSpec, window=0)),
    "mistral: width of the window": ("mistral-window", _set(KVCacheSpec, window=21)),
    "qwen2: biases": ("qwen2", _set(LinearSpec, bias=False)),
    "qwen3: norms of q and k": ("qwen3", _set(AttentionSpec, q_norm=None)),
    "glm4: pairing": ("glm4", _set(RopeSpec, pairing="half")),
    "glm4: part that rotates": ("glm4", _set(RopeSpec, dim=32)),
    "glm4: norm after attention": ("glm4", _set(AttentionSpec, post_norm=None)),
    "glm4: norm after the MLP": ("glm4", _set(MLPSpec, post_norm=None)),
    "glm4-moe: part that rotates": ("glm4-moe", _set(RopeSpec, dim=32)),
    "glm4-moe: norms of q and k": ("glm4-moe", _set(AttentionSpec, q_norm=None)),
    "glm4-moe: choice bias": ("glm4-moe", _set(RouterSpec, choice_bias=False)),
    "glm4-moe: scale": ("glm4-moe", _set(RouterSpec, scale=1.0)),
    "glm4-moe: biases": ("glm4-moe", _set(LinearSpec, bias=False)),
    "mixtral: renormalisation": ("mixtral", _set(RouterSpec, renormalise=False)),
    "qwen2-moe: shared gate": ("qwen2-moe", _set(MoESpec, shared_gate=None)),
    "qwen2-moe: no renormalisation": ("qwen2-moe", _set(RouterSpec, renormalise=True)),
    "qwen2-moe: biases": ("qwen2-moe", _set(LinearSpec, bias=False)),
    "qwen2-moe: window": ("qwen2-moe-window", _set(KVCacheSpec, window=0)),
    "qwen3-moe: renormalisation": ("qwen3-moe", _set(RouterSpec, renormalise=False)),
    "qwen3-moe: no renormalisation": ("qwen3-moe-mixed", _set(RouterSpec, renormalise=True)),
    "qwen3-moe: number of experts": ("qwen3-moe", ONE_EXPERT_LESS),
    "qwen3-next: part that rotates": ("qwen3-next", _set(RopeSpec, dim=32)),
    "qwen3-next: output gate": ("qwen3-next", _set(AttentionSpec, gate=None)),
    "qwen3-next: zero-centred norms": ("qwen3-next", _set(RMSNormSpec, offset=0.0)),
    "qwen3-next: shared gate": ("qwen3-next", _set(MoESpec, shared_gate=None)),
    "qwen3-next: renormalisation": ("qwen3-next", _set(RouterSpec, renormalise=False)),
    "qwen3.5: part that rotates": ("qwen3.5", _set(RopeSpec, dim=32)),
    "qwen3.5: output gate": ("qwen3.5", _set(AttentionSpec, gate=None)),
    "qwen3.5: zero-centred norms": ("qwen3.5", _set(RMSNormSpec, offset=0.0)),
    "qwen3.5: order of value heads": ("qwen3.5", _set(GatedDeltaNetSpec, tiled=True)),
    "qwen3.5-moe: shared gate": ("qwen3.5-moe", _set(MoESpec, shared_gate=None)),
    "qwen3.5-moe: renormalisation": ("qwen3.5-moe", _set(RouterSpec, renormalise=False)),
    "llama4: chunks": ("llama4-scout", _set(KVCacheSpec, chunk=0)),
    "llama4: temperature": ("llama4-scout", _set(AttentionSpec, temperature=None)),
    "llama4: norms of q and k": ("llama4-scout", _set(AttentionSpec, q_norm=None, k_norm=None)),
    "llama4: weights on the input": ("llama4-scout", _set(ExpertsSpec, weight_on_input=False)),
    "llama4: pairing": ("llama4-scout", _set(RopeSpec, pairing="half")),
    "llama4: llama3 scaling": ("llama4-scout", NO_SCALING),
    "gpt-oss: sinks": ("gpt-oss", _set(AttentionSpec, sinks=False)),
    "gpt-oss: window": ("gpt-oss", _set(KVCacheSpec, window=0)),
    "gpt-oss: yarn's ramp": ("gpt-oss", _scaling(truncate=True)),
    "gpt-oss: router's bias": ("gpt-oss", _set(RouterSpec, logit_bias=False)),
    "gpt-oss: softmax over the chosen": ("gpt-oss", _set(RouterSpec, on_logits=False)),
    "gpt-oss: biases of experts": ("gpt-oss", _set(ExpertsSpec, bias=False)),
    "gpt-oss: activation": ("gpt-oss", _set(ExpertsSpec, clamped=None)),
    "gpt-oss: limit of the activation": ("gpt-oss", _set(ExpertsSpec, clamped=ClampedGLU(1.702, 7.0))),
    "minimax-m2: part that rotates": ("minimax-m2", _set(RopeSpec, dim=32)),
    "minimax-m2: norms of q and k": ("minimax-m2", _set(AttentionSpec, q_norm=None, k_norm=None, norm_whole=False)),
    "minimax-m2: choice bias": ("minimax-m2", _set(RouterSpec, choice_bias=False)),
    "minimax-m2: renormalisation": ("minimax-m2", _set(RouterSpec, renormalise=False)),
    "hy3: norms of q and k": ("hy3", _set(AttentionSpec, q_norm=None)),
    "hy3: choice bias": ("hy3", _set(RouterSpec, choice_bias=False)),
    "hy3: scale": ("hy3", _set(RouterSpec, scale=1.0)),
    "hy3: shared expert": ("hy3", _set(MoESpec, shared=None)),
    "olmoe: no renormalisation": ("olmoe", _set(RouterSpec, renormalise=True)),
    "ernie: pairing": ("ernie", _set(RopeSpec, pairing="half")),
    "ernie: choice bias": ("ernie", _set(RouterSpec, choice_bias=False)),
    "ernie: shared experts": ("ernie", _set(MoESpec, shared=None)),
    "ernie: renormalisation": ("ernie", _set(RouterSpec, renormalise=False)),
    "dots1: norms of q and k": ("dots1", _set(AttentionSpec, q_norm=None)),
    "dots1: choice bias": ("dots1", _set(RouterSpec, choice_bias=False)),
    "dots1: scale": ("dots1", _set(RouterSpec, scale=1.0)),
    "dots1: window": ("dots1-window", _set(KVCacheSpec, window=0)),
    "solar-open: groups": ("solar-open", _set(RouterSpec, groups=1, groups_kept=1)),
    "solar-open: choice bias": ("solar-open", _set(RouterSpec, choice_bias=False)),
    "glm4-lite: pairing": ("glm4-lite", _set(RopeSpec, pairing="half")),
    "glm4-lite: epsilon of the inner norms": ("glm4-lite", MODEL_EPS_INSIDE),
    "glm4-lite: sigmoid scores": ("glm4-lite", _set(RouterSpec, score="softmax")),
    "glm4-lite: scale": ("glm4-lite", _set(RouterSpec, scale=1.0)),
    "mistral4: temperature": ("mistral4", _set(MLASpec, temperature=None)),
    "mistral4: first position of the temperature": ("mistral4", _set(MLASpec, temperature=Temperature(0.1, 16))),
    "mistral4: softmax scores": ("mistral4", _set(RouterSpec, score="sigmoid")),
    "mistral4: renormalisation": ("mistral4", _set(RouterSpec, renormalise=False)),
    "mistral4: yarn": ("mistral4", NO_SCALING),
    "mistral4: groups": ("mistral4-groups", _set(RouterSpec, groups=1, groups_kept=1)),
    "mistral4: group score": ("mistral4-groups", _set(RouterSpec, group_score="max")),
    "v3: pairing": ("v3", _set(RopeSpec, pairing="half")),
    "v3: groups": ("v3", _set(RouterSpec, groups=1, groups_kept=1)),
    "v3: group score": ("v3", _set(RouterSpec, group_score="max")),
    "v3: renormalisation": ("v3", _set(RouterSpec, renormalise=False)),
    "v3: choice bias": ("v3", _set(RouterSpec, choice_bias=False)),
    "v3: scale": ("v3", _set(RouterSpec, scale=1.0)),
    "v3: softmax scores": ("v3", _set(RouterSpec, score="softmax")),
    "v3: yarn": ("v3", NO_SCALING),
    "v3: yarn's factor on the scores": ("v3", _set(MLASpec, scale=24**-0.5)),
    "kimi-k2: yarn": ("kimi-k2", NO_SCALING),
    "kimi-k2: step of the ramp": ("kimi-k2", _scaling(beta_fast=32.0)),
    "kimi-k2: number of experts": ("kimi-k2", ONE_EXPERT_LESS),
    "moonlight: epsilon of the inner norms": ("moonlight", MODEL_EPS_INSIDE),
    "gemma4: scores without a root": ("gemma4", (AttentionSpec, lambda s: replace(s, scale=s.head_dim**-0.5))),
    "gemma4: norm of the values": ("gemma4", _set(AttentionSpec, v_norm=None)),
    "gemma4: pairs that turn": ("gemma4", _set(RopeSpec, turning=0)),
    "gemma4: window": ("gemma4", _set(KVCacheSpec, window=0)),
    "gemma4: embeddings grow": ("gemma4", _set(EmbeddingSpec, scale=1.0)),
    "gemma4: cap of the logits": ("gemma4", _set(LinearSpec, softcap=0.0)),
    "gemma4: the router's own norm": ("gemma4", _set(MoESpec, router_norm=None)),
    "gemma4: the router's input shrinks": ("gemma4", _set(RMSNormSpec, scale=1.0)),
    "gemma4: scales of experts": ("gemma4", _set(RouterSpec, expert_scale=False)),
    "gemma4: renormalisation": ("gemma4", _set(RouterSpec, renormalise=False)),
    "gemma4: norm of the routed sum": ("gemma4", _set(MoESpec, routed_norm=None)),
    "gemma4: norm of the dense part": ("gemma4", _set(MLPSpec, post_norm=None)),
    "gemma4: dense part reads the stream": ("gemma4", _set(MoESpec, shared_apart=False)),
    "gemma4: norm behind the branch": ("gemma4", _set(MoESpec, post_norm=None)),
    "gemma4: factor of the layer": ("gemma4", _set(MoESpec, out_scale=False)),
    "gemma4-dense: factor of the layer": ("gemma4-dense", _set(MLPSpec, out_scale=False)),
    "v4: one base": ("v4", _set(RopeSpec, theta=1e4)),
    "v4: YaRN": ("v4", NO_SCALING),
    "v4: no factor on cos and sin": ("v4", (RopeSpec, lambda s: _scaled(s, attention_factor=None))),
    "v4: window": ("v4", _set(WindowCacheSpec, window=9)),
    "v4: number of entries": ("v4", (EntryCacheSpec, lambda s: replace(s, top_k=s.top_k and s.top_k - 1))),
    "v4: entries are chosen": ("v4", _set(CompressedAttentionSpec, indexer=None)),
    "v4: entries": ("v4", _set(CompressedAttentionSpec, entries=None, indexer=None)),
    "v4: epsilon of queries": ("v4", _set(CompressedAttentionSpec, q_eps=1.0)),
    "v4: choice bias": ("v4", (RouterSpec, lambda s: replace(s, choice_bias=False))),
    "v4: roots of softplus": ("v4", _set(RouterSpec, root_softplus=False)),
    "v4: weights add up": ("v4", _set(RouterSpec, renormalise=False)),
    "v4: scale": ("v4", _set(RouterSpec, scale=1.0)),
    "v4: limit of experts": ("v4", _set(ExpertsSpec, clamped=None)),
    "v4: limit of shared experts": ("v4", _set(MLPSpec, clamped=None)),
    "v4: limit before the activation": ("v4", _set(ExpertsSpec, clamped=ClampedGLU(1.0, 0.3, 0.0, after=True))),
    "v4: rounds of mixing": ("v4", (HyperConnectionSpec, lambda s: replace(s, rounds=min(1, s.rounds)))),
    "v4: epsilon of mixing": ("v4", _set(HyperConnectionSpec, eps=1e-2)),
    "mimo: values shrink": ("mimo", _set(AttentionSpec, value_scale=1.0)),
    "mimo: sinks": ("mimo", _set(AttentionSpec, sinks=False)),
    "mimo: window": ("mimo", (KVCacheSpec, lambda s: replace(s, window=s.window and s.window - 1))),
    "mimo: one base": ("mimo", _set(RopeSpec, theta=1e4)),
    "mimo: part that rotates": ("mimo", _set(RopeSpec, dim=32)),
    "mimo: choice bias": ("mimo", _set(RouterSpec, choice_bias=False)),
    "step: gates of heads": ("step", _set(AttentionSpec, gate=None)),
    "step: part that rotates": ("step", _set(RopeSpec, dim=32)),
    "step: stretch of full layers": ("step", NO_SCALING),
    "step: norms about one": ("step", _set(RMSNormSpec, offset=0.0)),
    "step: limit of experts": ("step", _set(ExpertsSpec, clamped=None)),
    "step: limit of shared experts": ("step", _set(MLPSpec, clamped=None)),
    "step: limit before the activation": ("step", (ExpertsSpec, _earlier)),
    "step: scale": ("step", _set(RouterSpec, scale=1.0)),
    "step: window": ("step", _set(KVCacheSpec, window=0)),
    "hunyuan: norms before rotation": ("hunyuan", _set(AttentionSpec, norm_after_rope=False)),
    "hunyuan: stretched base": ("hunyuan", _set(RopeSpec, theta=1e4)),
    "hunyuan: renormalisation": ("hunyuan", _set(RouterSpec, renormalise=False)),
    "afmoe: gate": ("afmoe", _set(AttentionSpec, gate=None)),
    "afmoe: window": ("afmoe", _set(KVCacheSpec, window=0)),
    "afmoe: embeddings grow": ("afmoe", _set(EmbeddingSpec, scale=1.0)),
    "afmoe: norm behind experts": ("afmoe", _set(MoESpec, post_norm=None)),
    "afmoe: norm behind attention": ("afmoe", _set(AttentionSpec, post_norm=None)),
    "afmoe: choice bias": ("afmoe", _set(RouterSpec, choice_bias=False)),
    "v32: top k": ("v32", _set(IndexCacheSpec, top_k=13)),
    "v32: pairing of the indexer": ("v32", _set(RopeSpec, pairing="interleaved")),
    "v32: sparse": ("v32", (MLASpec, _dense)),
    "v32: epsilon of the LayerNorm": ("v32", _set(TokenIndexerSpec, eps=1.0)),
    "glm-dsa: top k": ("glm-dsa", _set(IndexCacheSpec, top_k=11)),
    "glm-dsa: shared layers are sparse": ("glm-dsa-shared", (MLASpec, lambda s: s if s.indexer else _dense(s))),
    "kimi-linear: bound of the decay": ("kimi-linear", _set(KimiDeltaSpec, lower_bound=-5.0)),
    "kimi-linear: rates are logarithms": ("kimi-linear", _set(KimiDeltaSpec, decay_log=False)),
    "kimi-linear: scale of latent attention": ("kimi-linear", _set(MLASpec, scale=16**-0.5)),
    "kimi-linear: epsilon of the inner norms": ("kimi-linear-wide", MODEL_EPS_INSIDE),
    "kimi-linear: choice bias": ("kimi-linear", _set(RouterSpec, choice_bias=False)),
    "kimi-linear: renormalisation": ("kimi-linear", _set(RouterSpec, renormalise=False)),
    "kimi-linear: scale": ("kimi-linear", _set(RouterSpec, scale=1.0)),
    "kimi-linear: groups": ("kimi-linear-wide", _set(RouterSpec, groups=1, groups_kept=1)),
    "glm5-next: bound of the decay": ("glm5-next", _set(KimiDeltaSpec, lower_bound=None)),
    "glm5-next: depth of the bound": ("glm5-next", _set(KimiDeltaSpec, lower_bound=-4.0)),
    "glm5-next: limit of the experts": ("glm5-next", _set(ExpertsSpec, clamped=None)),
    "glm5-next: limit of the shared and dense": ("glm5-next", _set(MLPSpec, clamped=None)),
    "glm5-next: limit before the activation": ("glm5-next", (ExpertsSpec, _limited_after)),
    "glm5-next: sparse": ("glm5-next", (MLASpec, _dense)),
    "glm5-next: epsilon of the inner norms": ("glm5-next", (RMSNormSpec, _small_inside)),
    "glm5-next: epsilon of the LayerNorm": ("glm5-next", _set(TokenIndexerSpec, eps=1.0)),
    "glm5-next: rounds of the mixing": ("glm5-next", _set(HyperConnectionSpec, rounds=1)),
    "glm5-next: epsilon of the streams": ("glm5-next", _set(HyperConnectionSpec, rms_eps=1e-6)),
    "glm5-next: choice bias": ("glm5-next", _set(RouterSpec, choice_bias=False)),
    "glm5-next: scale": ("glm5-next", _set(RouterSpec, scale=1.0)),
    "v2-full: groups": ("v2-full", _set(RouterSpec, groups=1, groups_kept=1)),
    "v2-full: group score": ("v2-full", _set(RouterSpec, group_score="top2_sum")),
    "v2-full: scale": ("v2-full", _set(RouterSpec, scale=1.0)),
    "v2-full: yarn": ("v2-full", NO_SCALING),
    "v2-full: yarn's factor on the scores": ("v2-full", _set(MLASpec, scale=24**-0.5)),
    "v2-lite: yarn": ("v2-lite", NO_SCALING),
    "v2-lite: renormalisation": ("v2-lite", _set(RouterSpec, renormalise=True)),
}


@pytest.mark.parametrize("quirk", QUIRKS)
def test_parity_sees(quirk: str, tiny: Callable[[str], Tiny]) -> None:
    name, (kind, wrong) = QUIRKS[quirk]
    t = tiny(name)
    with open_checkpoint(t.folder) as checkpoint:
        logits = Runner(checkpoint, mutate={kind: wrong})(t.ids)
    assert (logits - t.logits).abs().max() > 10 * TOLERANCE


def test_parity_sees_norms_of_whole_rows_taken_head_by_head(
    tiny: Callable[[str], Tiny], monkeypatch: pytest.MonkeyPatch
) -> None:
    t = tiny("minimax-m2")
    heads, width = 4, 128  # no other norm is as wide

    def by_head(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        if x.shape[-1] != width:
            return rms_norm(x, weight, eps)
        return rms_norm(x.view(-1, heads, width // heads), weight.view(heads, -1), eps).flatten(1)

    monkeypatch.setattr(simple, "rms_norm", by_head)
    with open_checkpoint(t.folder) as checkpoint:
        logits = Runner(checkpoint)(t.ids)
    assert (logits - t.logits).abs().max() > 10 * TOLERANCE


DELTA_QUIRKS: dict[str, tuple[str, Callable[..., Any]]] = {
    "output gate by silu": ("output_gate", torch.nn.functional.silu),
    "no L2 norm of q and k": ("l2_normalised", lambda x: x),
    "decay after the update": ("channel_rule_chunked", lambda *a: _decay_last(*a)),
    "a decay a head": ("channel_decay", lambda f, d, b: channel_decay(f, d, b).mean(-1, True).expand_as(f)),
}


def _decay_last(q: Any, k: Any, v: Any, g: Any, beta: Any, state: Any) -> Any:
    return channel_rule(q, k, v, torch.cat((torch.zeros_like(g[:1]), g[:-1])), beta, state)


@pytest.mark.parametrize("quirk", DELTA_QUIRKS)
def test_parity_sees_of_kimi_delta_attention(
    quirk: str, tiny: Callable[[str], Tiny], monkeypatch: pytest.MonkeyPatch
) -> None:
    t = tiny("kimi-linear")
    name, wrong = DELTA_QUIRKS[quirk]
    monkeypatch.setattr(kda, name, wrong)
    with open_checkpoint(t.folder) as checkpoint:
        logits = Runner(checkpoint)(t.ids)
    assert (logits - t.logits).abs().max() > 10 * TOLERANCE


POOL_QUIRKS: dict[str, tuple[Any, str, Callable[..., Any]]] = {
    "tail dropped": (cache, "choose_pools", lambda *a: _without_tail(choose_pools(*a), a[3], a[5].pool)),
    "mean of the pool": (cache, "pooled_keys", lambda k, g, pool: pooled_keys(k, torch.zeros_like(g), pool)),
    "one gate a token": (
        cache, "pooled_keys", lambda k, g, pool: pooled_keys(k, g.mean(-1, True).expand_as(g), pool)
    ),
    "pools that end behind the query": (
        cache, "choose_pools", lambda q, w, k, at, n, s: choose_pools(q, w, k, (at // s.pool + 1) * s.pool - 1, n, s)
    ),
}  # fmt: skip


def _without_tail(chosen: torch.Tensor, positions: torch.Tensor, pool: int) -> torch.Tensor:
    own = positions[:, None]
    return chosen.masked_fill((chosen >= (own + 1) // pool * pool) & (chosen < own), -1)


@pytest.mark.parametrize("quirk", POOL_QUIRKS)
def test_parity_sees_of_pooled_keys(quirk: str, tiny: Callable[[str], Tiny], monkeypatch: pytest.MonkeyPatch) -> None:
    t = tiny("glm5-next")
    where, name, wrong = POOL_QUIRKS[quirk]
    monkeypatch.setattr(where, name, wrong)
    with open_checkpoint(t.folder) as checkpoint:
        logits = Runner(checkpoint)(t.ids)
    assert (logits - t.logits).abs().max() > 10 * TOLERANCE


@pytest.mark.parametrize(
    ("name", "mutation"),
    [
        ("llama", _set(RopeSpec, freq_factors=False)),
        ("smollm2", _set(RopeSpec, pairing="half")),
        ("mixtral", _set(RopeSpec, pairing="half")),
        ("glm4", _set(RopeSpec, dim=32)),
        ("glm4-moe", _set(RopeSpec, dim=32)),
        ("qwen3.5-moe", _set(GatedDeltaNetSpec, tiled=False)),
        ("v3", _set(RouterSpec, choice_bias=False)),
        ("v3", _set(RouterSpec, scale=1.0)),
        ("v3", _set(MLASpec, scale=24**-0.5)),
    ],
)
def test_parity_of_gguf_sees(name: str, mutation: Mutation, tiny: Callable[[str], Tiny], tmp_path: Path) -> None:
    t = tiny(name)
    with open_checkpoint(write_gguf(t.model, tmp_path / "tiny.gguf")) as checkpoint:
        logits = Runner(checkpoint, mutate=dict([mutation]))(t.ids)
    assert (logits - t.logits).abs().max() > 10 * TOLERANCE
