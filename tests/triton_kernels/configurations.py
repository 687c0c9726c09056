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
        compute: constants that are types.
        needs: flavour of 8-bit floats that a target must have for it.
    """

    name: str
    kernel: str
    types: dict[str, str]
    constants: dict[str, Any]
    warps: int = 4
    stages: int = 2
    full: bool = False
    compute: dict[str, str] = field(default_factory=dict)
    needs: str = ""


def configurations(full: bool) -> list[Configuration]:
    """All of them, or those that represent their kernel."""
    return [
        c
        for c in (*_linear(), *_rows(), *_attention(), *_index(), *_streams(), *_experts(), *_delta(), *_float8())
        if full or not c.full
    ]


def _linear() -> list[Configuration]:
    out = []
    for block_m, block_n, warps in ((16, 32, 4), (64, 64, 8)):
        for bits, group, offset, kind, scales in (
            (4, 32, True, "fp16", "int8"),
            (8, 16, False, "bf16", "float"),
            (4, 128, False, "fp16", "float"),
            (2, 16, False, "bf16", "nibbles"),
            (3, 16, False, "bf16", "int8"),
            (5, 32, True, "bf16", "int8"),
            (6, 16, False, "bf16", "int8"),
            (8, 128, False, "bf16", "float"),
            (8, 32, False, "fp32", "float"),
        ):
            if kind == "fp32" and block_m == 64:
                block_m, block_n, warps = 32, 32, 8
            float8 = (bits, group) == (8, 128)
            scale = "*u8" if scales == "nibbles" else "*i8" if scales == "int8" else "*fp16"
            if scales == "float" and group != 128:
                scale = "*fp32"
            types = {
                "x": f"*{kind}", "codes": "*u8", "scale": scale, "offset": scale,
                "over": scale if scales == "float" else "*fp16", "bias": f"*{kind}",
                "out": f"*{kind}", "m": "i32", "n": "i32", "cols": "i32", "part": "i32",
            }  # fmt: skip
            constants = {
                "BITS": bits, "ZERO": 0 if offset or float8 else 1 << (bits - 1), "GROUP": group, "SPAN": 64,
                "BLOCK_M": block_m, "BLOCK_N": block_n, "HAS_OFFSET": offset, "HAS_BIAS": False,
                "FLOAT8": float8, "SCALES": scales,
            }  # fmt: skip
            name = f"linear-{bits}bit-g{group}-{kind}-{block_m}x{block_n}"
            shown = (block_m, bits, group) in ((16, 4, 32), (16, 8, 128), (64, 6, 16))
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


def _attention() -> list[Configuration]:
    out = []
    integers = ("heads", "kv_heads", "key_stride", "value_stride", "table_stride", "page_size", "window", "chunk",
                "splits", "tokens")  # fmt: skip
    for name, kind, group, key, value, (block_m, block_n, warps), split, full in (
        ("decode", "bf16", 4, 128, 128, (16, 16, 8), True, False),
        ("prefill", "fp16", 4, 128, 128, (32, 32, 8), False, False),
        ("latent", "bf16", 128, 576, 512, (16, 16, 8), True, False),
        ("prefill-192", "bf16", 1, 192, 128, (32, 32, 8), False, True),
        ("decode-64", "fp16", 8, 64, 64, (16, 16, 8), True, True),
    ):
        parts = "*fp32" if split else f"*{kind}"
        types = {
            "q": f"*{kind}", "keys": f"*{kind}", "values": f"*{kind}", "sinks": "*fp32", "out": parts, "lse": parts,
            "q_start": "*i32", "context_lens": "*i32", "table": "*i32", "scale": "fp32",
            **dict.fromkeys(integers, "i32"),
        }  # fmt: skip
        latent = name == "latent"
        constants = {
            "GROUP": group, "KEY_DIM": key, "MAIN": 512 if latent else 256 if key == 192 else key, "VALUE_DIM": value,
            "PART": 512 if latent else 256 if key == 192 else key, "REST": 64 if latent else 16, "BLOCK_V": value,
            "BLOCK_M": block_m, "BLOCK_N": block_n, "LATENT": latent,
            "HAS_SINKS": False, "SPLIT": split,
        }  # fmt: skip
        out.append(Configuration(f"attention-{name}", "attention:attention_kernel", types, constants, warps, 1, full,
                                 {"COMPUTE": kind}))  # fmt: skip
    merge = {"parts": "*fp32", "lse": "*fp32", "sinks": "*fp32", "out": "*bf16", "rows": "i32", "heads": "i32"}
    for width in (128, 512):
        constants = {"VALUE_DIM": width, "BLOCK_V": width, "BLOCK_S": 8, "HAS_SINKS": True}
        out.append(Configuration(f"merge-{width}", "attention:merge_kernel", {**merge, "splits": "i32"}, constants,
                                 full=width == 128))  # fmt: skip
    return out


def _index() -> list[Configuration]:
    places = {"q_start": "*i32", "context_lens": "*i32", "table": "*i32"}
    scores = {
        "q": "*fp32",
        "weights": "*fp32",
        "keys": "*bf16",
        "out": "*fp32",
        **places,
        **dict.fromkeys(("first", "last", "table_stride", "page_rows", "out_stride", "pool", "few"), "i32"),
    }
    choose = {
        "scores": "*fp32",
        "positions": "*i64",
        "out": "*i32",
        **dict.fromkeys(("first", "stride", "top", "width", "local"), "i32"),
    }
    pools = {"keys": "*bf16", "gates": "*bf16", "pooled": "*bf16", "means": "*fp32", "slots": "*i64",
             "positions": "*i64"}  # fmt: skip
    best = {
        "q": "*fp32",
        "keys": "*bf16",
        "out": "*fp32",
        **places,
        **dict.fromkeys(("first", "last", "table_stride", "page_size", "out_stride", "few"), "i32"),
    }
    # the shapes of DeepSeek-V3.2 and of GLM-5.3-Flash, and blocks of MiniMax-M3
    heads = {"HEADS": 64, "DIM": 128, "BLOCK_H": 64, "BLOCK_D": 128, "BLOCK_N": 64, "WEIGHED": True}
    return [
        *(Configuration(f"index-scores-{few}", "index:scores_kernel", scores, {**heads, "QUERIES": few}, 8, 1,
                        full=few == 1, compute={"COMPUTE": "bf16"}) for few in (1, 16)),
        *(Configuration(f"index-choose-{pool}", "index:choose_kernel", choose,
                        {"ROWS": 1, "POOL": pool, "BLOCK_P": pool, "BLOCK": 2048 // pool, "TAIL": True}, 8,
                        full=pool == 4) for pool in (1, 4)),
        Configuration("index-best", "index:best_kernel", best,
                      {"HEADS": 4, "DIM": 128, "BLOCK_H": 16, "BLOCK_D": 128, "BLOCK_N": 128, "POOL": 128,
                       "QUERIES": 16}, 8, 1, compute={"COMPUTE": "bf16"}),
        Configuration("index-choose-best", "index:choose_kernel", choose,
                      {"ROWS": 4, "POOL": 128, "BLOCK_P": 128, "BLOCK": 16, "TAIL": False}, 8, full=True),
        Configuration("index-pools", "index:pools_kernel", pools,
                      {"DIM": 128, "POOL": 4, "BLOCK_P": 4, "BLOCK_D": 128, "GATED": True}),
        *(_chosen(*shape) for shape in (("latent", 128, 576, 512, True), ("grouped", 8, 128, 128, False))),
    ]  # fmt: skip


def _chosen(name: str, group: int, key: int, value: int, latent: bool) -> Configuration:
    integers = ("heads", "kv_heads", "key_stride", "value_stride", "table_stride", "page_size", "window", "chunk",
                "splits", "tokens", "width", "chosen_heads")  # fmt: skip
    types = {**dict.fromkeys(("q", "keys", "values"), "*bf16"), "sinks": "*fp32", "out": "*fp32", "lse": "*fp32",
             "chosen": "*i32", "positions": "*i64", "sequences": "*i32", "table": "*i32", "scale": "fp32",
             **dict.fromkeys(integers, "i32")}  # fmt: skip
    main = value if latent else key
    constants = {"GROUP": group, "KEY_DIM": key, "MAIN": main, "REST": 64 if latent else 16, "VALUE_DIM": value,
                 "BLOCK_V": value, "BLOCK_M": 16, "BLOCK_N": 16, "PART": main, "LATENT": latent, "HAS_SINKS": False,
                 "SPLIT": True}  # fmt: skip
    return Configuration(f"attention-chosen-{name}", "chosen:chosen_kernel", types, constants, 8, 1,
                         compute={"COMPUTE": "bf16"})  # fmt: skip


def _streams() -> list[Configuration]:
    floats = {"eps": "fp32", "rms_eps": "fp32"}
    connect = {**dict.fromkeys(("x", "z", "base", "scale", "out", "carry"), "*fp32"), "hidden": "i32", **floats,
               "rounds": "i32"}  # fmt: skip
    leave = {**dict.fromkeys(("x", "y", "carry", "out"), "*fp32"), "hidden": "i32"}
    norm = {**dict.fromkeys(("x", "weight", "out"), "*fp32"), "hidden": "i32", "eps": "fp32"}
    # DeepSeek-V4's four streams, Qwen3.8-Flash-Next's two
    four = {"STREAMS": 4, "BLOCK_S": 4, "BLOCK": 512, "MIXED": True}
    return [
        Configuration("streams-connect", "streams:connect_kernel", connect, four, 8),
        Configuration("streams-end", "streams:connect_kernel", connect, {**four, "MIXED": False}, 8, full=True),
        Configuration("streams-leave", "streams:leave_kernel", leave, four),
        Configuration("streams-norm", "streams:stream_norm_kernel", norm, {"STREAMS": 2, "BLOCK": 4096}, 8, full=True),
        Configuration("streams-gate", "streams:gate_kernel",
                      {**dict.fromkeys(("normed", "up", "out"), "*fp32"), "hidden": "i32"},
                      {"STREAMS": 2, "BLOCK": 1024}, full=True),
    ]  # fmt: skip


def _experts() -> list[Configuration]:
    out = []
    router = {"logits": "*fp32", "bias": "*fp32", "ids": "*i64", "weights": "*fp32", "experts": "i32",
              "renorm_eps": "fp32", "scale": "fp32"}  # fmt: skip
    for groups, each, kept, sigmoid in ((8, 32, 4, True), (1, 128, 1, False)):
        constants = {
            "GROUPS": groups, "EACH": each, "BLOCK_G": groups, "BLOCK_E": each, "TOP_K": 8, "BLOCK_K": 8, "KEPT": kept,
            "SIGMOID": sigmoid, "HAS_BIAS": sigmoid, "TWO_BEST": sigmoid, "RENORMALISE": True, "ON_LOGITS": False,
        }  # fmt: skip
        out.append(Configuration(f"router-{groups}", "experts:router_kernel", router, constants, 1, full=groups == 1))
    for gated, bits, group in ((True, 4, 32), (False, 6, 16)):
        part = "*i8"
        types = {"x": "*bf16", "codes": "*u8", "scale": part, "offset": part, "over": "*fp16", "up_codes": "*u8",
                 "up_scale": part, "up_offset": part, "up_over": "*fp16", "bias": "*fp32",
                 "up_bias": "*fp32", "weights": "*fp32",
                 "alpha": "fp32", "limit": "fp32", "plus": "fp32",
                 "out": "*bf16" if gated else "*fp32", "order": "*i32", "experts": "*i32",
                 "firsts": "*i32", "lasts": "*i32", "n": "i32", "cols": "i32"}  # fmt: skip
        constants = {"BITS": bits, "ZERO": 0 if gated else 32, "GROUP": group, "SPAN": 64, "HAS_OFFSET": gated,
                     "BLOCK_M": 16, "BLOCK_N": 32, "SHARE": 8 if gated else 1, "GATED": gated,
                     "SCALES": "int8", "FLOAT8": False, "HAS_BIAS": gated, "WEIGHED": not gated,
                     "ACTIVATION": "clamped" if gated else "silu"}  # fmt: skip
        out.append(Configuration(f"experts-{'up' if gated else 'down'}", "experts:experts_kernel", types, constants,
                                 full=not gated, compute={"COMPUTE": "bf16"}))  # fmt: skip
    return out


def _delta() -> list[Configuration]:
    places = {"slots": "*i64", "starts": "*i32", "q_start": "*i32"}
    convolution = {"x": "*fp32", "weight": "*fp32", "state": "*fp32", **places, "out": "*fp32", "channels": "i32"}
    rule = {**dict.fromkeys(("mixed", "a", "b", "decay", "dt_bias", "state"), "*fp32"), **places, "out": "*fp32",
            **dict.fromkeys(("key_heads", "value_heads", "repeat"), "i32"), "scale": "fp32", "eps": "fp32",
            "most": "i32"}  # fmt: skip
    # the shape of Qwen3-Next-80B-A3B
    heads = {"KEY": 128, "VALUE": 128, "BLOCK_K": 128, "BLOCK_V": 32}
    return [
        *(Configuration(f"convolution-{block}", "delta:convolution_kernel", convolution,
                        {"WIDTH": 4, "BLOCK_W": 4, "BLOCK_T": block, "BLOCK_C": 128}, full=block == 1)
          for block in (1, 16)),
        Configuration("delta-recurrence", "delta:recurrence_kernel", rule, heads, 4, 1),
        Configuration("delta-chunks", "delta:chunks_kernel", rule, {**heads, "BLOCK_K": 32, "CHUNK": 16}, 8, 1),
    ]  # fmt: skip


def _float8() -> list[Configuration]:
    quantise = {"x": "*fp32", "codes": "*u8", "scales": "*fp32", "tokens": "i32", "cols": "i32", "top": "fp32"}
    product = {"x": "*u8", "x_scales": "*fp32", "codes": "*u8", "scales": "*fp32", "bias": "*fp32", "out": "*fp32",
               "m": "i32", "n": "i32", "cols": "i32"}  # fmt: skip
    found = [Configuration("quantise", "fp8:quantise_kernel", quantise, {"BIAS": 7, "GROUP": 128}, 1)]
    for flavour, kind in (("e4m3fn", "fp8e4nv"), ("e4m3fnuz", "fp8e4b8")):
        for block_m, block_n, warps in ((16, 32, 4), (64, 64, 8)):
            constants = {"GROUP": 128, "BLOCK_M": block_m, "BLOCK_N": block_n, "HAS_BIAS": False}
            found.append(
                Configuration(f"product-{flavour}-{block_m}x{block_n}", "fp8:product_kernel", product, constants, warps,
                              full=block_m == 64, compute={"KIND": kind}, needs=flavour)
            )  # fmt: skip
    return found
