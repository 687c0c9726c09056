"""What the conformance kit should know of the NPU backend."""

from __future__ import annotations

from ktcore.conformance import Expectations, Precision

HALF = Precision(compute="bfloat16", kv="bfloat16")


def expectations() -> Expectations:
    """Products and the cache in bfloat16; all else, and what lies between operators, in float32."""
    return Expectations(precision={f"npu.{op}": HALF for op in ("linear", "kv_cache", "mla", "experts", "embedding")})
