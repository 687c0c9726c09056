"""DeepSeek-V3.2 and GLM-5 to 5.2: DeepSeek-V3 whose attention is over the tokens that an indexer chooses."""

from __future__ import annotations

from collections.abc import Sequence

from ktcore.graph.architectures.deepseek_mla import Sparse, mla_node
from ktcore.graph.architectures.deepseek_moe import DEEPSEEK_GGUF, deepseek_ffn
from ktcore.graph.decoder import decoder_graph
from ktcore.graph.defaults import DERIVED, Defaults
from ktcore.graph.gating import SIGMOID
from ktcore.graph.maker import NodeMaker
from ktcore.graph.names import INDEXER, MLA, MOE
from ktcore.graph.node import Graph, Node
from ktcore.graph.settings import Settings
from ktcore.ops.rope import Pairing

FULL, SHARED = "full", "shared"
_COMMON = {
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "rope_theta": 10000.0,
    "rope_interleave": True,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "moe_layer_freq": 1,
    "attention_bias": False,
    "mlp_layer_types": None,
    "first_k_dense_replace": 3,
    "n_shared_experts": 1,
    "n_routed_experts": 256,
    "num_experts_per_tok": 8,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "moe_intermediate_size": 2048,
    "index_topk": 2048,
    "index_head_dim": 128,
}
_BIASES = dict.fromkeys(("q_a", "kv_a", "o"), "attention_bias")

V32 = Defaults(
    hub={
        **_COMMON,
        "rms_norm_eps": 1e-6,
        "n_group": 8,
        "topk_group": 4,
        "index_n_heads": 64,
        "indexer_rope_interleave": False,
    },
    null={"mlp_layer_types": None},
    biases=_BIASES,
)
"""Of `DeepseekV32Config`; keys that it lacks are what its code does."""

GLM = Defaults(
    hub={
        **_COMMON,
        "rms_norm_eps": 1e-5,
        "n_group": 1,
        "topk_group": 1,
        "index_n_heads": 32,
        "indexer_rope_interleave": True,
        "indexer_types": None,
        "index_topk_pattern": None,
        "index_topk_freq": 1,
        "index_skip_topk_offset": 2,
    },
    null={"mlp_layer_types": None, "indexer_types": None, "index_topk_pattern": None},
    biases=_BIASES,
)
"""Of `GlmMoeDsaConfig`."""


_GGUF = {
    **DEEPSEEK_GGUF,
    "expert_gating_func": SIGMOID,
    "attention.key_length_mla": DERIVED,
    "attention.value_length_mla": DERIVED,
}
GGUF_V32 = Defaults(gguf=_GGUF)
"""Of `deepseek32` in llama.cpp, which wants the gating function and knows no other."""
GGUF_GLM = Defaults(gguf={**_GGUF, "attention.indexer.types": DERIVED})
"""Of `glm-dsa` in llama.cpp."""
LONG = 1048576
"""Context of GLM-5.2, by which llama.cpp knows its files where they do not say which layers have an indexer."""


def build_deepseek_v32(settings: Settings) -> Graph:
    """`deepseek_v32` of hub folders: an indexer in every layer, rotated by halves where attention rotates pairs."""
    settings = settings.under(V32)
    return _build(settings, _pairing(settings), [FULL] * settings.layers())


def build_glm_moe_dsa(settings: Settings) -> Graph:
    """`glm_moe_dsa` of hub folders, GLM-5 to 5.2: layers may share the choice of the last one with an indexer."""
    settings = settings.under(GLM)
    return _build(settings, _pairing(settings), indexer_types(settings))


def build_deepseek32(settings: Settings) -> Graph:
    """`deepseek32` of GGUF files."""
    settings = settings.under(GGUF_V32)
    return _build(settings, "half", [FULL] * settings.layers())


def build_glm_dsa(settings: Settings) -> Graph:
    """`glm-dsa` of GGUF files."""
    settings = settings.under(GGUF_GLM)
    long = settings.integer("", "context_length") >= LONG
    kinds = []
    for layer in range(settings.layers() - settings.integer("", "nextn_predict_layers", least=0)):
        known = not long or layer < 2 or layer % 4 == 2
        full = settings.get("", "attention.indexer.types", derived=known, layer=layer)
        if full not in (0, 1):
            raise settings.error(f"attention.indexer.types is {full!r} for layer {layer}, true or false is needed")
        kinds.append(FULL if full else SHARED)
    return _build(settings, "interleaved", _begun(settings, kinds, "attention.indexer.types"))


def _build(settings: Settings, pairing: Pairing, kinds: Sequence[str]) -> Graph:
    make = NodeMaker(settings, {**MLA, **INDEXER, **MOE})
    attention = [Sparse(pairing if kind == FULL else None) for kind in kinds]
    ffn = deepseek_ffn(make)

    def sparse(name: str, layer: int) -> Node:
        return mla_node(make, name, sparse=attention[layer])

    def further(name: str, layer: int) -> Node:
        # an indexer of its own, where the file holds it: the choice of the model's last layer is of another text
        return mla_node(make, name, sparse=Sparse(pairing) if make.has(f"{name}.indexer.q") else None)

    return decoder_graph(make, "deepseek_sparse", sparse, ffn, further=(further, ffn))


def _pairing(s: Settings) -> Pairing:
    """Of index heads; transformers' classes have it in their code, the hub's files and other engines as a key."""
    return "interleaved" if s.flag("indexer_rope_interleave", "") else "half"


def indexer_types(s: Settings) -> list[str]:
    """Each layer's kind, as `GlmMoeDsaConfig.__post_init__` derives it: a list, a pattern of letters, or every n-th."""
    layers = s.layers()
    kinds = s.get("indexer_types", "")
    if kinds is None:
        kinds = s.get("index_topk_pattern", "")
        if isinstance(kinds, str):
            kinds = [{"F": FULL, "S": SHARED}.get(letter, letter) for letter in kinds]
    if kinds is None:
        every = max(s.integer("index_topk_freq", "", least=0), 1)
        offset = s.integer("index_skip_topk_offset", "", least=0)
        return [FULL if max(i - offset + 1, 0) % every == 0 else SHARED for i in range(layers)]
    if not isinstance(kinds, list) or len(kinds) < layers or not set(kinds) <= {FULL, SHARED}:
        raise s.error(f"indexer_types is {kinds!r}, '{FULL}' or '{SHARED}' is needed for each of {layers} layers")
    return _begun(s, kinds[:layers], "indexer_types")


def _begun(s: Settings, kinds: list[str], key: str) -> list[str]:
    if kinds[0] != FULL:
        raise s.error(f"{key} says that the first layer shares an indexer, but no layer comes before it")
    return kinds
