"""The feed-forward branches of DeepSeek and of those who took them over: dense layers first, then routed experts
beside shared ones."""

from __future__ import annotations

from ktcore.graph.decoder import Branch, rms_eps
from ktcore.graph.experts import Routing, moe_node
from ktcore.graph.gating import is_dense, is_sigmoid
from ktcore.graph.maker import NodeMaker
from ktcore.graph.node import Node
from ktcore.graph.settings import Settings

METHODS = {"softmax": ("greedy", "group_limited_greedy"), "sigmoid": ("noaux_tc",)}
DEEPSEEK_GGUF = {
    "leading_dense_block_count": 0,
    "expert_group_count": 0,
    "expert_weights_norm": False,
}
"""What llama.cpp takes where a file of DeepSeek's or GLM's lacks these keys."""


def deepseek_ffn(make: NodeMaker, *, listed: bool = False, routing: Routing | None = None) -> Branch:
    """Makes a layer's branch: an MLP in the first layers, experts in the others.

    Args:
        listed: hub folders say by `mlp_layer_types` which layers are dense.
        routing: None takes that of DeepSeek's keys.
    """
    settings = make.settings
    hidden = settings.integer("hidden_size", "embedding_length")
    listed = listed and not settings.gguf
    dense = [] if listed else dense_layers(settings)
    if settings.integer("moe_layer_freq", "", without=1) != 1:
        raise settings.error("moe_layer_freq is not 1: experts in every second layer are not supported")
    first = 1 if listed else next((i for i, is_one in enumerate(dense) if not is_one), len(dense))
    routing = routing or deepseek_routing(make, first)
    shared = settings.integer("n_shared_experts", "expert_shared_count", least=0)

    def ffn(name: str, layer: int) -> Node:
        # layers that predict further tokens come behind those that lists tell of, and have experts
        if is_dense(make, name, layer) if listed else dense[layer : layer + 1] == [True]:
            width = settings.integer("intermediate_size", "feed_forward_length", layer=layer)
            return make.mlp(name, hidden, width, eps=rms_eps(make))
        width = settings.integer("moe_intermediate_size", "expert_feed_forward_length", layer=layer)
        return moe_node(make, name, hidden, width, rms_eps(make), routing, shared * width)

    return ffn


def dense_layers(s: Settings) -> list[bool]:
    """Which layers have an MLP: the first ones, unless a list says it layer by layer, as the later classes have it."""
    layers = s.layers()
    first = s.integer("first_k_dense_replace", "leading_dense_block_count", least=0)
    kinds = s.get("mlp_layer_types", "", without=None) if "mlp_layer_types" in s.defaults.hub else None
    if kinds is None:
        return [i < first for i in range(layers)]
    if not isinstance(kinds, list) or len(kinds) < layers or not set(kinds) <= {"dense", "sparse"}:
        raise s.error(f"mlp_layer_types is {kinds!r}, 'dense' or 'sparse' is needed for each of {layers} layers")
    return [kind == "dense" for kind in kinds]


def deepseek_routing(make: NodeMaker, first_sparse: int) -> Routing:
    """Of DeepSeek's keys; a GGUF file's layer `first_sparse` tells whether a bias helps to choose."""
    s = make.settings
    biased = not s.gguf or make.has(f"layers.{first_sparse}.ffn.router.bias", "")
    sigmoid = _sigmoid(s, biased)
    groups, kept = _groups(s, "sigmoid" if sigmoid else "softmax")
    # transformers ignores norm_topk_prob for V2, and no released V2 sets it
    renormalise = s.architecture != "deepseek_v2" and s.flag("norm_topk_prob", "expert_weights_norm")
    scale = s.number("routed_scaling_factor", "expert_weights_scale")
    return Routing(
        experts=s.integer("n_routed_experts|num_local_experts|num_experts", "expert_count"),
        top_k=s.integer("num_experts_per_tok", "expert_used_count"),
        score="sigmoid" if sigmoid else "softmax",
        choice_bias=sigmoid and biased,
        groups=groups,
        groups_kept=kept,
        group_score="top2_sum" if sigmoid else "max",
        renormalise=renormalise,
        renorm_eps=1e-20,
        # converters to GGUF write 0 where there is none
        scale=scale or 1.0 if s.gguf else scale,
    )


def _groups(s: Settings, score: str) -> tuple[int, int]:
    """Groups of experts, and how many of them are kept."""
    if s.gguf:
        return gguf_groups(s)
    method = s.get("topk_method", "")
    if method not in METHODS[score]:
        raise s.error(f"topk_method {method!r} is unknown beside {score} scores", f"known: {', '.join(METHODS[score])}")
    if method == "greedy":
        return 1, 1
    return s.integer("n_group", ""), s.integer("topk_group", "")


def gguf_groups(s: Settings) -> tuple[int, int]:
    """Groups of experts of a GGUF file, and how many of them are kept."""
    groups = s.integer("", "expert_group_count", least=0)
    # llama.cpp, too, needs the second key beside the first, and does not look at it otherwise
    return (groups, s.integer("", "expert_group_used_count")) if groups > 1 else (1, 1)


def _sigmoid(s: Settings, biased: bool) -> bool:
    if s.gguf:
        # DeepSeek-V2's files came before the key, GLM-4.7-Flash's converter knows none to write: softmax has no bias
        return is_sigmoid(s) or (biased and not s.given("", "expert_gating_func"))
    # configs saved by transformers do not hold scoring_func: its class decides
    name = s.get("scoring_func", "")
    if name not in ("softmax", "sigmoid"):
        raise s.error(f"scoring_func {name!r} is unknown", "known: softmax, sigmoid")
    return bool(name == "sigmoid")
