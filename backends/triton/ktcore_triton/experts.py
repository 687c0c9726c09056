"""Mixture of experts on the device: the router's choice, and the routed experts as grouped products."""

from __future__ import annotations

import torch
import triton

from ktcore.errors import BackendError
from ktcore.ops.moe import RouterSpec
from ktcore_triton.affine import AffineWeight
from ktcore_triton.dtypes import compute_type
from ktcore_triton.kernels.experts import experts_kernel, router_kernel
from ktcore_triton.tuning import LinearTiles

Blocks = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def route(logits: torch.Tensor, spec: RouterSpec, bias: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose experts from logits [T, experts] -> (ids int64 [T, k], weights float32 [T, k]); as `ktcore.ops.moe.route`.

    Of equal scores the lower id is chosen.
    """
    tokens, experts = logits.shape
    each = experts // spec.groups
    if experts != spec.experts or each * spec.groups != experts or spec.top_k > spec.groups_kept * each:
        raise BackendError(f"logits {list(logits.shape)} do not fit a router of {spec.top_k} of {spec.experts} experts")
    if not logits.is_contiguous():
        raise BackendError("the router's logits must be contiguous")
    ids = torch.empty((tokens, spec.top_k), dtype=torch.int64, device=logits.device)
    weights = torch.empty((tokens, spec.top_k), dtype=torch.float32, device=logits.device)
    if tokens:
        router_kernel[(tokens,)](
            logits, logits if bias is None else bias, ids, weights, experts, spec.renorm_eps, spec.scale,
            GROUPS=spec.groups, EACH=each, BLOCK_G=triton.next_power_of_2(spec.groups),
            BLOCK_E=triton.next_power_of_2(each), TOP_K=spec.top_k, BLOCK_K=triton.next_power_of_2(spec.top_k),
            KEPT=spec.groups_kept, SIGMOID=spec.score == "sigmoid", HAS_BIAS=bias is not None,
            TWO_BEST=spec.group_score == "top2_sum", RENORMALISE=spec.renormalise, ON_LOGITS=spec.on_logits,
            num_warps=1,
        )  # fmt: skip
    return ids, weights


def routed_experts(
    x: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    gate: AffineWeight,
    up: AffineWeight,
    down: AffineWeight,
    experts: int,
    *,
    tiles: LinearTiles | None = None,
    compute: torch.dtype | None = None,
) -> torch.Tensor:
    """Weighted sum over each token's experts, silu(gate) * up between them; as `ktcore.ops.moe.routed_experts`.

    Nothing is read back on the host. The sum's order is fixed: results do not depend on timing.

    Args:
        x: [T, hidden]; ids: int64 [T, k], negative for an expert that is elsewhere; weights: float32 [T, k].
        gate, up: [experts * intermediate, hidden]; down: [experts * hidden, intermediate]: the experts' rows one
            after another. Gate and up are of one format.

    Returns:
        [T, hidden] of x's type.
    """
    tokens, hidden = x.shape
    intermediate, k = down.cols, ids.shape[1]
    if (gate.rows, gate.cols, down.rows) != (experts * intermediate, hidden, experts * hidden):
        raise BackendError(f"weights of {experts} experts [{intermediate}, {hidden}] do not fit x {list(x.shape)}")
    if _layout(gate) != _layout(up) or gate.codes.shape != up.codes.shape:
        raise BackendError("gate and up must have the same shape and format")
    if not (x.is_contiguous() and weights.is_contiguous()):
        raise BackendError("x and the weights of the choice must be contiguous")
    if not tokens:
        return torch.empty_like(x)
    tiles = tiles or LinearTiles(16, 32)
    blocks = _blocks(ids, experts, tiles.block_m)
    between = torch.empty((tokens * k, intermediate), dtype=x.dtype, device=x.device)
    # rows of experts that are elsewhere are never written
    parts = torch.zeros((tokens * k, hidden), dtype=torch.float32, device=x.device)
    kind = compute or x.dtype
    _multiply(x, gate, up, weights, between, blocks, k, tiles, kind, intermediate)
    _multiply(between, down, None, weights, parts, blocks, 1, tiles, kind, hidden)
    return parts.view(tokens, k, hidden).sum(1).to(x.dtype)


def _multiply(
    x: torch.Tensor,
    weight: AffineWeight,
    up: AffineWeight | None,
    weights: torch.Tensor,
    out: torch.Tensor,
    blocks: Blocks,
    share: int,
    tiles: LinearTiles,
    compute: torch.dtype,
    n: int,
) -> None:
    order, experts, firsts, lasts = blocks
    other = up or weight
    experts_kernel[(triton.cdiv(n, tiles.block_n), experts.shape[0])](
        x, weight.codes, weight.scale, weight.scale if weight.offset is None else weight.offset,
        other.codes, other.scale, other.scale if other.offset is None else other.offset,
        weights, out, order, experts, firsts, lasts, n, weight.cols,
        BITS=weight.bits, ZERO=weight.zero, GROUP=weight.group, SPAN=weight.span,
        HAS_OFFSET=weight.offset is not None, BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n, SHARE=share,
        GATED=up is not None, COMPUTE=compute_type(compute), **tiles.launch.options(),
    )  # fmt: skip


def _blocks(ids: torch.Tensor, experts: int, block: int) -> Blocks:
    """Pairs (token, choice) sorted by expert, and for each block of one expert: the expert, its first and last pair.

    There are as many blocks as there could be at most, so that no length is needed on the host; spare ones are empty.
    """
    flat = ids.flatten()
    flat = torch.where(flat < 0, experts, flat)
    order = torch.argsort(flat, stable=True)
    counts = torch.zeros(experts + 1, dtype=torch.int64, device=ids.device)
    counts.scatter_add_(0, flat, torch.ones_like(flat))
    starts = counts.cumsum(0) - counts
    held = counts[:experts]
    ends = ((held + block - 1) // block).cumsum(0)
    most = min(flat.numel(), flat.numel() // block + experts)
    index = torch.arange(most, device=ids.device)
    expert = torch.searchsorted(ends, index, right=True)
    spare = expert == experts
    expert = expert.clamp(max=experts - 1)
    begun = ends[expert] - (held[expert] + block - 1) // block
    first = starts[expert] + (index - begun) * block
    last = torch.where(spare, 0, torch.minimum(first + block, starts[expert] + held[expert]))
    return order.int(), expert.int(), first.int(), last.int()


def _layout(weight: AffineWeight) -> tuple[object, ...]:
    return weight.bits, weight.group, weight.zero, weight.span, weight.offset is None
