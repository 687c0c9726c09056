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


def rope_node(
    make: NodeMaker,
    name: str,
    dim: int,
    pairing: Pairing,
    *,
    log_multiplier: bool = False,
    partial: float = 1.0,
    truncate: bool = True,
) -> Node:
    """The rope part of an attention.

    Args:
        dim: head width; checkpoints may rotate its beginning only (`partial_rotary_factor`, `rope.dimension_count`).
        pairing: what the *stored* weights expect; see the families.
        partial: the part that rotates where the checkpoint does not say.
        log_multiplier: the GGUF architecture keeps YaRN's magnitude in `yarn_log_multiplier`.
        truncate: `RopeScaling.truncate` of GGUF files, which do not hold it.
    """
    settings = make.settings
    weights: dict[str, WeightRef] = {}
    if settings.gguf:
        theta = settings.number("", "rope.freq_base", 10000.0, positive=True)
        dim = min(dim, settings.integer("", "rope.dimension_count", int(dim * partial)))
        if DIVISORS in settings.checkpoint.tensors:
            # LLaMA 3.1's stretched frequencies come as divisors in a tensor of the whole file, without any key
            make.check(DIVISORS, settings.checkpoint.tensors[DIVISORS].shape, (dim // 2,))
            weights["freq_factors"] = WeightRef.of(settings.checkpoint, DIVISORS)
        scaling = None if weights else _gguf_scaling(settings, log_multiplier, truncate)
    else:
        section = Settings(settings.checkpoint, rope_parameters(settings))
        theta = section.number("rope_theta", "", 10000.0, positive=True)
        dim = int(dim * min(section.number("partial_rotary_factor", "", partial), 1.0))
        scaling = _hf_scaling(section)
    if dim < 2 or dim % 2 or theta == 1.0:
        raise settings.error(f"rotary position embedding of width {dim} and base {theta} is not possible")
    return make.node(name, RopeSpec(dim, theta, pairing, scaling, bool(weights)), weights)


def rope_parameters(settings: Settings) -> dict[str, Any]:
    """The rotary settings of a config.json in the merged form of transformers 5, from either form."""
    config = settings.config
    merged = {key: config[key] for key in ("rope_theta", "partial_rotary_factor") if config.get(key) is not None}
    for section in ("rope_scaling", "rope_parameters"):
        value = config.get(section) or {}
        if not isinstance(value, Mapping):
            raise settings.error(f"{section} is {value!r}, an object is needed")
        merged.update(value)
    merged["rope_type"] = merged.get("rope_type") or merged.get("type") or "default"
    if not merged.get("original_max_position_embeddings"):
        original = config.get("original_max_position_embeddings") or config.get("max_position_embeddings")
        merged["original_max_position_embeddings"] = original
    return merged


def _hf_scaling(s: Settings) -> RopeScaling | None:
    kind = s.get("rope_type", "")
    if kind == "default":
        return None
    if kind == "linear":
        return RopeScaling("linear", s.number("factor", "", positive=True))
    if kind == "llama3":
        return RopeScaling(
            "llama3",
            s.number("factor", "", positive=True),
            s.integer("original_max_position_embeddings", ""),
            low_freq_factor=s.number("low_freq_factor", "", positive=True),
            high_freq_factor=s.number("high_freq_factor", "", positive=True),
        )
    if kind != "yarn":
        raise s.error(f"rope type {kind!r} is not supported", "supported: default, linear, llama3, yarn")
    original = s.integer("original_max_position_embeddings", "")
    stretched = Settings(s.checkpoint).integer("max_position_embeddings", "")
    factor = s.get("attention_factor", "", None)
    return RopeScaling(
        "yarn",
        s.number("factor", "", stretched / original, positive=True),
        original,
        # 0 counts as absent in all of these
        beta_fast=s.number("beta_fast", "", 32.0) or 32.0,
        beta_slow=s.number("beta_slow", "", 1.0) or 1.0,
        mscale=s.number("mscale", "", 0.0),
        mscale_all_dim=s.number("mscale_all_dim", "", 0.0),
        attention_factor=None if factor is None else s.number("attention_factor", ""),
        truncate=bool(s.get("truncate", "", True)),
    )


def _gguf_scaling(settings: Settings, log_multiplier: bool, truncate: bool) -> RopeScaling | None:
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
        beta_fast=settings.number("", "rope.scaling.yarn_beta_fast", 32.0, positive=True),
        beta_slow=settings.number("", "rope.scaling.yarn_beta_slow", 1.0, positive=True),
        mscale=mscale,
        mscale_all_dim=mscale,
        attention_factor=extra * yarn_mscale(factor, 1.0) if extra != 1.0 else None,
        truncate=truncate,
    )


def _gguf_factor(settings: Settings) -> float:
    # 0 means "not set", and old files have the second key
    return settings.number("", "rope.scaling.factor", settings.number("", "rope.scale_linear", 1.0)) or 1.0
