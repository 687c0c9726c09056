"""What the conformance kit should know of the CPU kernels: their precision."""

from __future__ import annotations

from ktcore.conformance import Expectations, Mode, Precision

_PLAIN = ("F32", "F16")
"""Weights that are multiplied with float32 activations."""
_ROUNDED = ("BF16", "F8_E4M3_G128", "F8_E4M3_G32")
"""Weights that are multiplied with bfloat16 activations where the CPU has products of them; all others with 8-bit ones
in groups of 16."""


def expectations() -> Expectations:
    """Every kernel is deterministic, and a token's result does not depend on its batch."""
    from ktcore_cpu import _native

    plain = Precision(batch_invariant=True)
    rounds = _native.isa_selected() in ("avx512_bf16", "amx", "amx_emulated")
    bfloat = "bfloat16" if rounds else None
    cached = Precision(kv="float16", batch_invariant=True)
    quantised = Precision(activations="int8/16", kv="float16", batch_invariant=True)
    return Expectations(
        mode=Mode.HARDWARE,
        precision={
            "cpu.embedding": plain,
            "cpu.rms_norm": plain,
            **{f"cpu.{op}@{fmt}": cached for op in ("attention", "mla") for fmt in _PLAIN},
            **{
                f"cpu.{op}@{fmt}": Precision(activations=bfloat, kv="float16", batch_invariant=True)
                for op in ("attention", "mla")
                for fmt in _ROUNDED
            },
            "cpu.attention": quantised,
            "cpu.mla": quantised,
            **{f"cpu.*@{fmt}": plain for fmt in _PLAIN},
            **{f"cpu.*@{fmt}": Precision(activations=bfloat, batch_invariant=True) for fmt in _ROUNDED},
            "cpu.*": Precision(activations="int8/16", batch_invariant=True),
        },
    )
