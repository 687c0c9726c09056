"""The XPU backend's own kernels: SYCL source, compiled when first used by the SYCL runtime that torch brings."""

from __future__ import annotations

from ktcore.backend import Implementation


def implementations() -> list[Implementation]:
    """One implementation "xpu.sycl_<operator>" of every operator that the SYCL kernels cover."""
    from ktcore_xpu.sycl.cache import SyclKVCache
    from ktcore_xpu.sycl.moe import SyclExperts, SyclRouter
    from ktcore_xpu.sycl.operators import SyclLinear

    return [SyclLinear(), SyclKVCache(), SyclRouter(), SyclExperts()]
