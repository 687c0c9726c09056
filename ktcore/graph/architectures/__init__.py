"""Model families: architecture name in the checkpoint -> builder of its graph. A new family is a file and a row."""

from __future__ import annotations

from collections.abc import Callable

from ktcore.graph.architectures.deepseek_v3 import build_deepseek
from ktcore.graph.architectures.llama import build_llama, build_qwen2, build_qwen3
from ktcore.graph.architectures.qwen3_moe import build_qwen3_moe
from ktcore.graph.node import Graph
from ktcore.graph.settings import Settings

Builder = Callable[[Settings], Graph]

HF_ARCHITECTURES: dict[str, Builder] = {
    "llama": build_llama,
    "mistral": build_llama,
    "qwen2": build_qwen2,
    "qwen3": build_qwen3,
    "qwen3_moe": build_qwen3_moe,
    "deepseek_v2": build_deepseek,
    "deepseek_v3": build_deepseek,
    "kimi_k2": build_deepseek,
}
"""By `model_type` of config.json."""

GGUF_ARCHITECTURES: dict[str, Builder] = {
    "llama": build_llama,
    "qwen2": build_qwen2,
    "qwen3": build_qwen3,
    "qwen3moe": build_qwen3_moe,
    "deepseek2": build_deepseek,
}
"""By `general.architecture`."""
