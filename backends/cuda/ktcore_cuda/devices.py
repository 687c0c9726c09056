"""Device classes that plans can be made for without hardware, and how a live device is described.

Compute capabilities and what hangs on them: FP8 matrix products from 8.9 (NVIDIA CUDA C++ Programming Guide),
FlashMLA on 9.0 with pages of 64 tokens (its README). The least able class comes first, so that a default plan holds
for all.
"""

from __future__ import annotations

from collections.abc import Mapping

from ktcore.backend import Capabilities

BASE = frozenset({"f32", "f16", "bf16", "int8_dot", "host_callback:capturable", "graph:capture"})
FP8 = frozenset({"fp8:e4m3fn", "fp8:e5m2"})


def _class(arch: str, examples: str, extra: frozenset[str] = frozenset(), **more: str | int) -> Capabilities:
    properties: Mapping[str, str | int | float] = {"arch": arch, "subgroup": 32, **more}
    return Capabilities("cuda", f"{arch} ({examples})", None, BASE | extra, properties)


DECLARED = (
    _class("sm_80", "A100, A30"),
    _class("sm_86", "RTX 30, A40, A6000"),
    _class("sm_89", "RTX 40, L4, L40", FP8, fp8_max=448),
    _class("sm_90", "H100, H200", FP8, fp8_max=448, mla_page_size=64),
    _class("sm_120", "RTX 50", FP8 | {"fp4:e2m1"}, fp8_max=448),
)


def live(name: str, memory: int, major: int, minor: int, processors: int = 0) -> Capabilities:
    """Capabilities of a device from what its driver reports.

    Args:
        memory: total bytes.
        major, minor: compute capability.
        processors: streaming multiprocessors; 0 where that is not known.
    """
    arch = f"sm_{major}{minor}"
    known = next((c for c in DECLARED if c.properties["arch"] == arch), None)
    properties: dict[str, str | int | float] = {"arch": arch, "subgroup": 32}
    features = BASE
    if known is not None:
        features, properties = known.features, dict(known.properties)
    else:
        features = BASE - ({"bf16"} if major < 8 else set()) | (FP8 if (major, minor) >= (8, 9) else set())
    if processors:
        properties["processors"] = processors
    return Capabilities("cuda", name, memory, features, properties, live=True)
