"""What the conformance kit should know of the CPU kernels: their precision."""

from __future__ import annotations

from ktcore.conformance import Expectations, Mode, Precision

_PLAIN = ("F32", "F16", "BF16")
"""Weights that are multiplied with float32 activations; all others with 8-bit ones in groups of 16."""


def expectations() -> Expectations:
    """Every kernel is deterministic, and a token's result does not depend on its batch."""
    plain = Precision(batch_invariant=True)
    cached = Precision(kv="float16", batch_invariant=True)
    quantised = Precision(activations="int8/16", kv="float16", batch_invariant=True)
    return Expectations(
        mode=Mode.HARDWARE,
        precision={
            "cpu.embedding": plain,
            "cpu.rms_norm": plain,
            **{f"cpu.{op}@{fmt}": cached for op in ("attention", "mla") for fmt in _PLAIN},
            "cpu.attention": quantised,
            "cpu.mla": quantised,
            **{f"cpu.*@{fmt}": plain for fmt in _PLAIN},
            "cpu.*": Precision(activations="int8/16", batch_invariant=True),
        },
    )
