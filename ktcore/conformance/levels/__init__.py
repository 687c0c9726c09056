"""The cases, one module a subject. Every module has a function `cases()`; `all_cases` puts them in order."""

from __future__ import annotations

from collections import Counter
from importlib import import_module

from ktcore.conformance.case import Case

_MODULES = (
    "l0_packaging",
    "l0_implementations",
    "l1_copies",
    "l1_streams",
    "l1_memory",
    "l1_launches",
    "l2_embedding",
    "l2_linear",
    "l2_norm",
    "l2_rope",
    "l2_kv_cache",
    "l2_attention",
    "l2_mla",
    "l2_mlp",
    "l2_router",
    "l2_experts",
    "l2_moe",
    "l2_sampling",
    "l2_nonfinite",
    "l2_properties",
    "l3_attention",
    "l3_optional",
    "l3_delta_net",
    "l3_sparse",
    "l3_pooled",
    "l3_compressed",
    "l3_routers",
    "l3_streams",
    "l3_blocks",
    "l3_ngram",
    "l3_pages",
    "l4_handoff",
    "l4_models",
    "l5_figures",
)


def all_cases() -> list[Case]:
    """Every case of the kit, by level.

    Raises:
        ValueError: two cases have the same id.
    """
    found = [case for name in _MODULES for case in import_module(f"{__name__}.{name}").cases()]
    twice = [i for i, n in Counter(c.id for c in found).items() if n > 1]
    if twice:
        raise ValueError(f"two cases have the id {twice[0]}")
    return found


def select(cases: list[Case], level: int | None = None, ids: list[str] | None = None) -> list[Case]:
    """Cases up to a level, or those with the given ids (patterns with `*` too).

    Raises:
        ValueError: a pattern matches no case.
    """
    from fnmatch import fnmatchcase

    if ids:
        for pattern in ids:
            if not any(fnmatchcase(c.id, pattern) for c in cases):
                raise ValueError(f"no case is called {pattern!r}; list them with: ktcore conformance run --list")
        return [c for c in cases if any(fnmatchcase(c.id, p) for p in ids)]
    return [c for c in cases if level is None or c.level <= level]
