"""Reads rotary position settings of both checkpoint kinds into a `RopeSpec`, and makes its node."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ktcore.graph.defaults import Defaults
from ktcore.graph.maker import NodeMaker
from ktcore.graph.node import Node
from ktcore.graph.settings import Settings
from ktcore.ops.rope import Pairing, RopeScaling, RopeSpec, yarn_mscale
from ktcore.weights.ref import WeightRef

DIVISORS = "rope_freqs.weight"
OUTSIDE = ("rope_theta", "partial_rotary_factor")
TRAINED = "original_max_position_embeddings"
FAST, SLOW = 32.0, 1.0  # YaRN's betas
# of the sections of all families, null and absent alike: what `_compute_yarn_parameters` of transformers takes
NULL = {"beta_fast": FAST, "beta_slow": SLOW, "mscale": 0.0, "mscale_all_dim": 0.0, "attention_factor": None}
ABSENT = dict.fromkeys(NULL) | {"truncate": True}


def rope_node(
    make: NodeMaker,
    name: str,
    dim: int,
    pairing: Pairing,
    *,
    log_multiplier: bool = False,
    partial: bool = False,
    truncate: bool = True,
    whole: float = 1.0,
    section: Settings | None = None,
    divisors: bool = True,
    keys: tuple[str, str] = ("rope.freq_base", "rope.dimension_count"),
    alpha: bool = False,
) -> Node:
    """The rope part of an attention.

    Args:
        dim: head width.
        pairing: what the *stored* weights expect; see the families.
        log_multiplier: the GGUF architecture keeps YaRN's magnitude in `yarn_log_multiplier`.
        partial: checkpoints of the family may rotate a head's beginning only (`partial_rotary_factor`).
        whole: `partial_rotary_factor` of a head that rotates as a whole.
        truncate: `RopeScaling.truncate` of GGUF files, which do not hold it.
        section: rotary settings of a config.json's layer (`kind_section`) in place of the model's.
        divisors: a tensor of divisors in GGUF files is for this layer.
        keys: of GGUF files, that hold the layer's base and how much of a head rotates; "" where `dim` is that already.
        alpha: a config.json may say "dynamic" and mean a base that grows by a fixed `alpha` (Hunyuan).
    """
    settings = make.settings
    weights: dict[str, WeightRef] = {}
    scaling, turning = None, 0
    if settings.gguf:
        theta = settings.number("", keys[0], positive=True)
        dim = min(dim, settings.integer("", keys[1], without=dim, derived=dim))
        if divisors and DIVISORS in settings.checkpoint.tensors:
            # LLaMA 3.1's stretched frequencies come as divisors in a tensor of the whole file, without any key
            weights["freq_factors"] = _divisors(make, dim // 2, longer=not keys[1])
        scaling = None if weights else gguf_scaling(settings, log_multiplier, truncate)
    else:
        section = section or rope_section(settings)
        theta = section.number("rope_theta", "", positive=True)
        if section.given("rope_type") == "proportional":
            turning = _turning(section, dim)
        elif alpha and section.given("rope_type") == "dynamic":
            if not section.given("alpha"):
                raise section.error("rope type 'dynamic' is not supported without alpha, which fixes its base")
            theta *= section.number("alpha", "", positive=True) ** (dim / (dim - 2))
        else:
            dim = int(dim * _rotated(section, partial, whole))
            scaling = hub_scaling(settings, section)
    if dim < 2 or dim % 2 or theta == 1.0:
        raise settings.error(f"rotary position embedding of width {dim} and base {theta} is not possible")
    return make.node(name, RopeSpec(dim, theta, pairing, scaling, bool(weights), turning), weights)


def kind_section(settings: Settings, kind: str) -> Settings:
    """The rotary settings of one kind of layer in a config.json that has them by kind.

    Raises:
        ArchitectureError: there are none for this kind.
    """
    found = settings.config.get("rope_parameters")
    if found is None:
        found = settings.defaults.hub.get("rope_parameters", {})
    own = found.get(kind) if isinstance(found, Mapping) else None
    if not isinstance(own, Mapping):
        raise settings.error(f"rope_parameters has no object of settings for layers of {kind}, but {own!r}")
    return section_of(settings, own)


def section_of(settings: Settings, values: Mapping[str, Any]) -> Settings:
    """Rotary settings of one layer, for `rope_node`."""
    outside = {key: value for key, value in settings.defaults.hub.items() if key in OUTSIDE}
    return settings.within({"rope_type": "default"} | dict(values), Defaults(hub={**ABSENT, **outside}, null=NULL))


def _turning(section: Settings, dim: int) -> int:
    """Pairs of a head that turn, of "proportional" embedding, whose frequencies are those of the whole head.

    Raises:
        ArchitectureError: a stretch that nothing here computes.
    """
    if section.given("factor") not in (None, 1, 1.0):
        raise section.error(f"factor {section.given('factor')!r} of proportional rotary embedding is not supported")
    part = section.number("partial_rotary_factor", "")
    return 0 if part >= 1.0 else int(part * dim // 2)


def _divisors(make: NodeMaker, pairs: int, *, longer: bool) -> WeightRef:
    """The tensor of divisors, or its beginning where it may be `longer`, since other layers turn more pairs."""
    checkpoint = make.settings.checkpoint
    found = checkpoint.tensors[DIVISORS].shape
    if longer and len(found) == 1 and found[0] > pairs:
        return WeightRef.of(checkpoint, DIVISORS).pick_rows((0, pairs, 1), items=True)
    make.check(DIVISORS, found, (pairs,))
    return WeightRef.of(checkpoint, DIVISORS)


def rope_section(settings: Settings) -> Settings:
    """The rotary settings of a config.json in the merged form of transformers 5, from either form.

    As `convert_rope_params_to_dict` and `standardize_rope_params` of its modeling_rope_utils.py have it: `rope_scaling`
    or else `rope_parameters` counts as a whole; base and rotated part may stand outside, and count where the section
    has none; the trained context counts first where it stands outside.

    Raises:
        ArchitectureError: no object, or settings a kind of layer.
    """
    config = settings.config
    found = config.get("rope_scaling") or config.get("rope_parameters")
    if found is None:
        found = settings.defaults.hub.get("rope_parameters", {})
    if not isinstance(found, Mapping) or any(isinstance(value, Mapping) for value in found.values()):
        raise settings.error(f"rope settings are {found!r}, an object of plain values is needed")
    merged = {key: config[key] for key in OUTSIDE if key in config} | dict(found)
    merged.setdefault("rope_type", found.get("type", "default"))
    if TRAINED in config:
        merged[TRAINED] = config[TRAINED]
    elif "max_position_embeddings" in config:
        merged.setdefault(TRAINED, config["max_position_embeddings"])
    own = {key: value for key, value in settings.defaults.hub.items() if key in OUTSIDE}
    return settings.within(merged, Defaults(hub={**ABSENT, **own}, null=NULL))


def _rotated(section: Settings, partial: bool, whole: float) -> float:
    """The part of a head that rotates."""
    if partial:
        return min(section.number("partial_rotary_factor", ""), 1.0)
    if section.given("partial_rotary_factor") not in (None, whole):
        raise section.error(
            f"partial_rotary_factor is {section.given('partial_rotary_factor')!r}, which architecture "
            f"'{section.architecture}' is not known to have",
            "its model code rotates whole heads; leave the key out if that is meant",
        )
    return 1.0


def hub_scaling(settings: Settings, s: Settings) -> RopeScaling | None:
    """What the rotary section `s` of a config.json stretches frequencies with; None for nothing."""
    kind = s.get("rope_type", "")
    if kind == "default":
        return None
    if kind == "linear":
        return RopeScaling("linear", s.number("factor", "", positive=True))
    if kind == "llama3":
        return RopeScaling(
            "llama3",
            s.number("factor", "", positive=True),
            s.integer(TRAINED, ""),
            low_freq_factor=s.number("low_freq_factor", "", positive=True),
            high_freq_factor=s.number("high_freq_factor", "", positive=True),
        )
    if kind != "yarn":
        raise s.error(f"rope type {kind!r} is not supported", "supported: default, linear, llama3, yarn")
    original = s.integer(TRAINED, "")
    # null stands for the ratio of the two contexts, while absent is an error: so in transformers
    named = s.given("factor") is not None or "factor" not in s.config
    factor = s.get("attention_factor", "")
    return RopeScaling(
        "yarn",
        s.number("factor", "", positive=True) if named else settings.integer("max_position_embeddings", "") / original,
        original,
        # 0 counts as absent in all of these
        beta_fast=s.number("beta_fast", "") or FAST,
        beta_slow=s.number("beta_slow", "") or SLOW,
        mscale=s.number("mscale", ""),
        mscale_all_dim=s.number("mscale_all_dim", ""),
        attention_factor=None if factor is None else s.number("attention_factor", ""),
        truncate=s.flag("truncate", ""),
    )


def gguf_scaling(settings: Settings, log_multiplier: bool = False, truncate: bool = True) -> RopeScaling | None:
    """The same of a GGUF file; `log_multiplier` and `truncate` as in `rope_node`."""
    kind = settings.get("", "rope.scaling.type")
    if kind == "none":
        return None
    if kind not in ("linear", "yarn"):
        raise settings.error(f"rope scaling type {kind!r} is not supported", "supported: none, linear, yarn")
    factor = _gguf_factor(settings)
    if kind == "linear":
        return RopeScaling("linear", factor) if factor != 1.0 else None
    # stored is 0.1 * mscale_all_dim; mscale itself is not stored, and every released model has both equal
    mscale = settings.number("", "rope.scaling.yarn_log_multiplier") / 0.1 if log_multiplier else 0.0
    extra = settings.number("", "rope.scaling.attn_factor")
    return RopeScaling(
        "yarn",
        factor,
        settings.integer("", "rope.scaling.original_context_length", derived=settings.integer("", "context_length")),
        beta_fast=settings.number("", "rope.scaling.yarn_beta_fast", positive=True),
        beta_slow=settings.number("", "rope.scaling.yarn_beta_slow", positive=True),
        mscale=mscale,
        mscale_all_dim=mscale,
        attention_factor=extra * yarn_mscale(factor, 1.0) if extra != 1.0 else None,
        truncate=truncate,
    )


def _gguf_factor(settings: Settings) -> float:
    # 0 means "not set", and old files have the second key
    return settings.number("", "rope.scaling.factor", derived=settings.number("", "rope.scale_linear")) or 1.0
