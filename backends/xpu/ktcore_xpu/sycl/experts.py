"""Mixture of experts by SYCL kernels: the router's choice, and the routed experts of few tokens."""

from __future__ import annotations

import torch
from ktcore_triton.affine import AffineWeight

from ktcore.errors import BackendError
from ktcore.ops.moe import RouterSpec
from ktcore_xpu.sycl.launcher import LANES, Launcher
from ktcore_xpu.sycl.linear import ROWS, check, macros, parts


def route(
    launcher: Launcher, logits: torch.Tensor, spec: RouterSpec, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose experts from float32 logits [T, experts] -> (ids int64 [T, k], weights float32 [T, k]).

    As `ktcore.ops.moe.route`; of equal scores the lower id is chosen.
    """
    tokens, experts = logits.shape
    each = experts // spec.groups
    if experts != spec.experts or each * spec.groups != experts or spec.top_k > experts:
        raise BackendError(f"logits {list(logits.shape)} do not fit a router of {spec.top_k} of {spec.experts} experts")
    ids = torch.empty((tokens, spec.top_k), dtype=torch.int64, device=logits.device)
    weights = torch.empty((tokens, spec.top_k), dtype=torch.float32, device=logits.device)
    kernel = launcher.kernel(
        "router.cpp", "route", EXPERTS=experts, GROUPS=spec.groups, KEPT=spec.groups_kept, TOP=spec.top_k,
        SIGMOID=spec.score == "sigmoid", TWO_BEST=spec.group_score == "top2_sum", RENORMALISE=spec.renormalise,
        ON_LOGITS=spec.on_logits,
    )  # fmt: skip
    launcher.launch(
        kernel, (1, 1, tokens), LANES, logits, bias, ids, weights, float(spec.renorm_eps), float(spec.scale)
    )
    return ids, weights


def routed_experts(
    launcher: Launcher,
    x: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    gate: AffineWeight,
    up: AffineWeight,
    down: AffineWeight,
    experts: int,
) -> torch.Tensor:
    """Weighted sum over each token's experts, silu(gate) * up between them; as `ktcore.ops.moe.routed_experts`.

    Args:
        x: float32 [T, hidden]; ids: int64 [T, k], negative for an expert that is elsewhere; weights: float32 [T, k].
        gate, up: [experts * intermediate, hidden]; down: [experts * hidden, intermediate]: the experts' rows one
            after another. Gate and up are of one format.

    Returns:
        float32 [T, hidden]; the order of its sums does not depend on timing.
    """
    check(x, gate)
    tokens, hidden = x.shape
    intermediate, k = down.cols, ids.shape[1]
    if (gate.rows, gate.cols, down.rows) != (experts * intermediate, hidden, experts * hidden):
        raise BackendError(f"weights of {experts} experts [{intermediate}, {hidden}] do not fit x {list(x.shape)}")
    if macros(gate) != macros(up) or gate.codes.shape != up.codes.shape:
        raise BackendError("gate and up must have the same shape and format")
    between = torch.empty((tokens * k, intermediate), dtype=torch.float32, device=x.device)
    check(between, down)
    y = torch.empty((tokens, hidden), dtype=torch.float32, device=x.device)
    first = launcher.kernel("experts.cpp", "experts_in", X="float", ROWS=ROWS, **macros(gate))
    launcher.launch(
        first, (1, tokens * k, -(-intermediate // ROWS)), ROWS * LANES,
        x, ids, *parts(gate), *parts(up), between, k, intermediate, hidden,
    )  # fmt: skip
    second = launcher.kernel("experts.cpp", "experts_out", X="float", ROWS=ROWS, **macros(down))
    launcher.launch(
        second, (1, tokens, -(-hidden // ROWS)), ROWS * LANES,
        between, ids, weights, *parts(down), y, k, hidden, intermediate,
    )  # fmt: skip
    return y
