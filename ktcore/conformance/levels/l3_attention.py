"""What some families' attention has beside the ordinary: a case for every optional field of it and of its caches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from ktcore.conformance.case import Case, Check, Context
from ktcore.conformance.levels.l2_kv_cache import run_cache
from ktcore.conformance.levels.operator import ORDERED, SIMPLE_FORMATS, any_format, check_sequences
from ktcore.conformance.levels.specs import attention, linear, mla, norm, without_positions
from ktcore.conformance.truth import attention as truth
from ktcore.ops import AttentionSpec, KVCacheSpec, MLASpec, RMSNormSpec, Temperature

LONG = ((5, 40, 1), (1, 1, 33), (1, 1, 1))
OVER_PAGES = ((5, 17, 1), (1, 1, 150), (1, 1, 1))
HEADS, GROUPS, DIM, HIDDEN = 4, 2, 64, 256

Make = Callable[[str], AttentionSpec]


def cases() -> list[Case]:
    """By field."""
    return [
        _case("window", "keys beyond the window are hidden", partial(_plain, window=20)),
        _case("zero-centred-norms", "norms with 1 + weight", partial(_plain, qk_norm=True, offset=1.0)),
        _case("output-bias", "a bias of the output projection", _with_output_bias),
        _case("scale", "a softmax scale of its own", lambda f: replace(_plain(f), scale=0.3)),
        _case("no-norm", "without a norm of the input", lambda f: replace(_plain(f), norm=None)),
        _case("no-residual", "the branch alone", lambda f: replace(_plain(f), residual=False)),
        _case("post-norm", "a norm of the result", lambda f: replace(_plain(f), post_norm=norm(HIDDEN))),
        _case("gate", "a gate on what the output projection gets", _gated),
        _case(
            "norm-after-rope",
            "norms after the rotation",
            lambda f: replace(_plain(f, qk_norm=True), norm_after_rope=True),
        ),
        _case("norms-of-whole-rows", "norms over all heads together", _whole_norms),
        _case(
            "norms-without-weight",
            "norms of queries and keys that have no weight",
            lambda f: replace(_plain(f), q_norm=RMSNormSpec(DIM, 1e-6, ""), k_norm=RMSNormSpec(DIM, 1e-6, "")),
        ),
        Case("L3.attention.ordered", 3, "attention", _ORDER, partial(_check, _plain, formats=ORDERED)),
        _case("chunk", "a query sees its own chunk only", lambda f: _cached(f, chunk=16)),
        _case("sinks", "a logit of each head without a value", lambda f: replace(_cached(f, sinks=True), sinks=True)),
        _case(
            "sinks-in-window",
            "both, as gpt-oss has them",
            lambda f: replace(_cached(f, sinks=True, window=12), sinks=True),
        ),
        _case(
            "temperature",
            "queries that grow with their position",
            lambda f: replace(_plain(f), temperature=Temperature(0.9, 6)),
        ),
        _case(
            "temperature-offset",
            "queries that grow from a position of their own",
            lambda f: replace(_plain(f), temperature=Temperature(0.9, 6, 0.0)),
        ),
        _case("value-norm", "a norm of values", lambda f: replace(_plain(f), v_norm=RMSNormSpec(DIM, 1e-6, ""))),
        _case("value-width", "values narrower than keys", _narrow_values),
        _case("value-scale", "values times a factor", lambda f: replace(_plain(f), value_scale=0.7)),
        _case(
            "head-gate",
            "one gate a head",
            lambda f: replace(_plain(f), gate=linear(HIDDEN, HEADS, "F32"), head_gate=True),
        ),
        *(
            Case(f"L3.kv_cache.{kind}.{name}", 3, "kv_cache", about, partial(_cache, kind, name))
            for kind in ("gqa", "mla")
            for name, about in _CACHES.items()
        ),
        Case(
            "L3.kv_cache.mla.chosen",
            3,
            "kv_cache",
            "a query sees the tokens that are named",
            partial(_cache, "mla", "chosen"),
        ),
        Case(
            "L3.kv_cache.gqa.chosen",
            3,
            "kv_cache",
            "heads of a key head see the tokens that are named for it",
            partial(_cache, "gqa", "chosen"),
        ),
        Case("L3.mla.ordered", 3, "mla", _ORDER, partial(_check_mla, lambda spec: spec, formats=ORDERED)),
        _mla("no-residual", "the branch alone", lambda s: replace(s, residual=False)),
        _mla("temperature", "queries that grow", lambda s: replace(s, temperature=Temperature(0.9, 3, 0.0))),
        _mla("no-norm", "without a norm of the input", lambda s: replace(s, norm=None)),
        _mla("unrotated", "a shared key that does not rotate", lambda s: replace(s, rope=None)),
        _mla("no-positions", "without any part for positions", without_positions),
    ]


_ORDER = "columns in another order, in each projection its own"
_CACHES = {
    "window": "keys beyond the window are hidden",
    "chunk": "a query sees its own chunk only",
    "sinks": "a logit of each head without a value",
}


def _case(name: str, about: str, make: Make) -> Case:
    return Case(f"L3.attention.{name}", 3, "attention", about, partial(_check, make))


def _mla(name: str, about: str, change: Callable[[MLASpec], MLASpec]) -> Case:
    check: Check = partial(_check_mla, change)
    return Case(f"L3.mla.{name}", 3, "mla", about, check)


def _check(make: Make, ctx: Context, formats: Sequence[str] = SIMPLE_FORMATS) -> None:
    spec = make(any_format(ctx, make, formats))
    check_sequences(ctx, spec, LONG, lambda w, x, a: truth.attention(spec, w, x, a), spec.hidden)


def _check_mla(change: Callable[[MLASpec], MLASpec], ctx: Context, formats: Sequence[str] = SIMPLE_FORMATS) -> None:
    def make(fmt: str) -> MLASpec:
        return change(mla(4, fmt, latent=256))

    spec = make(any_format(ctx, make, formats))
    check_sequences(ctx, spec, ((3, 6), (1, 1)), lambda w, x, a: truth.mla(spec, w, x, a), spec.hidden)


def _plain(fmt: str, window: int = 0, qk_norm: bool = False, offset: float = 0.0) -> AttentionSpec:
    return attention(HEADS, GROUPS, DIM, fmt, HIDDEN, window=window, qk_norm=qk_norm, offset=offset)


def _with_output_bias(fmt: str) -> AttentionSpec:
    return replace(_plain(fmt), o=linear(HEADS * DIM, HIDDEN, fmt, bias=True))


def _narrow_values(fmt: str) -> AttentionSpec:
    plain, width = _plain(fmt), DIM // 2
    return replace(
        plain,
        v=linear(HIDDEN, GROUPS * width, fmt),
        o=linear(HEADS * width, HIDDEN, fmt),
        cache=replace(plain.cache, value_dim=width),
        value_dim=width,
    )


def _whole_norms(fmt: str) -> AttentionSpec:
    return replace(_plain(fmt), q_norm=norm(HEADS * DIM), k_norm=norm(GROUPS * DIM), norm_whole=True)


def _gated(fmt: str) -> AttentionSpec:
    return replace(_plain(fmt), gate=linear(HIDDEN, HEADS * DIM, fmt))


def _cached(fmt: str, window: int = 0, chunk: int = 0, sinks: bool = False) -> AttentionSpec:
    plain = _plain(fmt)
    return replace(plain, cache=replace(plain.cache, window=window, chunk=chunk, sinks=sinks))


def _cache(kind: str, name: str, ctx: Context) -> None:
    plain = KVCacheSpec("gqa", 8, 2, 64, 64) if kind == "gqa" else KVCacheSpec("mla", 8, 1, 96, 64)
    used = {"window": {"window": 20}, "chunk": {"chunk": 48}}.get(name, {name: True})
    spec = replace(plain, **used)  # type: ignore[arg-type]
    for loaded in ctx.target.load(ctx, spec, {}):
        run_cache(ctx, loaded, spec, OVER_PAGES, loaded.page_sizes[0])
