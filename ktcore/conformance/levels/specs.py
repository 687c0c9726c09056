"""Short ways to write the specs that cases use."""

from __future__ import annotations

from dataclasses import replace

from ktcore.ops import (
    AttentionSpec,
    BlockIndexCacheSpec,
    BlockIndexerSpec,
    ExpertsSpec,
    GatedDeltaNetSpec,
    IndexCacheSpec,
    KimiDeltaSpec,
    KVCacheSpec,
    LinearSpec,
    MLASpec,
    MLPSpec,
    MoESpec,
    NGramSpec,
    NGramTableSpec,
    RMSNormSpec,
    RopeScaling,
    RopeSpec,
    RouterSpec,
    StateCacheSpec,
    TokenIndexerSpec,
)

YARN = RopeScaling("yarn", 40.0, 4096, mscale=1.0, mscale_all_dim=1.0)
LLAMA3 = RopeScaling("llama3", 8.0, 8192)
LINEAR = RopeScaling("linear", 4.0)
YARN_MSCALE = 0.1 * 3.6888794541139363 + 1.0
"""0.1 ln 40 + 1: MLA multiplies its softmax scale with the square of it."""


def linear(inside: int, outside: int, fmt: str, bias: bool = False) -> LinearSpec:
    """inside -> outside."""
    return LinearSpec(inside, outside, fmt, bias)


def norm(dim: int, eps: float = 1e-6, offset: float = 0.0) -> RMSNormSpec:
    """With a float32 weight."""
    return RMSNormSpec(dim, eps, "F32", offset)


def attention(
    heads: int,
    kv_heads: int,
    head_dim: int,
    fmt: str = "F32",
    hidden: int = 256,
    *,
    rope: RopeSpec | None = None,
    with_rope: bool = True,
    qk_norm: bool = False,
    bias: bool = False,
    window: int = 0,
    offset: float = 0.0,
) -> AttentionSpec:
    """A branch with pre-norm and residual."""
    turning = rope or RopeSpec(head_dim, 1e6, "half")
    head_norm = norm(head_dim, offset=offset) if qk_norm else None
    return AttentionSpec(
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        scale=head_dim**-0.5,
        q=linear(hidden, heads * head_dim, fmt, bias),
        k=linear(hidden, kv_heads * head_dim, fmt, bias),
        v=linear(hidden, kv_heads * head_dim, fmt, bias),
        o=linear(heads * head_dim, hidden, fmt),
        cache=KVCacheSpec("gqa", heads, kv_heads, head_dim, head_dim, window),
        norm=norm(hidden, offset=offset),
        q_norm=head_norm,
        k_norm=head_norm,
        rope=turning if with_rope else None,
    )


def mla(
    heads: int,
    fmt: str = "F32",
    hidden: int = 256,
    latent: int = 512,
    *,
    split: bool = False,
    low_rank: int = 256,
    pairing: str = "interleaved",
    yarn: bool = True,
) -> MLASpec:
    """DeepSeek's shape: nope 128, rope 64, value 128 unless the latent is small, which shrinks all of them."""
    nope, rot, value = (128, 64, 128) if latent == 512 else (32, 16, 32)
    width = heads * (nope + rot)
    return MLASpec(
        hidden=hidden,
        heads=heads,
        nope_dim=nope,
        rope_dim=rot,
        value_dim=value,
        latent=latent,
        scale=(nope + rot) ** -0.5 * (YARN_MSCALE**2 if yarn else 1.0),
        kv_a=linear(hidden, latent + rot, fmt),
        kv_a_norm=norm(latent),
        o=linear(heads * value, hidden, fmt),
        rope=RopeSpec(rot, 1e4, pairing, YARN if yarn else None),  # type: ignore[arg-type]
        cache=KVCacheSpec("mla", heads, 1, latent + rot, latent),
        kv_b_format=fmt,
        split_kv_b=split,
        q=None if low_rank else linear(hidden, width, fmt),
        q_a=linear(hidden, low_rank, fmt) if low_rank else None,
        q_a_norm=norm(low_rank) if low_rank else None,
        q_b=linear(low_rank, width, fmt) if low_rank else None,
        norm=norm(hidden),
    )


