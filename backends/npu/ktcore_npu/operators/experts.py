"""Routed experts that a rule makes resident: sort tokens by expert, two grouped products, add up what comes back.

`npu_moe_init_routing_v2` -> rows sorted by expert and their number each; `npu_grouped_matmul` (all tensor arguments are
lists; `split_item` 2, `group_type` 0, `group_list_type` 1 for counts; weights [E, K, N] in 16 bits, or int32 [E, K,
N / 8] with scales and offsets [E, K / g, N]); `npu_swiglu`; `npu_moe_token_unpermute`. Of the two operators that add
up, `npu_moe_finalize_routing` is left out: it is documented for Atlas A2 alone, and vllm-ascend avoids it for its
accuracy (`ops/fused_moe/moe_comm_method.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch

from ktcore.backend import Capabilities, LoadRequest, Module, Supported, Unsupported
from ktcore.backend.loading import compute_dtype
from ktcore.ops.moe import ExpertsSpec
from ktcore.weights.ref import Weight
from ktcore_npu.operators.base import HALF_BYTES, NpuImplementation, npu
from ktcore_npu.operators.codes import code_layout, signed_codes
from ktcore_npu.operators.linear import pack_int4

MOST_GROUPS, WIDEST = 1024, 65535


class NpuExperts(NpuImplementation):
    """4-bit codes stay quantised (8-bit ones in groups are not taken by the grouped product); all others 16 bits."""

    spec_type = ExpertsSpec
    options = frozenset({"compute"})

    def supports(self, spec: ExpertsSpec, device: Capabilities) -> Supported | Unsupported:
        """SwiGLU without biases, of documented sizes."""
        if spec.activation != "silu":
            return Unsupported(f"activation {spec.activation}: the operator is SwiGLU")
        if spec.experts > MOST_GROUPS:
            return Unsupported(f"{spec.experts} experts: npu_grouped_matmul takes {MOST_GROUPS} groups")
        if max(spec.hidden, 2 * spec.intermediate) > WIDEST:
            return Unsupported(f"products of {max(spec.hidden, 2 * spec.intermediate)}: below {WIDEST + 1}")
        return super().supports(spec, device)

    def load(self, request: LoadRequest) -> Module:
        """Expert by expert: the host holds one at a time."""
        spec, runtime = cast(ExpertsSpec, request.spec), npu(request)
        ops, compute = runtime.ops, compute_dtype(request)
        wide = _bank(request, ("gate", "up"), compute)
        down = _bank(request, ("down",), compute)

        def run(x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
            elsewhere = ids < 0
            chosen = ids.clamp(min=0).int().contiguous()
            rows, places, counts, _ = ops.npu_moe_init_routing_v2(
                x.to(compute).contiguous(),
                chosen,
                active_num=chosen.numel(),
                expert_num=spec.experts,
                drop_pad_mode=0,
                expert_tokens_num_type=1,
                expert_tokens_num_flag=True,
                quant_mode=-1,
                active_expert_range=[0, spec.experts],
                row_idx_type=0,
            )
            y = down.product(ops, ops.npu_swiglu(wide.product(ops, rows, counts), dim=-1), counts)
            # an expert that lives elsewhere counts nothing here
            shares = weights.float().masked_fill(elsewhere, 0.0)
            return cast(torch.Tensor, ops.npu_moe_token_unpermute(y.float(), places, probs=shares))

        return run

    def packed_bytes(self, spec: ExpertsSpec, stored_bytes: int) -> int:
        """Of the codes and scales, or two bytes a value."""
        a_matrix = spec.experts * spec.intermediate * spec.hidden
        wide = _bytes((spec.gate_format, spec.up_format), 2 * a_matrix, spec.intermediate, spec.hidden)
        return wide + _bytes((spec.down_format,), a_matrix, spec.hidden, spec.intermediate)


@dataclass(frozen=True)
class Bank:
    """The matrices of all experts: [E, K, N] in 16 bits, or packed codes with scale and offset [E, K / g, N]."""

    weight: torch.Tensor
    scale: torch.Tensor | None = None
    offset: torch.Tensor | None = None

    def product(self, ops: Any, rows: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        """Rows sorted by expert, `counts` of each, through their expert's matrix."""
        quantised = {} if self.scale is None else {"antiquant_scale": [self.scale], "antiquant_offset": [self.offset]}
        found = ops.npu_grouped_matmul(
            [rows], [self.weight], **quantised, group_list=counts, split_item=2, group_type=0, group_list_type=1
        )
        return cast(torch.Tensor, found[0])


def _bank(request: LoadRequest, roles: tuple[str, ...], compute: torch.dtype) -> Bank:
    """Matrices of several roles side by side, [K, N of all]."""
    stored = [request.weights[role] for role in roles]
    device, ops = request.runtime.device, npu(request).ops
    experts, out, _ = stored[0].shape
    if not _quantised(tuple(w.format for w in stored), out):
        parts = [torch.cat([w.part(e).tensor() for w in stored]).t().to(compute) for e in range(experts)]
        return Bank(torch.stack([p.contiguous() for p in parts]).to(device))
    codes, scales, offsets = zip(*(_codes(stored, e) for e in range(experts)), strict=True)
    return Bank(
        torch.stack([pack_int4(ops, c, device) for c in codes]),
        torch.stack(scales).to(compute).to(device),
        torch.stack(offsets).to(compute).to(device),
    )


def _codes(stored: list[Weight], expert: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes [K, N], scale and offset [K / g, N] of one expert, roles side by side; offsets are wanted, so zeros too."""
    found = [signed_codes(w.format, w.part(expert).raw(), w.shape[1]) for w in stored]
    offsets = [torch.zeros_like(f.scale) if f.offset is None else f.offset for f in found]
    sides = ([f.codes for f in found], [f.scale for f in found], offsets)
    codes, scale, offset = (torch.cat(side).t().contiguous() for side in sides)
    return codes, scale, offset


def _quantised(formats: tuple[str, ...], out: int) -> bool:
    layout = code_layout(formats[0])
    ordered = any(name.endswith("_ORDERED") for name in formats)
    return layout is not None and layout[0] == 4 and len(set(formats)) == 1 and out % 8 == 0 and not ordered


def _bytes(formats: tuple[str, ...], values: int, out: int, inner: int) -> int:
    if not _quantised(formats, out):
        return HALF_BYTES * values
    _, group = code_layout(formats[0]) or (4, 1)
    return values // 2 + 2 * HALF_BYTES * values // group
