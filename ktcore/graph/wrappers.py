"""Hub folders whose language model is a part of something: where its settings and tensors are, what is left out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

LLAVA = MappingProxyType(
    {
        "vision_tower.": "the image part",
        "multi_modal_projector.": "the image part",
    }
)


@dataclass(frozen=True)
class Wrapper:
    """How one `model_type` holds its language model, whose settings are in `text_config`.

    Attributes:
        text: `model_type` of the language model where `text_config` does not say.
        model: stands in the names of its tensors where "model." stands in those of the language model alone.
        head: the same of "lm_head".
        tied: what the wrapper's class in transformers takes where no key says whether the embeddings are tied.
        left_out: beginnings of names that belong to other parts -> which part; everything else has to be used.
    """

    text: str
    model: str = "language_model.model."
    head: str = "language_model.lm_head"
    tied: bool = False
    left_out: Mapping[str, str] = field(default_factory=lambda: LLAVA)

    def section(self, config: Mapping[str, Any]) -> Any:
        """The language model's settings: `text_config`, with the tying that the outer level says, if it does."""
        text = config.get("text_config")
        if not isinstance(text, Mapping):
            return text
        # the outer key counts first: it is what transformers ties by
        said = config.get("tie_word_embeddings", text.get("tie_word_embeddings", self.tied))
        return {**text, "model_type": text.get("model_type", self.text), "tie_word_embeddings": said}


QWEN = Wrapper("", "model.language_model.", "lm_head", left_out={"model.visual.": "the image part"})

WRAPPERS: Mapping[str, Wrapper] = MappingProxyType(
    {
        "llama4": Wrapper("llama4_text", left_out={**LLAVA, "vision_model.": "the image part"}),
        "kimi_k25": Wrapper(
            "deepseek_v3", tied=True, left_out={"vision_tower.": "the image part", "mm_projector.": "the image part"}
        ),
        "gemma4": Wrapper(
            "gemma4_text",
            "model.language_model.",
            "lm_head",
            tied=True,
            left_out={"model.vision_tower.": "the image part", "model.embed_vision.": "the image part"},
        ),
        "minimax_m3_vl": Wrapper("minimax_m3_vl_text", left_out={**LLAVA, "patch_merge_mlp.": "the image part"}),
        "step3p7": Wrapper(
            "step3p5",
            "model.",
            "lm_head",
            left_out={"vision_model.": "the image part", "vit_large_projector.": "the image part"},
        ),
        "mistral3": Wrapper("mistral", tied=True),
        "glm5_next": replace(QWEN, text="glm5_next_text"),
        "qwen3_5": replace(QWEN, text="qwen3_5_text"),
        "qwen3_5_moe": replace(QWEN, text="qwen3_5_moe_text"),
        "qwen4_exp": replace(QWEN, text="qwen4_exp_text"),
    }
)
"""By `model_type` of config.json."""
