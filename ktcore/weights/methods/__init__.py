"""Quantised safetensors checkpoints: `quantization_config.quant_method` decides which tensors form a weight and how."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ktcore.errors import CheckpointError
from ktcore.weights.checkpoint import Checkpoint
from ktcore.weights.converted import ConvertedCheckpoint, LogicalWeight
from ktcore.weights.methods.auto_round import auto_round_weights
from ktcore.weights.methods.awq import awq_weights
from ktcore.weights.methods.compressed import compressed_weights
from ktcore.weights.methods.fp8 import fp8_weights
from ktcore.weights.methods.gptq import gptq_weights
from ktcore.weights.methods.mxfp4 import mxfp4_weights
from ktcore.weights.methods.nvfp4 import modelopt_weights

KV_SCALES = (".k_scale", ".v_scale", ".q_scale", ".kv_scale", "_proj.output_scale")
"""Of caches in 8 bits; a cache with more bits needs none."""

Reader = Callable[[Checkpoint, Mapping[str, Any]], Iterable[LogicalWeight]]

METHODS: dict[str, Reader] = {
    "fp8": fp8_weights,
    "mxfp8": fp8_weights,
    "fbgemm_fp8": fp8_weights,
    "gptq": gptq_weights,
    "awq": awq_weights,
    "auto-round": auto_round_weights,
    "compressed-tensors": compressed_weights,
    "mxfp4": mxfp4_weights,
    "modelopt": modelopt_weights,
    "modelopt_fp4": modelopt_weights,
    "modelopt_mixed": modelopt_weights,
}

# tensors that no unquantised checkpoint has, and what they would say if config.json did not
_TRACES = {
    ".qweight": "GPTQ, AWQ or AutoRound",
    ".weight_packed": "compressed-tensors",
    ".weight_scale_inv": "FP8",
    ".weight_scale_2": "ModelOpt",
}


def read_quantized(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint as its `quantization_config` describes it; itself when it has none. Reads headers only.

    Raises:
        CheckpointError: the method is unknown or set up in a way that is not supported, tensors of a weight are
            missing or contradict each other, or nothing is quantised although config.json says so.
    """
    config = quantization_config(checkpoint)
    if config is None:
        _check_plain(checkpoint)
        return checkpoint
    method = config.get("quant_method")
    reader = METHODS.get(method) if isinstance(method, str) else None
    if reader is None:
        raise CheckpointError(
            f"{checkpoint.path}: weights quantised with '{method}' are not supported",
            f"supported: {', '.join(METHODS)}; or use the bf16 weights or a GGUF file of the same model",
        )
    weights = list(reader(checkpoint, config))
    if not weights:
        raise CheckpointError(
            f"{checkpoint.path}: config.json says that weights are quantised with '{method}', but none is",
            "remove quantization_config if these are the unquantised weights",
        )
    return ConvertedCheckpoint(checkpoint, weights, [n for n in checkpoint.tensors if n.endswith(KV_SCALES)])


def quantization_config(checkpoint: Checkpoint) -> Mapping[str, Any] | None:
    """That of config.json, or of the language model inside it; None when there is none.

    Raises:
        CheckpointError: it is not an object.
    """
    config: Any = checkpoint.config.get("quantization_config")
    if config is None:
        text = checkpoint.config.get("text_config")
        config = text.get("quantization_config") if isinstance(text, Mapping) else None
    if config is None:
        return None
    if not isinstance(config, Mapping):
        raise CheckpointError(f"{checkpoint.path}: quantization_config is {config!r:.80}, an object is needed")
    return config


def _check_plain(checkpoint: Checkpoint) -> None:
    for name in checkpoint.tensors:
        for suffix, what in _TRACES.items():
            if name.endswith(suffix):
                raise CheckpointError(
                    f"{checkpoint.path}: tensor '{name}' is of {what} weights, but config.json has no "
                    "quantization_config",
                    "take config.json from the same place as the weights",
                )
