"""Model families: architecture name in the checkpoint -> builder of its graph. A new family is a file and a row."""

from __future__ import annotations

from collections.abc import Callable

from ktcore.graph.architectures.afmoe import build_afmoe
from ktcore.graph.architectures.deepseek_v3 import (
    build_deepseek2,
    build_deepseek_v2,
    build_deepseek_v3,
    build_glm4_moe_lite,
)
from ktcore.graph.architectures.deepseek_v4 import build_deepseek_v4
from ktcore.graph.architectures.deepseek_v32 import (
    build_deepseek32,
    build_deepseek_v32,
    build_glm_dsa,
    build_glm_moe_dsa,
)
from ktcore.graph.architectures.dots1 import build_dots1
from ktcore.graph.architectures.ernie4_5_moe import build_ernie4_5_moe
from ktcore.graph.architectures.gemma4 import build_gemma4
from ktcore.graph.architectures.glm4 import build_glm4
from ktcore.graph.architectures.glm4_moe import build_glm4_moe
from ktcore.graph.architectures.glm5_next import build_glm5_next
from ktcore.graph.architectures.gpt_oss import build_gpt_oss
from ktcore.graph.architectures.hunyuan_v1_moe import build_hunyuan_v1_moe
from ktcore.graph.architectures.hy_v3 import build_hy_v3
from ktcore.graph.architectures.kimi_linear import build_kimi_linear
from ktcore.graph.architectures.llama import build_llama, build_mistral, build_phi3, build_qwen2, build_qwen3
from ktcore.graph.architectures.llama4 import build_llama4
from ktcore.graph.architectures.mimo_v2_flash import build_mimo_v2_flash
from ktcore.graph.architectures.minimax_m2 import build_minimax_m2
from ktcore.graph.architectures.minimax_m3 import build_minimax_m3
from ktcore.graph.architectures.mistral4 import build_mistral4
from ktcore.graph.architectures.mixtral import build_mixtral
from ktcore.graph.architectures.olmoe import build_olmoe
from ktcore.graph.architectures.qwen2_moe import build_qwen2_moe
from ktcore.graph.architectures.qwen3_5 import build_qwen3_5, build_qwen3_5_moe
from ktcore.graph.architectures.qwen3_moe import build_qwen3_moe
from ktcore.graph.architectures.qwen3_next import build_qwen3_next
from ktcore.graph.architectures.qwen4_exp import build_qwen4_exp
from ktcore.graph.architectures.smallthinker import build_smallthinker
from ktcore.graph.architectures.solar_open import build_solar_open
from ktcore.graph.architectures.step3p5 import build_step3p5
from ktcore.graph.node import Graph
from ktcore.graph.settings import Settings

Builder = Callable[[Settings], Graph]

HF_ARCHITECTURES: dict[str, Builder] = {
    "llama": build_llama,
    "mistral": build_mistral,
    "qwen2": build_qwen2,
    "qwen3": build_qwen3,
    "phi3": build_phi3,
    "glm4": build_glm4,
    "mixtral": build_mixtral,
    "qwen2_moe": build_qwen2_moe,
    "qwen3_moe": build_qwen3_moe,
    "glm4_moe": build_glm4_moe,
    "deepseek_v2": build_deepseek_v2,
    "deepseek_v3": build_deepseek_v3,
    "kimi_k2": build_deepseek_v3,
    "glm4_moe_lite": build_glm4_moe_lite,
    "mistral4": build_mistral4,
    "minimax_m2": build_minimax_m2,
    "minimax_m3_vl_text": build_minimax_m3,
    "hy_v3": build_hy_v3,
    "olmoe": build_olmoe,
    "ernie4_5_moe": build_ernie4_5_moe,
    "dots1": build_dots1,
    "solar_open": build_solar_open,
    "deepseek_v32": build_deepseek_v32,
    "glm_moe_dsa": build_glm_moe_dsa,
    "glm5_next_text": build_glm5_next,
    "kimi_linear": build_kimi_linear,
    "deepseek_v4": build_deepseek_v4,
    "qwen3_next": build_qwen3_next,
    "qwen3_5_text": build_qwen3_5,
    "qwen3_5_moe_text": build_qwen3_5_moe,
    "qwen4_exp_text": build_qwen4_exp,
    "llama4_text": build_llama4,
    "gemma4_text": build_gemma4,
    "mimo_v2_flash": build_mimo_v2_flash,
    "step3p5": build_step3p5,
    "hunyuan_v1_moe": build_hunyuan_v1_moe,
    "afmoe": build_afmoe,
    "gpt_oss": build_gpt_oss,
    "smallthinker": build_smallthinker,
}
"""By `model_type` of config.json; `ktcore.graph.wrappers` has those of which the language model is a part."""

GGUF_ARCHITECTURES: dict[str, Builder] = {
    "llama": build_llama,
    "qwen2": build_qwen2,
    "qwen3": build_qwen3,
    "glm4": build_glm4,
    "qwen2moe": build_qwen2_moe,
    "qwen3moe": build_qwen3_moe,
    "glm4moe": build_glm4_moe,
    "deepseek2": build_deepseek2,
    "mistral4": build_mistral4,
    "minimax-m2": build_minimax_m2,
    "minimax-m3": build_minimax_m3,
    "hy_v3": build_hy_v3,
    "olmoe": build_olmoe,
    "ernie4_5-moe": build_ernie4_5_moe,
    "dots1": build_dots1,
    "deepseek32": build_deepseek32,
    "glm-dsa": build_glm_dsa,
    "glm5-next": build_glm5_next,
    "kimi-linear": build_kimi_linear,
    "deepseek4": build_deepseek_v4,
    "qwen3next": build_qwen3_next,
    "qwen35": build_qwen3_5,
    "qwen35moe": build_qwen3_5_moe,
    "qwen4exp": build_qwen4_exp,
    "llama4": build_llama4,
    "gemma4": build_gemma4,
    "mimo2": build_mimo_v2_flash,
    "step35": build_step3p5,
    "hunyuan-moe": build_hunyuan_v1_moe,
    "afmoe": build_afmoe,
    "gpt-oss": build_gpt_oss,
    "smallthinker": build_smallthinker,
}
"""By `general.architecture`."""
