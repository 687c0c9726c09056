"""Linear projection: int4 and int8 weights through `npu_weight_quant_batchmatmul`, all others as NZ matrices.

`npu_weight_quant_batchmatmul(x, weight, antiquant_scale, antiquant_offset, quant_scale, quant_offset, bias,
antiquant_group_size, inner_precise)` (op-plugin `torch_npu-npu_weight_quant_batchmatmul.md`): x [M, K] float16 or
bfloat16; weight [K, N] int8, or int32 [K, N / 8] from `npu_convert_weight_to_int4pack`; scale and offset [K / g, N] in
x's type, g a multiple of 32 below K, or one a column with g = 0; K and N up to 65535; bias float32 beside bfloat16,
float16 beside float16. In eager mode the weight stays ND.
"""

from __future__ import annotations

from typing import Any, cast

import torch

from ktcore.backend import LoadRequest, Module
from ktcore.backend.loading import compute_dtype, on_device, optional
from ktcore.backend.mirror import upload
from ktcore.ops.linear import LinearSpec
from ktcore_npu.operators.base import FLOAT_BYTES, FRACTAL_NZ, HALF_BYTES, ND, NpuImplementation, npu
from ktcore_npu.operators.codes import code_layout, signed_codes

WIDEST = 65535
PIECE = 1 << 24
"""Codes that lie in 32 bits at once while they are packed."""


class NpuLinear(NpuImplementation):
    """INT4_G*, INT8_G*, Q4_0 and Q8_0 stay quantised. All others, FP8 among them, which neither chip has, are
    dequantised to 16 bits (`packed_bytes` says so); float32 stays float32."""

    spec_type = LinearSpec
    handles = frozenset({"bias"})
    options = frozenset({"compute"})

    def load(self, request: LoadRequest) -> Module:
        """Repack, or convert."""
        spec = cast(LinearSpec, request.spec)
        return Quantised(request) if fits(spec.weight_format, spec.out_features, spec.in_features) else Plain(request)

    def packed_bytes(self, spec: LinearSpec, stored_bytes: int) -> int:
        """Of codes, scales and offsets, or two bytes a value."""
        out, inner = spec.out_features, spec.in_features
        bias = FLOAT_BYTES * out * spec.bias
        if not fits(spec.weight_format, out, inner):
            return out * inner * (FLOAT_BYTES if spec.weight_format == "F32" else HALF_BYTES) + bias
        bits, group = code_layout(spec.weight_format) or (0, 1)
        zeros = 2 if spec.weight_format.startswith("INT") else 1
        return out * inner * bits // 8 + zeros * HALF_BYTES * out * (inner // group) + bias


def fits(weight_format: str, out: int, inner: int) -> bool:
    """Whether `npu_weight_quant_batchmatmul` takes a matrix [out, inner] of that format."""
    layout = code_layout(weight_format)
    if layout is None or max(out, inner) > WIDEST:
        return False
    return layout[0] == 8 or (out % 8 == 0 and out > 8)


def pack_int4(ops: Any, codes: torch.Tensor, device: torch.device) -> torch.Tensor:
    """int8 codes [K, N] in -8..7 on the host -> int32 [K, N / 8] on the device, rows a piece at a time."""
    step = max(1, PIECE // codes.shape[1])
    pieces = [
        ops.npu_convert_weight_to_int4pack(codes[i : i + step].int().contiguous().to(device))
        for i in range(0, codes.shape[0], step)
    ]
    return torch.cat(pieces) if len(pieces) > 1 else cast(torch.Tensor, pieces[0])


def unpack_int4(packed: torch.Tensor) -> torch.Tensor:
    """int32 [K, N / 8] -> int8 [K, N]: eight values a word along N, the first in the lowest bits, two's complement."""
    shifts = torch.arange(0, 32, 4, dtype=torch.int32)
    nibbles = (packed[..., None] >> shifts) & 15
    return ((nibbles ^ 8) - 8).to(torch.int8).flatten(-2)


class Quantised:
    """float32 [T, in] -> float32 [T, out].

    Attributes:
        layout: tag of the packed weight.
    """

    def __init__(self, request: LoadRequest) -> None:
        spec, stored = cast(LinearSpec, request.spec), request.weights["weight"]
        runtime, device = npu(request), request.runtime.device
        self._ops = runtime.ops
        self._compute = compute_dtype(request)
        bits, group = code_layout(spec.weight_format) or (0, 0)
        self.layout = f"int{bits}.nd"
        found = signed_codes(spec.weight_format, stored.raw(), spec.out_features)
        codes = found.codes.t()
        self._weight = pack_int4(self._ops, codes, device) if bits == 4 else codes.contiguous().to(device)
        self._group = group if found.scale.shape[1] > 1 else 0
        self._scale = self._by_group(found.scale, device)
        self._offset = None if found.offset is None else self._by_group(found.offset, device)
        order = stored.input_order
        self._order = None if order is None else upload(request.runtime, torch.from_numpy(order))
        wide = torch.float32 if self._compute is torch.bfloat16 else self._compute
        self._bias = optional(request, "bias", wide)

    def unpack(self) -> torch.Tensor:
        """The weight [out, in] on the host, columns in stored order."""
        weight = self._weight.cpu()
        codes = unpack_int4(weight) if self.layout.startswith("int4") else weight
        scale = self._wide(self._scale, codes.shape[0])
        offset = 0.0 if self._offset is None else self._wide(self._offset, codes.shape[0])
        return ((codes.float() + offset) * scale).t().contiguous()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        x = x if self._order is None else x.index_select(1, self._order)
        y = self._ops.npu_weight_quant_batchmatmul(
            x.to(self._compute).contiguous(),
            self._weight,
            self._scale,
            antiquant_offset=self._offset,
            bias=self._bias,
            antiquant_group_size=self._group,
        )
        return cast(torch.Tensor, y.float())

    def _by_group(self, values: torch.Tensor, device: torch.device) -> torch.Tensor:
        """[out, groups] -> [groups, out], or [out] where there is one group."""
        return (values.t() if self._group else values[:, 0]).to(self._compute).contiguous().to(device)

    def _wide(self, values: torch.Tensor, rows: int) -> torch.Tensor:
        host = values.float().cpu().reshape(-1, values.shape[-1])
        return host.repeat_interleave(rows // host.shape[0], 0)


class Plain:
    """float32 [T, in] -> float32 [T, out] with a 16-bit weight in NZ, cast once at load; float32 stays float32 and ND.

    `npu_format_cast(t, 29)` changes the storage, not the shape: the weight is never viewed, sliced or copied after it.

    Attributes:
        layout: tag of the packed weight.
    """

    def __init__(self, request: LoadRequest) -> None:
        spec = cast(LinearSpec, request.spec)
        self._ops = npu(request).ops
        wide = spec.weight_format == "F32"
        self._compute = torch.float32 if wide else compute_dtype(request)
        self.layout = "nd" if wide else "fractal_nz"
        weight = on_device(request, "weight", self._compute)
        self._weight = weight if wide else self._ops.npu_format_cast(weight, FRACTAL_NZ)
        self._bias = optional(request, "bias")

    def unpack(self) -> torch.Tensor:
        """The weight [out, in] on the host."""
        nd = self._weight if self.layout == "nd" else self._ops.npu_format_cast(self._weight, ND)
        return cast(torch.Tensor, nd.cpu().float())

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.nn.functional.linear(x.to(self._compute), self._weight).float()
        return y if self._bias is None else y + self._bias
