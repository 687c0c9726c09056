"""Linear projection of few tokens at the speed of memory: 4- and 8-bit weights in tiles, a kernel of the package's own.

After the ideas of Marlin (Frantar et al., 2024, arXiv 2408.11743): weights repacked so that each thread reads what it
multiplies with in 16 bytes, asynchronous copies several stages ahead, codes made floats in registers. Unlike it, bare
codes are multiplied and sums are scaled once a group in float32, so that scales and offsets of GGUF formats are exact.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch

from ktcore.backend import Capabilities, Implementation, LoadRequest, Module, Supported, Unsupported
from ktcore.backend.loading import compute_dtype, optional
from ktcore.backend.mirror import upload
from ktcore.errors import BackendError
from ktcore.ops.linear import LinearSpec
from ktcore.weights import get_format
from ktcore_triton.affine import affine_bytes, code_bits, supported
from ktcore_triton.codes import FLOATS8, unpack
from ktcore_triton.native.build import Build, Gemm
from ktcore_triton.native.runtime import NativeRuntime
from ktcore_triton.native.tiles import COLUMNS, DEPTH, TiledWeight, refusal, tiled
from ktcore_triton.native.tiles import unpack as codes_of

TILES_A_WARP = 4
"""So many tiles of K at least for a warp: below, filling and emptying the pipeline costs more than a split gains."""
USUAL_PROCESSORS = 108
MOST_SPLITS = 16


class TiledLinear(Implementation):
    """Weights of `bits` bits with scales in groups. Option `compute`: as of the shared linear.

    Args:
        backend: names it: "<backend>.w4a16".
        bits: 4, or 8 ("w8a16"; codes of 5 and 6 bits too).
        build: the library's for a device; looked at before there is one, and built when the first weight is loaded.
    """

    spec_type = LinearSpec
    handles = frozenset({"bias"})
    options = frozenset({"compute"})
    capturable = True

    def __init__(self, backend: str, bits: int, build: Callable[[Capabilities], Build]) -> None:
        self.id = f"{backend}.w{bits}a16"
        self._bits = bits
        self._build = build

    def supports(self, spec: LinearSpec, device: Capabilities) -> Supported | Unsupported:
        """Where the library is built or can be, for formats of so many bits."""
        name = spec.weight_format
        if not supported(name) or name in FLOATS8 or code_bits(name) != self._bits:
            return Unsupported(f"{name} has no integer codes of {self._bits} bits with scales in groups")
        if why := refusal(spec.in_features, DEPTH):
            return Unsupported(why)
        build = self._build(device)
        if (device.live or build.fragments is None) and (why := build.problem()):
            return Unsupported(why)
        return Supported()

    def load(self, request: LoadRequest) -> Module:
        """Repack into tiles; builds the library if need be."""
        return TiledModule(request, self._build(request.device))

    def packed_bytes(self, spec: LinearSpec, stored_bytes: int) -> int:
        """Of the tiles, the last one filled up, and the bias."""
        if not supported(spec.weight_format):
            return stored_bytes
        rows = spec.out_features + -spec.out_features % COLUMNS
        return affine_bytes(spec.weight_format, rows, spec.in_features) + 4 * spec.out_features * spec.bias


class TiledModule:
    """float32 [T, in] -> float32 [T, out]; a row's result does not depend on the other rows.

    Attributes:
        layout: tag of the packed weight.
    """

    layout = "w4a16.16x64"

    def __init__(self, request: LoadRequest, build: Build) -> None:
        spec = cast(LinearSpec, request.spec)
        stored, device = request.weights["weight"], request.runtime.device
        if build.fragments is None:
            raise BackendError(f"{request.name}: {build.problem()}")
        raw = stored.raw().reshape(spec.out_features, -1)
        self._weight: TiledWeight = tiled(unpack(get_format(spec.weight_format).name, raw), build.fragments, device)
        order = stored.input_order
        self._order = None if order is None else upload(request.runtime, torch.from_numpy(order))
        self._bias = optional(request, "bias") if spec.bias else None
        self._compute = compute_dtype(request)
        if self._compute not in (torch.float16, torch.bfloat16):
            raise BackendError(f"{request.name}: this kernel computes in float16 or bfloat16, not in {self._compute}")
        self._runtime = cast(NativeRuntime, request.runtime)
        self._library: Any = build.library()
        self._splits = splits(self._weight, int(request.device.properties.get("processors", USUAL_PROCESSORS)))
        # by stream and number of row blocks: launches of two streams may run at once and must not count each other's
        # blocks; kept, since captured graphs hold their addresses
        self._arrived: dict[tuple[int, int], torch.Tensor] = {}

    def unpack(self) -> torch.Tensor:
        """The weight [out, in] on the host, columns in stored order."""
        w = self._weight
        stored = codes_of(w.codes.cpu().numpy(), w.padded_n, w.k, w.bits, w.fragments)
        codes = torch.from_numpy(stored)[: w.n].float() - w.zero
        scale = w.scale.float().cpu().t()[: w.n]
        values = codes.view(w.n, -1, w.group) * scale[..., None]
        if w.offset is not None:
            values = values + w.offset.float().cpu().t()[: w.n][..., None]
        return values.reshape(w.n, w.k)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        w = self._weight
        if x.dim() != 2 or x.shape[1] != w.k:
            raise BackendError(f"x {list(x.shape)} for a weight [{w.n}, {w.k}]")
        x = (x if self._order is None else x.index_select(1, self._order)).to(self._compute).contiguous()
        out = torch.empty(x.shape[0], w.n, device=x.device)
        if not x.shape[0]:
            return out
        rows = 16 if x.shape[0] <= 16 else 32
        blocks = -(-x.shape[0] // rows)
        held = self._splits * blocks * rows * w.padded_n if self._splits > 1 else 0
        partial = torch.empty(held, device=x.device)
        stream = self._runtime.current_handle()
        call = Gemm(
            x=x.data_ptr(), codes=w.codes.data_ptr(), scale=w.scale.data_ptr(), offset=_address(w.offset),
            bias=_address(self._bias), out=out.data_ptr(), partial=partial.data_ptr(),
            arrived=self._counters(stream, blocks).data_ptr(),
            m=x.shape[0], n=w.n, k=w.k, group=w.group, zero=w.zero, bits=w.bits,
            bf16=self._compute is torch.bfloat16, half_scale=w.scale.dtype is torch.float16, splits=self._splits,
        )  # fmt: skip
        error = self._library.ktcore_gemm(call, stream)
        if error:
            raise BackendError(
                f"the {self.layout} kernel returned {error}: {self._library.ktcore_error(error).decode()}"
            )
        return out

    def _counters(self, stream: int, blocks: int) -> torch.Tensor:
        """Zeros that the kernel leaves as zeros: filled once, in order with the stream that uses them."""
        if (stream, blocks) not in self._arrived:
            weight = self._weight
            size = blocks * (weight.padded_n // COLUMNS)
            self._arrived[stream, blocks] = torch.zeros(size, dtype=torch.int32, device=weight.codes.device)
        return self._arrived[stream, blocks]


def _address(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def splits(weight: TiledWeight, processors: int) -> int:
    """Blocks that share K: enough for two a processor, from the weight's sizes alone, so that no row's sum depends on
    how many rows there are."""
    columns = weight.padded_n // COLUMNS
    wanted = -(-2 * processors // columns)
    most = max(1, weight.k // DEPTH // (weight.fragments.warps * TILES_A_WARP))
    return max(1, min(wanted, most, MOST_SPLITS))
