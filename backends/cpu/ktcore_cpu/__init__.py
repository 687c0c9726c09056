"""The host backend: quantised CPU kernels with run-time choice of instruction set, installed with ktcore itself.

`ExpertLayer` and `ExpertPool` are for other engines; they load on first use and need nothing of ktcore's own engine.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ktcore_cpu.expert_layer import ExpertLayer, ExpertPool, ExpertRun

__all__ = ["ExpertLayer", "ExpertPool", "ExpertRun"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'ktcore_cpu' has no attribute {name!r}")
    from ktcore_cpu import expert_layer

    return getattr(expert_layer, name)