def token_indexer(
    heads: int, dim: int, top_k: int, spec: MLASpec, fmt: str = "F32", eps: float = 1e-6, pool: int = 0
) -> TokenIndexerSpec:
    """For an attention branch with a low-rank query; rotates by halves, as DeepSeek's does, unless keys are pooled."""
    assert spec.q_a is not None, "an indexer reads the low-rank query"
    rank = spec.q_a.out_features
    return TokenIndexerSpec(
        hidden=spec.hidden,
        rank=rank,
        heads=heads,
        head_dim=dim,
        top_k=top_k,
        q=linear(rank, heads * dim, fmt),
        k=linear(spec.hidden, dim, fmt),
        weights=linear(spec.hidden, heads, "F32"),
        cache=IndexCacheSpec(heads, dim, top_k, pool),
        eps=eps,
        rope=None if pool else RopeSpec(spec.rope_dim, 1e4, "half"),
        gate=linear(spec.hidden, dim, fmt) if pool else None,
    )


def without_positions(s: MLASpec) -> MLASpec:
    """The branch with a low-rank query as it is where nothing tells positions apart."""
    assert s.q_b is not None, "the query is of low rank"
    return replace(
        s,
        rope=None,
        rope_dim=0,
        kv_a=replace(s.kv_a, out_features=s.latent),
        q_b=replace(s.q_b, out_features=s.heads * s.nope_dim),
        cache=replace(s.cache, key_dim=s.latent),
    )


