"""A tiny random model that has a tokenizer and a chat template: a byte is a token, besides a few control tokens."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM

import ktcore

CONTROL = ("<|end|>", "<|user|>", "<|assistant|>", "<|system|>")
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# As Qwen3's: tools in the system's turn, calls and thoughts in marks.
TOOL_TEMPLATE = (
    "{% if tools %}<|system|>{% for t in tools %}{{ t | tojson }}{% endfor %}<|end|>{% endif %}"
    "{% for m in messages %}<|{{ 'user' if m.role == 'tool' else m.role }}|>"
    "{% if m.role == 'tool' %}<tool_response>{{ m.content }}</tool_response>{% else %}{{ m.content or '' }}{% endif %}"
    "{% for c in m.tool_calls or [] %}<tool_call>"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}</tool_call>{% endfor %}'
    "<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
THINKING = "{% if add_generation_prompt and enable_thinking is false %}<think></think>{% endif %}"
SIZES: dict[str, Any] = {
    "vocab_size": 264,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "max_position_embeddings": 2048,
    "eos_token_id": 256,
    "bos_token_id": None,
}


def _save(model: PreTrainedModel, folder: Path, template: str = TEMPLATE) -> Path:
    model.save_pretrained(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True) for token in CONTROL])
    backend.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>", "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module", autouse=True)
def _one_thread(one_thread: None) -> None:
    """In every test here, and in none after them."""


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    torch.manual_seed(0)
    # weights larger than a fresh model's, so that the likeliest token is not a tie
    dense = LlamaForCausalLM(LlamaConfig(**SIZES, initializer_range=0.2))
    moe = Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            **SIZES, initializer_range=0.2, head_dim=32, moe_intermediate_size=32, num_experts=8, num_experts_per_tok=2
        )
    )
    return {
        "dense": _save(dense, tmp_path_factory.mktemp("dense")),
        "moe": _save(moe, tmp_path_factory.mktemp("moe")),
        "tools": _save(dense, tmp_path_factory.mktemp("tools"), TOOL_TEMPLATE),
        "thinks": _save(dense, tmp_path_factory.mktemp("thinks"), TOOL_TEMPLATE + THINKING),
    }


@pytest.fixture
def opened(folders: dict[str, Path]) -> Iterator[Callable[..., ktcore.Model]]:
    """opened("moe", context=512): a model that the test need not close."""
    models = []

    def open_model(name: str = "moe", **options: Any) -> ktcore.Model:
        models.append(
            ktcore.load(folders[name], **{"backend": "cpu", "rules": "reference", "context": 1024, **options})
        )
        return models[-1]

    yield open_model
    for model in models:
        model.close()
