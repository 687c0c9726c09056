"""ktcore runs mixture-of-experts language models that are bigger than the GPU, on whatever accelerator there is.

Importing this package imports no vendor library and starts nothing; the public names load on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ktcore.backend import Backend, BackendSpec
    from ktcore.engine.model import Model, load
    from ktcore.errors import KtcoreError
    from ktcore.ops.sampling import SamplingParams
    from ktcore.rules.plan import Plan

__version__ = "0.1.0"

_HOME = {
    "load": "ktcore.engine.model",
    "Model": "ktcore.engine.model",
    "Plan": "ktcore.rules.plan",
    "Backend": "ktcore.backend",
    "BackendSpec": "ktcore.backend",
    "SamplingParams": "ktcore.ops.sampling",
    "KtcoreError": "ktcore.errors",
}

__all__ = ["Backend", "BackendSpec", "KtcoreError", "Model", "Plan", "SamplingParams", "__version__", "load"]


def __dir__() -> list[str]:
    return sorted(__all__)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'ktcore' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
