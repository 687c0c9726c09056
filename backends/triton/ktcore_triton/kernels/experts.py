"""The router's choice, and products of token groups with their experts' weights in the affine group layout."""

import triton
import triton.language as tl

from ktcore_triton.kernels.linear import affine_product

# minimum, maximum and clamp give the other operand for NaN unless told so
NAN_STAYS = tl.constexpr(tl.PropagateNan.ALL)


@triton.jit
def router_kernel(
    logits, bias, ids, weights, experts, renorm_eps, scale,
    GROUPS: tl.constexpr, EACH: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_E: tl.constexpr,
    TOP_K: tl.constexpr, BLOCK_K: tl.constexpr, KEPT: tl.constexpr, SIGMOID: tl.constexpr, HAS_BIAS: tl.constexpr,
    TWO_BEST: tl.constexpr, RENORMALISE: tl.constexpr, ON_LOGITS: tl.constexpr,
):  # fmt: skip
    """One token a program; experts lie as [groups, experts of a group]. Equal scores: the lower id first."""
    row = tl.program_id(0).to(tl.int64)
    group = tl.arange(0, BLOCK_G)
    within = tl.arange(0, BLOCK_E)
    expert = group[:, None] * EACH + within[None, :]
    there = (group < GROUPS)[:, None] & (within < EACH)[None, :]
    x = tl.load(logits + row * experts + expert, mask=there, other=float("-inf")).to(tl.float32)
    if ON_LOGITS:
        score = x
    elif SIGMOID:
        score = 1 / (1 + tl.exp(-x))
    else:
        e = tl.exp(x - tl.max(tl.max(x, 1), 0))
        score = e / tl.sum(tl.sum(e, 1), 0)
    choice = score
    if HAS_BIAS:
        choice += tl.load(bias + expert, mask=there, other=0.0).to(tl.float32)
    choice = tl.where(there, choice, float("-inf"))

    if KEPT < GROUPS:
        best = tl.max(choice, 1)
        if TWO_BEST:
            first = tl.min(tl.where(choice == best[:, None], within[None, :], BLOCK_E), 1)
            best += tl.max(tl.where(within[None, :] == first[:, None], float("-inf"), choice), 1)
        kept = tl.zeros((BLOCK_G,), dtype=tl.int32)
        left = group < GROUPS
        for _ in tl.static_range(KEPT):
            at = tl.min(tl.where(left & (best == tl.max(tl.where(left, best, float("-inf")), 0)), group, BLOCK_G), 0)
            at = tl.where(at == BLOCK_G, tl.min(tl.where(left, group, BLOCK_G), 0), at)
            kept = tl.where(group == at, 1, kept)
            left = left & (group != at)
        hidden = float("-inf") if TWO_BEST else 0.0
        choice = tl.where((kept == 0)[:, None] & there, hidden, choice)

    place = tl.arange(0, BLOCK_K)
    chosen = tl.zeros((BLOCK_K,), dtype=tl.int64)
    values = tl.full((BLOCK_K,), float("-inf") if ON_LOGITS else 0.0, dtype=tl.float32)
    # marked apart from the scores: what is left may be -inf, or not a number, and then the lowest is taken
    free = there
    for k in tl.static_range(TOP_K):
        best = tl.max(tl.max(tl.where(free, choice, float("-inf")), 1), 0)
        at = tl.min(tl.min(tl.where(free & (choice == best), expert, GROUPS * EACH), 1), 0)
        at = tl.where(at == GROUPS * EACH, tl.min(tl.min(tl.where(free, expert, GROUPS * EACH), 1), 0), at)
        value = tl.sum(tl.sum(tl.where(expert == at, tl.where(there, score, 0.0), 0.0), 1), 0)
        chosen = tl.where(place == k, at, chosen)
        values = tl.where(place == k, value, values)
        free = free & (expert != at)
    if ON_LOGITS:
        if SIGMOID:
            values = 1 / (1 + tl.exp(-values))
        else:
            values = tl.exp(values - tl.max(values, 0))
            values = values / tl.sum(values, 0)
    if RENORMALISE:
        values = values / (tl.sum(values, 0) + renorm_eps)
    tl.store(ids + row * TOP_K + place, chosen, mask=place < TOP_K)
    tl.store(weights + row * TOP_K + place, values * scale, mask=place < TOP_K)


