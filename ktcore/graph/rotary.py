"""Reads rotary position settings of both checkpoint kinds into a `RopeSpec`, and makes its node."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ktcore.graph.maker import NodeMaker
from ktcore.graph.node import Node
from ktcore.graph.settings import Settings
from ktcore.ops.rope import Pairing, RopeScaling, RopeSpec, yarn_mscale
from ktcore.weights.ref import WeightRef

DIVISORS = "rope_freqs.weight"


def rope_node(make: NodeMaker, name: str, dim: int, pairing: Pairing, *, log_multiplier: bool = False) -> Node:
    """The rope part of an attention.

    Args:
        dim: head width; hub configs may rotate a fraction of it only (`partial_rotary_factor`).
        pairing: what the *stored* weights expect; see the families.
        log_multiplier: the GGUF architecture keeps YaRN's magnitude in `yarn_log_multiplier`.
    """
    settings = make.settings
    checkpoint = settings.checkpoint
    if settings.gguf:
        theta = settings.number("", "rope.freq_base", 10000.0)
        # LLaMA 3.1's stretched frequencies come as divisors in a tensor of the whole file, without any key
        if DIVISORS in checkpoint.tensors:
            make.check(DIVISORS, checkpoint.tensors[DIVISORS].shape, (dim // 2,))
            spec = RopeSpec(dim, theta, pairing, freq_factors=True)
            return make.node(name, spec, {"freq_factors": WeightRef.of(checkpoint, DIVISORS)})
        return make.node(name, RopeSpec(dim, theta, pairing, _gguf_scaling(settings, log_multiplier)))
    parameters = rope_parameters(checkpoint.config)
    dim = int(dim * parameters.get("partial_rotary_factor", 1.0))
    theta = float(parameters.get("rope_theta", 10000.0))
    return make.node(name, RopeSpec(dim, theta, pairing, _hf_scaling(settings, parameters)))


def rope_parameters(config: Mapping[str, Any]) -> dict[str, Any]:
    """The rotary settings of a config.json in the merged form of transformers 5, from either form."""
    outer = {key: config[key] for key in ("rope_theta", "partial_rotary_factor") if config.get(key) is not None}
    merged = {**outer, **(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    merged["rope_type"] = merged.get("rope_type") or merged.get("type") or "default"
    if not merged.get("original_max_position_embeddings"):
        original = config.get("original_max_position_embeddings") or config.get("max_position_embeddings")
        merged["original_max_position_embeddings"] = original
    return merged


def _hf_scaling(settings: Settings, p: Mapping[str, Any]) -> RopeScaling | None:
    kind, original = p["rope_type"], p["original_max_position_embeddings"]
    if kind == "default":
        return None
    if kind not in ("linear", "llama3", "yarn"):
        raise settings.error(f"rope type {kind!r} is not supported", "supported: default, linear, llama3, yarn")
    needed = {"linear": ["factor"], "llama3": ["factor", "low_freq_factor", "high_freq_factor"], "yarn": []}
    missing = [key for key in needed[kind] if p.get(key) is None]
    if missing or (kind != "linear" and not original):
        raise settings.error(f"rope type {kind!r} lacks {', '.join(missing) or 'original_max_position_embeddings'}")
    if kind == "linear":
        return RopeScaling("linear", float(p["factor"]))
    if kind == "llama3":
        return RopeScaling(
            "llama3",
            float(p["factor"]),
            original,
            low_freq_factor=float(p["low_freq_factor"]),
            high_freq_factor=float(p["high_freq_factor"]),
        )
    return RopeScaling(
        "yarn",
        float(p.get("factor") or settings.integer("max_position_embeddings", "") / original),
        original,
        beta_fast=float(p.get("beta_fast") or 32.0),
        beta_slow=float(p.get("beta_slow") or 1.0),
        mscale=float(p.get("mscale") or 0.0),
        mscale_all_dim=float(p.get("mscale_all_dim") or 0.0),
        attention_factor=p.get("attention_factor"),
        truncate=bool(p.get("truncate", True)),
    )


def _gguf_scaling(settings: Settings, log_multiplier: bool) -> RopeScaling | None:
    kind = settings.get("", "rope.scaling.type", "linear" if _gguf_factor(settings) != 1.0 else "none")
    if kind == "none":
        return None
    if kind not in ("linear", "yarn"):
        raise settings.error(f"rope scaling type {kind!r} is not supported", "supported: none, linear, yarn")
    factor = _gguf_factor(settings)
    if kind == "linear":
        return RopeScaling("linear", factor) if factor != 1.0 else None
    # stored is 0.1 * mscale_all_dim; mscale itself is not stored, and every released model has both equal
    mscale = settings.number("", "rope.scaling.yarn_log_multiplier", 0.0) / 0.1 if log_multiplier else 0.0
    extra = settings.number("", "rope.scaling.attn_factor", 1.0)
    return RopeScaling(
        "yarn",
        factor,
        settings.integer("", "rope.scaling.original_context_length", settings.integer("", "context_length")),
        beta_fast=settings.number("", "rope.scaling.yarn_beta_fast", 32.0),
        beta_slow=settings.number("", "rope.scaling.yarn_beta_slow", 1.0),
        mscale=mscale,
        mscale_all_dim=mscale,
        attention_factor=extra * yarn_mscale(factor, 1.0) if extra != 1.0 else None,
    )


def _gguf_factor(settings: Settings) -> float:
    # 0 means "not set", and old files have the second key
    return settings.number("", "rope.scaling.factor", settings.number("", "rope.scale_linear", 1.0)) or 1.0
