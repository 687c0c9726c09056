"""One typical call of every operator, for the properties that all of them must have."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ktcore.conformance.case import Context
from ktcore.conformance.data.batches import batches, scattered
from ktcore.conformance.data.memory import make_weights
from ktcore.conformance.levels.operator import any_format, normal
from ktcore.conformance.levels.specs import attention, experts, linear, mla, mlp, moe, norm, router_v3
from ktcore.conformance.target import Loaded
from ktcore.ops import EmbeddingSpec, KVCacheSpec, RopeSpec, Spec
from ktcore.weights.ref import Weight

TOKENS = 6


@dataclass(frozen=True)
class Subject:
    """An operator with inputs.

    Attributes:
        rows: argument tensors whose first axis is the tokens; None for operators that need a step.
    """

    spec: Spec
    weights: Mapping[str, Weight]
    rows: tuple[torch.Tensor, ...] | None = None
    hidden: int = 0


def subject(ctx: Context, op: str, what: str = "") -> Subject:
    """The typical call of `op`; another `what` gives other weights and inputs of the same shapes."""
    spec, rows = _MAKERS[op](ctx, ctx.rng(f"inputs {what}"))
    return Subject(spec, make_weights(spec, ctx.rng(f"weights {what}")), rows, getattr(spec, "hidden", 0))


OPERATORS = (
    "embedding",
    "linear",
    "rms_norm",
    "rope",
    "attention",
    "mla",
    "mlp",
    "router",
    "experts",
    "moe",
    "kv_cache",
)


def run(ctx: Context, loaded: Loaded, given: Subject, salt: str = "") -> torch.Tensor:
    """All that the call gives, as one tensor on the CPU."""
    if given.rows is not None:
        return flat(ctx.target.call(loaded.module, *given.rows))
    plan = scattered(((3, 5), (1, 1), (1, 1)), loaded.page_sizes[0], ctx.rng(f"pages {salt}"))
    loaded.allocate(plan.pages, plan.page_size)
    rng, out = ctx.rng(f"steps {salt}"), []
    for step, _ in batches(plan):
        if isinstance(given.spec, KVCacheSpec):
            spec = given.spec
            k, v = (normal(rng, step.tokens, spec.kv_heads, spec.key_dim) for _ in range(2))
            ctx.target.call(loaded.module.append, step, k, v)
            q = normal(rng, step.tokens, spec.heads, spec.key_dim)
            out.append(ctx.target.call(loaded.module.attend, step, q, 0.125))
        else:
            out.append(ctx.target.call(loaded.module, normal(rng, step.tokens, given.hidden), step))
    return torch.cat(out)


def flat(result: Any) -> torch.Tensor:
    """A result, or a tuple of them, as one tensor [tokens, ...]."""
    if isinstance(result, tuple):
        return torch.cat([r.flatten(1).double() for r in result], 1)
    tensor: torch.Tensor = result
    return tensor


Made = tuple[Spec, tuple[torch.Tensor, ...] | None]


def _embedding(ctx: Context, rng: np.random.Generator) -> Made:
    spec = EmbeddingSpec(64, 256, any_format(ctx, lambda f: EmbeddingSpec(64, 256, f)))
    return spec, (torch.from_numpy(rng.integers(0, 64, TOKENS)),)


def _linear(ctx: Context, rng: np.random.Generator) -> Made:
    return linear(256, 96, any_format(ctx, lambda f: linear(256, 96, f))), (normal(rng, TOKENS, 256),)


def _norm(ctx: Context, rng: np.random.Generator) -> Made:
    return norm(256), (normal(rng, TOKENS, 256),)


def _rope(ctx: Context, rng: np.random.Generator) -> Made:
    return RopeSpec(64, 1e4, "half"), (normal(rng, TOKENS, 3, 64), torch.from_numpy(rng.integers(0, 4000, TOKENS)))


def _mlp(ctx: Context, rng: np.random.Generator) -> Made:
    return mlp(256, 256, any_format(ctx, lambda f: mlp(256, 256, f))), (normal(rng, TOKENS, 256),)


def _router(ctx: Context, rng: np.random.Generator) -> Made:
    return router_v3(256, 32, 4), (normal(rng, TOKENS, 256),)


def _experts(ctx: Context, rng: np.random.Generator) -> Made:
    spec = experts(8, 3, 256, 256, any_format(ctx, lambda f: experts(8, 3, 256, 256, f)))
    ids = np.stack([rng.permutation(8)[:3] for _ in range(TOKENS)])
    return spec, (normal(rng, TOKENS, 256), torch.from_numpy(ids), torch.rand(TOKENS, 3, generator=_torch(rng)))


def _moe(ctx: Context, rng: np.random.Generator) -> Made:
    return moe(256, 8, 2, 256, any_format(ctx, lambda f: moe(256, 8, 2, 256, f))), (normal(rng, TOKENS, 256),)


def _attention(ctx: Context, rng: np.random.Generator) -> Made:
    return attention(4, 2, 64, any_format(ctx, lambda f: attention(4, 2, 64, f))), None


def _mla(ctx: Context, rng: np.random.Generator) -> Made:
    return mla(4, any_format(ctx, lambda f: mla(4, f, latent=256)), latent=256), None


def _kv_cache(ctx: Context, rng: np.random.Generator) -> Made:
    return KVCacheSpec("gqa", 4, 2, 64, 64), None


def _torch(rng: np.random.Generator) -> torch.Generator:
    return torch.Generator().manual_seed(int(rng.integers(2**31)))


_MAKERS: dict[str, Callable[[Context, np.random.Generator], Made]] = {
    "embedding": _embedding,
    "linear": _linear,
    "rms_norm": _norm,
    "rope": _rope,
    "attention": _attention,
    "mla": _mla,
    "mlp": _mlp,
    "router": _router,
    "experts": _experts,
    "moe": _moe,
    "kv_cache": _kv_cache,
}
