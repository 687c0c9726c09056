"""torch_npu's fused operators as implementations; importing this needs neither torch_npu nor a device.

Signatures and limits are those of op-plugin's pages `docs/zh/custom_APIs/torch_npu/torch_npu-<name>.md` and of its
`op_plugin_functions.yaml`; where the two disagree, what vllm-ascend calls in production was followed.
"""

from __future__ import annotations

from ktcore.backend import Implementation


def implementations() -> list[Implementation]:
    """One implementation "npu.<operator>" of every operator of the graph but sampling, which is the host's."""
    from ktcore_npu.operators.attention import NpuAttention, NpuMLA
    from ktcore_npu.operators.cache import NpuKVCache
    from ktcore_npu.operators.experts import NpuExperts
    from ktcore_npu.operators.linear import NpuLinear
    from ktcore_npu.operators.moe import NpuMoE, NpuRouter
    from ktcore_npu.operators.simple import NpuEmbedding, NpuMLP, NpuRMSNorm, NpuRope

    return [
        NpuEmbedding(),
        NpuLinear(),
        NpuRMSNorm(),
        NpuRope(),
        NpuKVCache(),
        NpuAttention(),
        NpuMLA(),
        NpuMLP(),
        NpuRouter(),
        NpuExperts(),
        NpuMoE(),
    ]
