"""Device classes that plans can be made for without hardware, and how a live device is described.

Sub-groups are 8, 16 or 32 wide on Xe-HPG, 16 or 32 after it; there is no single width. The paged attention kernels of
vllm-xpu-kernels need Xe2 and take at most 8 query heads a call for latent attention, in pages of 64 or 128 tokens.
SYCL has no C host callback, so host work is ordered by events outside of graphs. The least able class comes first, so
that a default plan holds for all.
"""

from __future__ import annotations

from collections.abc import Sequence

from ktcore.backend import Capabilities

BASE = frozenset({"f32", "f16", "bf16", "int8_dot", "host_callback:none"})
FP8 = frozenset({"fp8:e4m3fn", "fp8:e5m2"})


def _class(arch: str, examples: str, widths: str, extra: frozenset[str] = frozenset(), **more: int) -> Capabilities:
    properties: dict[str, str | int | float] = {"arch": arch, "subgroups": widths, **more}
    return Capabilities("xpu", f"{arch} ({examples})", None, BASE | extra, properties)


DECLARED = (
    _class("alchemist", "Arc A770, A750", "8,16,32"),
    _class("battlemage", "Arc B580, B60", "16,32", FP8, fp8_max=448, mla_page_size=64, mla_heads_per_call=8),
    _class("pvc", "Data Center GPU Max", "16,32", FP8 | {"f64"}, fp8_max=448),
)


def live(name: str, memory: int, sub_group_sizes: Sequence[int], f64: bool) -> Capabilities:
    """Capabilities of a device from what its driver reports; the class is told by the marketing name.

    Args:
        memory: total bytes.
        sub_group_sizes: widths the driver lists.
        f64: whether it has double precision.
    """
    known = next((c for key, c in zip(_NAMES, _NAMED, strict=True) if key in name), None)
    features = (known.features if known is not None else BASE) | ({"f64"} if f64 else set())
    properties = dict(known.properties) if known is not None else {"arch": "unknown"}
    properties["subgroups"] = ",".join(str(size) for size in sub_group_sizes)
    return Capabilities("xpu", name, memory, features, properties, live=True)


_NAMES = ("Arc(TM) A", "Arc(TM) B", "Arc(TM) Pro B", "GPU Max")
_NAMED = (DECLARED[0], DECLARED[1], DECLARED[1], DECLARED[2])