def block_indexer(hidden: int, cache: BlockIndexCacheSpec, fmt: str = "F32") -> BlockIndexerSpec:
    """Zero-centred norms of queries and keys, half of a head rotated."""
    return BlockIndexerSpec(
        hidden=hidden,
        heads=cache.heads,
        head_dim=cache.dim,
        q=linear(hidden, cache.heads * cache.dim, fmt),
        k=linear(hidden, cache.dim, fmt),
        q_norm=norm(cache.dim, offset=1.0),
        k_norm=norm(cache.dim, offset=1.0),
        rope=RopeSpec(cache.dim // 2, 1e4, "half"),
        cache=cache,
    )


def ngram(fmt: str) -> NGramSpec:
    """Two streams, two heads for pairs of tokens and two for threes; products of its multipliers wrap around."""
    hidden, streams, dim, width, dilation = 64, 2, 32, 4, 3
    table = NGramTableSpec(
        rows=60,
        dim=dim,
        multipliers=(0x1F3D5B79A2C4E6F1, 0x2B7E151628AED2A7, 0x3C6EF372FE94F82B),
        sizes=(11, 13, 17, 19),
        offsets=(0, 11, 24, 41),
        eos=2,
        table_format=fmt,
        state=StateCacheSpec(((2,),)),
    )
    return NGramSpec(
        hidden=hidden,
        streams=streams,
        eps=1e-6,
        conv_width=width,
        dilation=dilation,
        table=table,
        key=linear(table.width, streams * hidden, fmt),
        value=linear(table.width, hidden, fmt),
        state=StateCacheSpec((((width - 1) * dilation, streams * hidden),)),
    )


def mlp(
    hidden: int,
    intermediate: int,
    fmt: str = "F32",
    activation: str = "silu",
    *,
    branch: bool = True,
    bias: bool = False,
    offset: float = 0.0,
) -> MLPSpec:
    """As a branch with norm and residual, or bare as in a mixture of experts."""
    return MLPSpec(
        hidden,
        intermediate,
        activation,
        linear(hidden, intermediate, fmt, bias),
        linear(hidden, intermediate, fmt, bias),
        linear(intermediate, hidden, fmt, bias),
        norm(hidden, offset=offset) if branch else None,
        branch,
    )


def experts(
    count: int, top_k: int, hidden: int, intermediate: int, fmt: str = "F32", down: str | None = None, **rest: object
) -> ExpertsSpec:
    """Gate and up in `fmt`, down in `down` (default: the same)."""
    activation = str(rest.get("activation", "silu"))
    on_input = bool(rest.get("weight_on_input", False))
    return ExpertsSpec(hidden, intermediate, count, top_k, activation, fmt, fmt, down or fmt, on_input)


def router_v3(hidden: int, count: int = 256, top_k: int = 8, fmt: str = "F32") -> RouterSpec:
    """DeepSeek-V3: sigmoid, bias for the choice, four of eight groups by their two best."""
    return RouterSpec(hidden, count, top_k, fmt, "sigmoid", True, 8, 4, "top2_sum", True, 1e-20, 2.5)


def moe(hidden: int, count: int, top_k: int, intermediate: int, fmt: str = "F32", *, shared: bool = True) -> MoESpec:
    """A branch of DeepSeek's kind."""
    return MoESpec(
        hidden,
        RouterSpec(hidden, count, top_k, "F32", "sigmoid", True, renormalise=True, renorm_eps=1e-20, scale=2.5),
        experts(count, top_k, hidden, intermediate, fmt),
        mlp(hidden, intermediate, fmt, branch=False) if shared else None,
        None,
        norm(hidden),
    )


def delta_net(
    key_heads: int,
    value_heads: int,
    dim: int,
    fmt: str = "F32",
    hidden: int = 256,
    *,
    width: int = 4,
    decay_log: bool = False,
    tiled: bool = False,
    residual: bool = True,
    normed: bool = True,
    sigmoid_gate: bool = False,
) -> GatedDeltaNetSpec:
    """A branch with pre-norm and residual, keys and values `dim` wide."""
    channels = (2 * key_heads + value_heads) * dim
    return GatedDeltaNetSpec(
        hidden=hidden,
        key_heads=key_heads,
        value_heads=value_heads,
        key_dim=dim,
        value_dim=dim,
        conv_width=width,
        qkv=linear(hidden, channels, fmt),
        z=linear(hidden, value_heads * dim, fmt),
        b=linear(hidden, value_heads, "F32"),
        a=linear(hidden, value_heads, "F32"),
        o=linear(value_heads * dim, hidden, fmt),
        out_norm=norm(dim),
        state=StateCacheSpec(((width - 1, channels), (value_heads, dim, dim))),
        conv_format="F32",
        decay_log=decay_log,
        tiled=tiled,
        norm=norm(hidden) if normed else None,
        residual=residual,
        sigmoid_gate=sigmoid_gate,
    )


def kimi_delta(
    heads: int,
    dim: int,
    fmt: str = "F32",
    hidden: int = 256,
    *,
    width: int = 4,
    decay_log: bool = False,
    lower_bound: float | None = None,
    residual: bool = True,
    normed: bool = True,
) -> KimiDeltaSpec:
    """A branch with pre-norm and residual, low ranks as wide as a head."""
    inner = heads * dim
    rows = linear(hidden, inner, fmt)
    return KimiDeltaSpec(
        hidden=hidden,
        heads=heads,
        head_dim=dim,
        conv_width=width,
        q=rows,
        k=rows,
        v=rows,
        f_a=linear(hidden, dim, "F32"),
        f_b=linear(dim, inner, "F32"),
        b=linear(hidden, heads, "F32"),
        g_a=linear(hidden, dim, fmt),
        g_b=linear(dim, inner, "F32"),
        o=linear(inner, hidden, fmt),
        out_norm=norm(dim),
        state=StateCacheSpec(((width - 1, 3 * inner), (heads, dim, dim))),
        conv_format="F32",
        decay_log=decay_log,
        lower_bound=lower_bound,
        norm=norm(hidden) if normed else None,
        residual=residual,
    )
