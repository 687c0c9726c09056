"""What the conformance kit should know of the XPU backend."""

from __future__ import annotations

from ktcore.conformance import Expectations, Precision

HALF = Precision(compute="bfloat16", kv="bfloat16")


def expectations() -> Expectations:
    """Products and the cache in bfloat16; all else, and what lies between operators, in float32."""
    halves = ("linear", "kv_cache", "mla", "experts", "embedding", "index_cache", "block_index_cache")
    return Expectations(
        precision={
            **{f"xpu.{op}": HALF for op in halves},
            "xpu.fp8_linear": Precision(activations="float8_e4m3fn/128"),
        }
    )
