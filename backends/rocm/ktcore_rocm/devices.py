"""Device classes that plans can be made for without hardware, and how a live device is described.

Wavefronts are 64 wide on gfx9 and 32 on gfx11 and gfx12. gfx942 has FP8 of the fnuz flavour (largest value 240),
gfx950 and gfx12 the common one (448); gfx90a and gfx11 have no FP8 matrix product (AITER, `aiter/utility/dtypes.py`).
AITER's latent-attention kernels are right with pages of one token only. The least able class comes first, so that a
default plan holds for all.
"""

from __future__ import annotations

from ktcore.backend import Capabilities

BASE = frozenset({"f32", "f16", "bf16", "int8_dot", "host_callback:capturable", "graph:capture"})


def _class(arch: str, examples: str, wave: int, fp8: str | None = None, **more: int) -> Capabilities:
    features = BASE if fp8 is None else BASE | {f"fp8:{fp8}", f"fp8:e5m2{'fnuz' if fp8.endswith('fnuz') else ''}"}
    properties: dict[str, str | int | float] = {"arch": arch, "subgroup": wave, **more}
    if fp8 is not None:
        properties["fp8_max"] = 240 if fp8.endswith("fnuz") else 448
    return Capabilities("rocm", f"{arch} ({examples})", None, features, properties)


DECLARED = (
    _class("gfx90a", "MI210, MI250", 64),
    _class("gfx942", "MI300X, MI325X", 64, "e4m3fnuz", mla_page_size=1),
    _class("gfx950", "MI350X, MI355X", 64, "e4m3fn", mla_page_size=1),
    _class("gfx1100", "RX 7900", 32),
    _class("gfx1201", "RX 9070", 32, "e4m3fn"),
)


def live(name: str, memory: int, arch: str, wave: int, processors: int = 0) -> Capabilities:
    """Capabilities of a device from what its driver reports.

    Args:
        memory: total bytes.
        arch: the architecture's name as the driver gives it, "gfx942:sramecc+:xnack-".
        wave: width of a wavefront.
        processors: compute units; 0 where that is not known.
    """
    short = arch.split(":")[0]
    known = next((c for c in DECLARED if c.properties["arch"] == short), None)
    features = known.features if known is not None else BASE
    properties: dict[str, str | int | float] = dict(known.properties) if known is not None else {"arch": short}
    properties["subgroup"] = wave
    if processors:
        properties["processors"] = processors
    return Capabilities("rocm", name, memory, features, properties, live=True)
