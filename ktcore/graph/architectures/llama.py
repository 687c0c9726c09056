"""LLaMA 1 to 3, SmolLM2, Mistral, and dense Qwen 2 and 3: grouped-query attention and a gated MLP in every layer."""

from __future__ import annotations

from collections.abc import Callable

from ktcore.graph.architectures.mixtral import build_mixtral
from ktcore.graph.attention import gqa_node
from ktcore.graph.decoder import decoder_graph, rms_eps
from ktcore.graph.defaults import ALWAYS, DERIVED, Defaults
from ktcore.graph.maker import NodeMaker
from ktcore.graph.names import ATTENTION, MLP
from ktcore.graph.node import Graph, Node
from ktcore.graph.rotary import rope_section
from ktcore.graph.settings import Settings
from ktcore.graph.windows import every_window, upper_window
from ktcore.ops.rope import Pairing

LLAMA = Defaults(
    hub={
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "rope_theta": 10000.0,
        "num_key_value_heads": None,
        "head_dim": None,
        "attention_bias": False,
        "mlp_bias": False,
    },
    null={"num_key_value_heads": DERIVED, "head_dim": DERIVED},
    biases=dict.fromkeys("qkvo", "attention_bias") | dict.fromkeys(("gate", "up", "down"), "mlp_bias"),
)
"""Of `LlamaConfig`."""

MISTRAL = Defaults(
    hub={**LLAMA.hub, "num_key_value_heads": 8, "sliding_window": 4096},
    null={"head_dim": DERIVED, "sliding_window": 0},
)
"""Of `MistralConfig`."""

QWEN2 = Defaults(
    hub={
        **LLAMA.hub,
        "num_key_value_heads": 32,
        "head_dim": DERIVED,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "max_window_layers": 28,
        "layer_types": None,
    },
    null={"num_key_value_heads": DERIVED, "sliding_window": 0, "layer_types": []},
    biases=dict.fromkeys("qkv", ALWAYS),
)
"""Of `Qwen2Config`."""

QWEN3 = Defaults(hub={**QWEN2.hub, "head_dim": 128}, null=QWEN2.null, biases=dict.fromkeys("qkvo", "attention_bias"))
"""Of `Qwen3Config`."""

PHI3 = Defaults(
    hub={
        **LLAMA.hub,
        "rms_norm_eps": 1e-5,
        "head_dim": DERIVED,
        "partial_rotary_factor": 1.0,
        "sliding_window": None,
    },
    null={"num_key_value_heads": DERIVED, "sliding_window": 0},
)
"""Of `Phi3Config`."""

Window = Callable[[Settings, int], int]


def build_llama(settings: Settings) -> Graph:
    """`llama` of both kinds of checkpoint; `llama` GGUF files with experts are Mixtral's."""
    settings = settings.under(LLAMA)
    if settings.integer("", "expert_count", least=0, without=0) > 0:
        return build_mixtral(settings)
    # converters to GGUF permute the rows of q and k, so the same model pairs them differently there
    return _dense(settings, "interleaved" if settings.gguf else "half")


def build_mistral(settings: Settings) -> Graph:
    """`mistral` of hub folders: a window in all layers, without a switch."""
    return _dense(settings.under(MISTRAL), "half", lambda s, _: every_window(s))


def build_qwen2(settings: Settings) -> Graph:
    """`qwen2`: biases on q, k and v."""
    return _dense(settings.under(QWEN2), "half", upper_window)


def build_qwen3(settings: Settings) -> Graph:
    """`qwen3`: RMSNorm over the heads of q and k."""
    return _dense(settings.under(QWEN3), "half", upper_window, qk_norm=True)


def build_phi3(settings: Settings) -> Graph:
    """`phi3` of hub folders: q, k and v in one tensor, gate and up in another."""
    settings = settings.under(PHI3)
    kind = rope_section(settings).get("rope_type", "")
    if kind != "default":
        raise settings.error(
            f"rope type {kind!r} is not supported", "architecture 'phi3' is read without long contexts"
        )
    return _dense(settings, "half", lambda s, _: every_window(s), partial=True)


def _dense(
    settings: Settings,
    pairing: Pairing,
    window: Window = lambda s, layer: 0,
    *,
    qk_norm: bool = False,
    partial: bool = False,
) -> Graph:
    """A dense decoder with grouped-query attention."""
    make = NodeMaker(settings, {**ATTENTION, **MLP})
    hidden = settings.integer("hidden_size", "embedding_length")

    def attention(name: str, layer: int) -> Node:
        size = window(settings, layer)
        return gqa_node(make, name, layer, pairing, qk_norm=qk_norm, window=size, partial=partial)

    def ffn(name: str, layer: int) -> Node:
        width = settings.integer("intermediate_size", "feed_forward_length", layer=layer)
        return make.mlp(name, hidden, width, eps=rms_eps(make))

    return decoder_graph(make, "llama", attention, ffn)
