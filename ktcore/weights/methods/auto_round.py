"""AutoRound's own checkpoints: the tensors of GPTQ or AWQ, under another method's name.

`packing_format` says which: "auto_round:auto_gptq" is GPTQ version 1, "auto_round" and "auto_round:gptqmodel" version 2
(auto_round/inference/backend.py), "auto_round:auto_awq" AWQ. Scales may be negative.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ktcore.errors import CheckpointError
from ktcore.weights.checkpoint import Checkpoint
from ktcore.weights.converted import LogicalWeight
from ktcore.weights.methods.awq import AwqWeight
from ktcore.weights.methods.gptq import GptqWeight
from ktcore.weights.methods.integers import ModuleScheme, module_schemes
from ktcore.weights.methods.overrides import extra_overrides

ZERO_OFFSETS = {"auto_round:auto_gptq": 1, "auto_round": 0, "auto_round:gptqmodel": 0}
AWQ = "auto_round:auto_awq"


def auto_round_weights(checkpoint: Checkpoint, config: Mapping[str, Any]) -> Iterable[LogicalWeight]:
    """Every weight that has a `qweight`; `extra_config` may give a module bits and groups of its own.

    Raises:
        CheckpointError: packing, bits or a rotation that are not supported, or tensors that contradict each other.
    """
    packing = config.get("packing_format")
    if packing != AWQ and packing not in ZERO_OFFSETS:
        raise CheckpointError(
            f"{checkpoint.path}: AutoRound packing_format '{packing}' is not supported",
            f"supported: {', '.join((*ZERO_OFFSETS, AWQ))}",
        )
    if config.get("rotation_config"):
        raise CheckpointError(f"{checkpoint.path}: AutoRound weights behind a rotation are not supported")
    bits = (4,) if packing == AWQ else (4, 8)
    modules = {name.rsplit(".", 1)[0] for name in checkpoint.tensors}
    overrides = extra_overrides(f"{checkpoint.path}: quantization_config", config, modules)
    for module, scheme in module_schemes(checkpoint, config, "AutoRound", bits, overrides):
        yield _weight(checkpoint, module, scheme, packing)


def _weight(checkpoint: Checkpoint, module: str, scheme: ModuleScheme, packing: str) -> LogicalWeight:
    if packing == AWQ:
        return AwqWeight(checkpoint, module, scheme.group, scheme.symmetric is not True)
    return GptqWeight(checkpoint, module, scheme.bits, scheme.group, False, ZERO_OFFSETS[packing])