@triton.jit
def gated(gate, up, alpha, limit, plus, ACTIVATION: tl.constexpr):
    """act(gate) * up in float32, or a form of it within a limit (`ktcore.ops.mlp.ClampedGLU`); NaN stays."""
    if ACTIVATION == "clamped":
        gate = tl.minimum(gate, limit, propagate_nan=NAN_STAYS)
        up = tl.clamp(up, -limit, limit, propagate_nan=NAN_STAYS)
        result = gate / (1 + tl.exp(-alpha * gate)) * (up + plus)
    elif ACTIVATION == "clamped_after":
        gate = tl.minimum(gate / (1 + tl.exp(-alpha * gate)), limit, propagate_nan=NAN_STAYS)
        result = gate * (tl.clamp(up, -limit, limit, propagate_nan=NAN_STAYS) + plus)
    elif ACTIVATION == "relu":
        result = tl.maximum(gate, 0.0, propagate_nan=NAN_STAYS) * up
    elif ACTIVATION == "gelu_tanh":
        # 0.5 (1 + tanh z) = sigmoid(2 z)
        z = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
        result = gate / (1 + tl.exp(-2 * z)) * up
    else:
        result = gate / (1 + tl.exp(-gate)) * up
    return result


@triton.jit
def experts_kernel(
    x, codes, scale, offset, over, up_codes, up_scale, up_offset, up_over, bias, up_bias, weights, out,
    order, experts, firsts, lasts, n, cols, alpha, limit, plus,
    BITS: tl.constexpr, ZERO: tl.constexpr, GROUP: tl.constexpr, SPAN: tl.constexpr, HAS_OFFSET: tl.constexpr,
    SCALES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SHARE: tl.constexpr, GATED: tl.constexpr, COMPUTE: tl.constexpr,
    FLOAT8: tl.constexpr, HAS_BIAS: tl.constexpr, WEIGHED: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """Rows order[firsts[b] .. lasts[b]] of `out` [pairs, n] for block b of one expert. Grid: (n blocks, blocks).

    Pair p reads row p // SHARE of x. With y = x weight.T, WEIGHED: times weights[p] (before the bias of a
    gated product, whose input is meant, after that of the last one): y + bias, or GATED: act(y + bias) * (up's alike),
    where ACTIVATION is "silu", "relu", "gelu_tanh", "clamped" or "clamped_after" (`ktcore.ops.mlp.ClampedGLU`).
    """
    block = tl.program_id(1)
    first = tl.load(firsts + block)
    last = tl.load(lasts + block)
    if first < last:
        place = first + tl.arange(0, BLOCK_M)
        there = place < last
        pair = tl.load(order + place, mask=there, other=0).to(tl.int64)
        column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
        row = tl.load(experts + block).to(tl.int64) * n + tl.minimum(column, n - 1)
        rows = x + pair // SHARE * cols
        zero = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        total = affine_product(
            zero, rows, there, codes, scale, offset, over, row, cols, 0, cols,
            BITS, ZERO, GROUP, SPAN, BLOCK_N, HAS_OFFSET, SCALES, COMPUTE, FLOAT8,
        )  # fmt: skip
        if GATED:
            up = affine_product(
                zero, rows, there, up_codes, up_scale, up_offset, up_over, row, cols, 0, cols,
                BITS, ZERO, GROUP, SPAN, BLOCK_N, HAS_OFFSET, SCALES, COMPUTE, FLOAT8,
            )  # fmt: skip
            if WEIGHED:
                weight = tl.load(weights + pair, mask=there, other=0.0).to(tl.float32)[:, None]
                total *= weight
                up *= weight
            if HAS_BIAS:
                total += tl.load(bias + row).to(tl.float32)[None, :]
                up += tl.load(up_bias + row).to(tl.float32)[None, :]
            total = gated(total, up, alpha, limit, plus, ACTIVATION)
        else:
            if HAS_BIAS:
                total += tl.load(bias + row).to(tl.float32)[None, :]
            if WEIGHED:
                total *= tl.load(weights + pair, mask=there, other=0.0).to(tl.float32)[:, None]
        at = pair[:, None] * n + column[None, :]
        tl.store(out + at, total.to(out.dtype.element_ty), mask=there[:, None] & (column < n)[None, :])
