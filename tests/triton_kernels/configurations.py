"""What is compiled: for each kernel one representative configuration, and further ones for the full sweep."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Configuration:
    """A kernel "module:name" with the types of its run-time arguments, its constants and its launch options.

    Attributes:
        types: by argument, as "*fp16" or "i32", in the kernel's order.
        full: compiled in the full sweep only.
    """

    name: str
    kernel: str
    types: dict[str, str]
    constants: dict[str, Any]
    warps: int = 4
    stages: int = 2
    full: bool = False
    compute: dict[str, str] = field(default_factory=dict)


def configurations(full: bool) -> list[Configuration]:
    """All of them, or those that represent their kernel."""
    return [c for c in (*_linear(), *_rows()) if full or not c.full]


def _linear() -> list[Configuration]:
    out = []
    for block_m, block_n, warps in ((16, 32, 4), (64, 64, 8)):
        for bits, group, offset, kind in (
            (4, 32, True, "fp16"),
            (8, 16, False, "bf16"),
            (4, 128, False, "fp16"),
            (4, 16, True, "bf16"),
            (8, 32, False, "fp32"),
        ):
            if kind == "fp32" and block_m == 64:
                block_m, block_n, warps = 32, 32, 8
            scale = "*fp16" if group == 128 else "*fp32"
            types = {
                "x": f"*{kind}", "codes": "*u8", "scale": scale, "offset": scale, "bias": f"*{kind}",
                "out": f"*{kind}", "m": "i32", "n": "i32", "cols": "i32", "part": "i32",
            }  # fmt: skip
            constants = {
                "BITS": bits, "ZERO": 0 if offset else 1 << (bits - 1), "GROUP": group, "SPAN": 64,
                "BLOCK_M": block_m, "BLOCK_N": block_n, "HAS_OFFSET": offset, "HAS_BIAS": False,
            }  # fmt: skip
            name = f"linear-{bits}bit-g{group}-{kind}-{block_m}x{block_n}"
            shown = (block_m, bits, group) in ((16, 4, 32), (16, 4, 128), (64, 8, 16))
            out.append(
                Configuration(
                    name, "linear:linear_kernel", types, constants, warps, full=not shown, compute={"COMPUTE": kind}
                )
            )
    return out


def _rows() -> list[Configuration]:
    norm = dict.fromkeys(("x", "residual", "weight", "out", "total_out"), "*bf16")
    norm |= {"dim": "i32", "eps": "fp32", "weight_offset": "fp32"}
    rope = {"x": "*fp16", "positions": "*i64", "frequencies": "*fp32", "out": "*fp16"}
    return [
        Configuration("rms_norm", "rows:rms_norm_kernel", norm,
                      {"BLOCK": 4096, "HAS_RESIDUAL": True, "HAS_WEIGHT": True}, warps=8),
        *(Configuration(f"rope-{int(i)}", "rows:rope_kernel",
                        {**rope, **dict.fromkeys(("heads", "width", "pairs"), "i32"), "factor": "fp32"},
                        {"BLOCK": 32, "REST": 64, "INTERLEAVED": i, "HAS_REST": True}, warps=1, full=i)
          for i in (False, True)),
        Configuration("swiglu", "rows:swiglu_kernel", {"gate": "*bf16", "up": "*bf16", "out": "*bf16", "count": "i32"},
                      {"BLOCK": 1024}),
        Configuration("cache_write", "rows:cache_write_kernel",
                      {"rows": "*bf16", "slots": "*i64", "cache": "*bf16", "width": "i32", "stride": "i32",
                       "column": "i32"}, {"BLOCK": 1024}),
    ]  # fmt: skip
