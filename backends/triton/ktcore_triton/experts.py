"""Mixture of experts on the device: the router's choice, and the routed experts as grouped products."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton

from ktcore.errors import BackendError
from ktcore.ops.mlp import ClampedGLU
from ktcore.ops.moe import RouterSpec
from ktcore_triton.affine import AffineWeight
from ktcore_triton.dtypes import compute_type
from ktcore_triton.kernels.experts import experts_kernel, router_kernel
from ktcore_triton.tuning import LinearTiles

Blocks = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
ACTIVATIONS = frozenset({"silu", "relu", "gelu_tanh"})


@dataclass(frozen=True)
class Between:
    """What happens around the products; as in `ktcore.ops.moe.ExpertsSpec`.

    Attributes:
        activation: one of `ACTIVATIONS`; without meaning where `clamped` is set.
        biases: of gate and up [experts * intermediate] and of down [experts * hidden], contiguous.
    """

    activation: str = "silu"
    clamped: ClampedGLU | None = None
    weight_on_input: bool = False
    biases: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None


SWIGLU = Between()


def route(logits: torch.Tensor, spec: RouterSpec, bias: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose experts from logits [T, experts] -> (ids int64 [T, k], weights float32 [T, k]); as `ktcore.ops.moe.route`.

    Of equal scores the lower id is chosen.
    """
    tokens, experts = logits.shape
    each = experts // spec.groups
    if experts != spec.experts or each * spec.groups != experts or spec.top_k > experts:
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
    between: Between = SWIGLU,
    tiles: LinearTiles | None = None,
    compute: torch.dtype | None = None,
) -> torch.Tensor:
    """Weighted sum over a token's experts, silu(gate) * up or what `between` says; as `ktcore.ops.moe.routed_experts`.

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
    _check(between, experts, intermediate, hidden)
    if not (x.is_contiguous() and weights.is_contiguous()):
        raise BackendError("x and the weights of the choice must be contiguous")
    if not tokens:
        return torch.empty_like(x)
    tiles = tiles or LinearTiles(16, 32)
    blocks = _blocks(ids, experts, tiles.block_m)
    inner = torch.empty((tokens * k, intermediate), dtype=x.dtype, device=x.device)
    # rows of experts that are elsewhere are never written
    parts = torch.zeros((tokens * k, hidden), dtype=torch.float32, device=x.device)
    kind = compute or x.dtype
    _multiply(x, gate, up, weights, inner, blocks, k, tiles, kind, intermediate, between)
    _multiply(inner, down, None, weights, parts, blocks, 1, tiles, kind, hidden, between)
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
    between: Between,
) -> None:
    order, experts, firsts, lasts = blocks
    other, gated, clamped = up or weight, up is not None, between.clamped or ClampedGLU(1.0, 0.0)
    bias, up_bias, down_bias = between.biases or (weights, weights, weights)
    experts_kernel[(triton.cdiv(n, tiles.block_n), experts.shape[0])](
        x, *_pointers(weight), *_pointers(other),
        bias if gated else down_bias, up_bias, weights, out, order, experts, firsts, lasts, n, weight.cols,
        clamped.alpha, clamped.limit, clamped.plus,
        BITS=weight.bits, ZERO=weight.zero, GROUP=weight.group, SPAN=weight.span,
        HAS_OFFSET=weight.offset is not None, SCALES=weight.scales,
        BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n, SHARE=share, GATED=gated, COMPUTE=compute_type(compute),
        FLOAT8=weight.float8, HAS_BIAS=between.biases is not None,
        WEIGHED=between.weight_on_input == gated, ACTIVATION=_activation(between),
        **tiles.launch.options(),
    )  # fmt: skip


def _activation(between: Between) -> str:
    """The kernel's name of it."""
    if between.clamped is None:
        return between.activation
    return "clamped_after" if between.clamped.after else "clamped"


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


def _check(between: Between, experts: int, intermediate: int, hidden: int) -> None:
    if between.activation not in ACTIVATIONS and between.clamped is None:
        raise BackendError(f"experts have {', '.join(sorted(ACTIVATIONS))} or a clamped GLU, not {between.activation}")
    wanted = [experts * intermediate, experts * intermediate, experts * hidden]
    if between.biases is not None and [b.numel() for b in between.biases] != wanted:
        found = [list(b.shape) for b in between.biases]
        raise BackendError(f"biases {found} of gate, up and down; {wanted} values are needed")
    if between.biases is not None and not all(b.is_contiguous() for b in between.biases):
        raise BackendError("the experts' biases must be contiguous")


def _pointers(weight: AffineWeight) -> tuple[torch.Tensor, ...]:
    """Codes, scale, offset and over; the scale where a weight has none of the last two."""
    rest = (weight.scale if t is None else t for t in (weight.offset, weight.over))
    return weight.codes, weight.scale, *rest


def _layout(weight: AffineWeight) -> tuple[object, ...]:
    return weight.bits, weight.group, weight.zero, weight.span, weight.offset is None, weight.float8, weight.scales
