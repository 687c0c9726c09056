"""What specs have in common: their parts, their formats, and defaults that add nothing to the plain operator."""

from __future__ import annotations

from dataclasses import MISSING, fields

import pytest

from ktcore import ops
from ktcore.ops import LinearSpec, MLPSpec, RMSNormSpec, Spec

SPECS = [found for found in vars(ops).values() if isinstance(found, type) and issubclass(found, Spec) and found != Spec]
ONE = {"scale", "value_scale", "groups", "groups_kept"}
"""Factors and counts whose neutral value is one."""
NAMED = {
    ("RouterSpec", "score"): "softmax",
    ("RouterSpec", "group_score"): "max",
    ("AttentionSpec", "residual"): True,
    ("MLASpec", "residual"): True,
    ("MoESpec", "residual"): True,
    ("GatedDeltaNetSpec", "residual"): True,
    ("KimiDeltaSpec", "residual"): True,
    ("CompressedAttentionSpec", "residual"): True,
    ("HyperConnectionSpec", "leave"): "mixed",
}
"""Neutral by what they mean: attention and experts are branches, a plain MLP is none."""


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.__name__)
def test_what_a_spec_does_not_say_is_not_done(spec: type[Spec]) -> None:
    for field in fields(spec):
        if field.default is MISSING:
            continue
        neutral: tuple[object, ...] = (1,) if field.name in ONE else (None, False, 0, "")
        if (spec.__name__, field.name) in NAMED:
            neutral = (NAMED[spec.__name__, field.name],)
        elif field.name.endswith("_format"):
            neutral = ("F32",)  # of small parts, as checkpoints hold them
        assert field.default in neutral, f"{spec.op}.{field.name}"


def test_formats_are_those_of_all_parts_once_each() -> None:
    linear = [LinearSpec(8, 8, fmt) for fmt in ("Q4_K", "Q6_K", "Q4_K")]
    mlp = MLPSpec(8, 8, "silu", *linear, norm=RMSNormSpec(8, 1e-5, weight_format=""))
    assert mlp.formats() == ("Q4_K", "Q6_K")
    assert mlp.children() == dict(zip(("gate", "up", "down"), linear, strict=True)) | {"norm": mlp.norm}
