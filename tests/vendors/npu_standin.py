"""A torch_npu over the simulated device: operators by their documented formulas, refusing what the documents exclude.

Formulas and limits are op-plugin's (`docs/zh/custom_APIs/torch_npu/torch_npu-<name>.md`). Every operator checks its
arguments when it is called and computes in float32 when the stream gets to it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace

import torch
from ktcore_npu.vendor import NpuVendor
from ktcore_sim.runtime import SimRuntime

from tests.vendors.npu_attention import FusedInferAttention
from tests.vendors.npu_checks import FLOATS, HALVES, ND, NZ, check, contiguous, dtype, shape, storage, tagged
from tests.vendors.npu_experts import ExpertOperators
from tests.vendors.npu_module import NpuModule
from tests.vendors.torch_module import HostFunctions

WIDEST = 65535


class TorchNpu(ExpertOperators):
    """The module torch_npu, as far as the backend calls it."""

    def __init__(self, npu: NpuModule) -> None:
        self.npu = npu
        self.npu_fused_infer_attention_score = FusedInferAttention(npu)
        self._npu_fused_infer_attention_score_get_max_workspace = self.npu_fused_infer_attention_score.max_workspace

    def run(
        self,
        name: str,
        kernel: Callable[..., torch.Tensor | tuple[torch.Tensor, ...]],
        inputs: Sequence[torch.Tensor | None],
        outputs: Sequence[torch.Tensor],
    ) -> None:
        """`outputs` = kernel(*inputs) on the current stream."""
        given = [t for t in inputs if t is not None]

        def task(*tensors: torch.Tensor) -> None:
            there = iter(tensors[: len(given)])
            with torch.inference_mode():
                made = kernel(*(None if t is None else next(there) for t in inputs))
                results = made if isinstance(made, tuple) else (made,)
                for target, result in zip(tensors[len(given) :], results, strict=True):
                    target.copy_(result)

        self.npu.issue(name, task, [*given, *outputs])

    def npu_format_cast(self, tensor: torch.Tensor, acl_format: int) -> torch.Tensor:
        """Another storage of the same values."""
        check("FormatCast", acl_format in (ND, NZ), f"format {acl_format}")
        check("FormatCast", tensor.dim() >= 2 or acl_format == ND, "NZ needs two dimensions")
        return tagged(tensor, acl_format)

    def npu_convert_weight_to_int4pack(self, weight: torch.Tensor, inner_k_tiles: int = 0) -> torch.Tensor:
        """On the host: eight values along the last axis a word, the first in the lowest bits, two's complement."""
        name = "ConvertWeightToINT4Pack"
        check(name, not self.npu.capturing, "runs on the host, and so not in a graph")
        dtype(name, "weight", weight, torch.int32)
        contiguous(name, weight=weight)
        check(name, weight.dim() in (2, 3) and weight.shape[-1] % 8 == 0, f"shape {list(weight.shape)}")
        values = weight.cpu()
        check(name, bool(((values >= -8) & (values <= 7)).all()), "values outside of -8..7")
        words = (values & 15).unflatten(-1, (-1, 8)).long() << torch.arange(0, 32, 4)
        packed = words.sum(-1)
        return torch.where(packed >= 1 << 31, packed - (1 << 32), packed).int().to(weight.device)

    def npu_weight_quant_batchmatmul(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        antiquant_scale: torch.Tensor,
        antiquant_offset: torch.Tensor | None = None,
        quant_scale: torch.Tensor | None = None,
        quant_offset: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
        antiquant_group_size: int = 0,
        inner_precise: int = 0,
    ) -> torch.Tensor:
        """x @ ((weight + offset) * scale) + bias."""
        name = "WeightQuantBatchMatmulV2"
        dtype(name, "x", x, *HALVES)
        dtype(name, "weight", weight, torch.int8, torch.int32)
        check(name, quant_scale is None and quant_offset is None, "a quantised output is not for this format")
        check(name, storage(weight) == ND, "NZ weights are for graph mode of torchair only")
        check(name, inner_precise == 0, "inner_precise is for NZ int32 weights")
        check(name, x.dim() == 2 and weight.dim() == 2, "x and weight have two dimensions")
        contiguous(name, x=x, weight=weight)
        k, n = weight.shape[0], weight.shape[1] * (8 if weight.dtype is torch.int32 else 1)
        shape(name, "x", x, x.shape[0], k)
        check(name, max(k, n) <= WIDEST, f"K {k}, N {n}")
        check(name, (k, n) != (1, 8), "[1, 8] int4")
        g = antiquant_group_size
        if g:
            check(name, g % 32 == 0 and 32 <= g <= k - 1, f"group size {g} for K {k}")
            shape(name, "antiquant_scale", antiquant_scale, -(-k // g), n)
        else:
            check(name, tuple(antiquant_scale.shape) in ((n,), (1, n)), f"scale {list(antiquant_scale.shape)}")
        dtype(name, "antiquant_scale", antiquant_scale, x.dtype)
        if antiquant_offset is not None:
            dtype(name, "antiquant_offset", antiquant_offset, x.dtype)
            shape(name, "antiquant_offset", antiquant_offset, *antiquant_scale.shape)
        if bias is not None:
            dtype(name, "bias", bias, torch.float32 if x.dtype is torch.bfloat16 else torch.float16)
            shape(name, "bias", bias, n)
        out = torch.empty(x.shape[0], n, dtype=x.dtype, device=x.device)

        def kernel(x: torch.Tensor, w: torch.Tensor, s: torch.Tensor, *rest: torch.Tensor | None) -> torch.Tensor:
            offset, added = rest
            y = x.float() @ dequantised(w, s, offset, g)
            return y if added is None else y + added.float()

        self.run(name, kernel, [x, weight, antiquant_scale, antiquant_offset, bias], [out])
        return out

    def npu_rms_norm(
        self, tensor: torch.Tensor, gamma: torch.Tensor, epsilon: float = 1e-6
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The normed values, and 1 / root mean square."""
        name = "RmsNorm"
        dtype(name, "self", tensor, *FLOATS)
        dtype(name, "gamma", gamma, tensor.dtype, torch.float32)
        shape(name, "gamma", gamma, tensor.shape[-1])
        out = torch.empty_like(tensor)
        rstd = torch.empty(*tensor.shape[:-1], 1, device=tensor.device)

        def kernel(x: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            r = (x.float().pow(2).mean(-1, keepdim=True) + epsilon).rsqrt()
            return x.float() * r * w.float(), r

        self.run(name, kernel, [tensor, gamma], [out, rstd])
        return out, rstd

    def npu_rotary_mul(
        self,
        input: torch.Tensor,
        r1: torch.Tensor,
        r2: torch.Tensor,
        rotary_mode: str = "half",
        rotate: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """input * cos + turned * sin; both modes keep the order of the input."""
        name = "RotaryPositionEmbedding"
        dtype(name, "input", input, *FLOATS)
        dtype(name, "r1", r1, input.dtype)
        check(name, rotate is None and rotary_mode in ("half", "interleave"), f"mode {rotary_mode}")
        check(name, input.dim() == 4 and input.shape[-1] < 896 and input.shape[-1] % 2 == 0, f"{list(input.shape)}")
        b, s, n, d = input.shape
        check(name, r1.shape == r2.shape and tuple(r1.shape) in ((1, s, 1, d), (b, s, 1, d)), f"r1 {list(r1.shape)}")
        check(name, rotary_mode == "half" or b * n < 1000, f"interleave takes B * N below 1000, not {b * n}")
        contiguous(name, input=input)
        out = torch.empty_like(input)

        def kernel(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
            if rotary_mode == "half":
                turned = torch.cat((-x[..., d // 2 :], x[..., : d // 2]), -1)
            else:
                turned = torch.stack((-x[..., 1::2], x[..., 0::2]), -1).flatten(-2)
            return x * cos + turned * sin

        self.run(name, kernel, [input, r1, r2], [out])
        return out

    def npu_swiglu(self, tensor: torch.Tensor, dim: int = -1) -> torch.Tensor:
        """silu(first half) * second half."""
        name = "SwiGlu"
        dtype(name, "self", tensor, *FLOATS)
        check(name, dim in (-1, tensor.dim() - 1) and tensor.shape[-1] % 2 == 0, f"{list(tensor.shape)} in dim {dim}")
        half = tensor.shape[-1] // 2
        out = torch.empty(*tensor.shape[:-1], half, dtype=tensor.dtype, device=tensor.device)
        silu = torch.nn.functional.silu
        self.run(name, lambda x: silu(x[..., :half].float()) * x[..., half:].float(), [tensor], [out])
        return out

    def npu_scatter_nd_update_(self, input: torch.Tensor, indices: torch.Tensor, updates: torch.Tensor) -> torch.Tensor:
        """input[indices] = updates, in place."""
        name = "ScatterNdUpdate"
        dtype(name, "indices", indices, torch.int32, torch.int64)
        dtype(name, "updates", updates, input.dtype)
        check(name, indices.dim() >= 2 and indices.shape[-1] == 1, f"indices {list(indices.shape)}")
        contiguous(name, input=input, updates=updates)
        shape(name, "updates", updates, *indices.shape[:-1], *input.shape[1:])

        def task(target: torch.Tensor, at: torch.Tensor, rows: torch.Tensor) -> None:
            with torch.inference_mode():
                target.index_copy_(0, at[..., 0].flatten().long(), rows.flatten(0, -2))

        self.npu.issue(name, task, [input, indices, updates])
        return input


def dequantised(weight: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor | None, group: int) -> torch.Tensor:
    """float32 [.., K, N] of int8 codes or packed int4 words; the offset is added before scaling."""
    if weight.dtype is torch.int32:
        words = weight.long()[..., None] >> torch.arange(0, 32, 4)
        weight = (((words & 15) ^ 8) - 8).flatten(-2)
    codes = weight.float()
    rows = codes.shape[-2]

    def spread(values: torch.Tensor) -> torch.Tensor:
        wide = values.float() if values.dim() > 1 else values.float()[None]
        return wide.repeat_interleave(group or rows, -2)[..., :rows, :]

    return (codes if offset is None else codes + spread(offset)) * spread(scale)


def npu_vendor(sim: SimRuntime, properties: SimpleNamespace, environment: dict[str, str]) -> NpuVendor:
    """The vendor's parts over a simulated device."""
    module = NpuModule(sim, properties)
    acl = SimpleNamespace(aclrtLaunchHostFunc=HostFunctions(sim))
    return NpuVendor(TorchNpu(module), module, "sim", lambda: acl, environment)
