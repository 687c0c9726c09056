"""Device classes that plans can be made for without hardware, and how a live device is described.

Atlas A2 is the 910B, Atlas A3 the 910C; neither has FP8. Latent attention takes a power of two of heads up to 128 and
pages that are a multiple of 16 tokens, 128 being usual (op-plugin, `npu_fused_infer_attention_score`). The latent
cache is two tensors, 512 and 64 wide.
"""

from __future__ import annotations

from ktcore.backend import Capabilities

FEATURES = frozenset({"f32", "f16", "bf16", "int8_dot", "host_callback:capturable", "graph:capture", "mla_cache:split"})


def _class(arch: str, family: str) -> Capabilities:
    properties: dict[str, str | int | float] = {
        "arch": arch,
        "family": family,
        "mla_page_size": 128,
        "mla_heads_per_call": 128,
    }
    return Capabilities("npu", f"{arch} ({family})", None, FEATURES, properties)


DECLARED = (_class("Ascend910B", "Atlas A2"), _class("Ascend910C", "Atlas A3"))


def live(name: str, memory: int) -> Capabilities:
    """Capabilities of a device from its name ("Ascend910B3", "Ascend910_9392" for the 910C) and total bytes."""
    # the driver calls 910C devices Ascend910_93xx
    arch = "Ascend910C" if name.startswith("Ascend910_93") else name[:10]
    known = next((c for c in DECLARED if c.properties["arch"] == arch), None)
    if known is None:
        return Capabilities("npu", name, memory, frozenset({"f32", "f16"}), {"arch": name}, live=True)
    return Capabilities("npu", name, memory, known.features, known.properties, live=True)
