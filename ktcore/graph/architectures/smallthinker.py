"""SmallThinker: a router that reads the layer's input before attention, ReLU experts, and layers without positions."""

from __future__ import annotations

from ktcore.graph.attention import gqa_node
from ktcore.graph.decoder import decoder_graph, rms_eps
from ktcore.graph.defaults import Defaults
from ktcore.graph.experts import Experts, Routing, moe_node
from ktcore.graph.maker import NodeMaker
from ktcore.graph.names import ATTENTION, MOE, NameTable
from ktcore.graph.node import Graph, Node
from ktcore.graph.settings import Settings

NAMES: NameTable = {
    "ffn.router": ("block_sparse_moe.primary_router", "ffn_gate_inp"),
    "ffn.experts.gate": ("block_sparse_moe.experts.{}.gate", "ffn_gate_exps"),
    "ffn.experts.up": ("block_sparse_moe.experts.{}.up", "ffn_up_exps"),
    "ffn.experts.down": ("block_sparse_moe.experts.{}.down", "ffn_down_exps"),
}
SIGMOID = 2  # `expert_gating_func` in GGUF
PERIOD = 4  # GGUF files do not hold the layouts: every fourth layer, the first one included, is the odd one out

DEFAULTS = Defaults(gguf={"attention.sliding_window": 0, "expert_gating_func": SIGMOID})
"""Of `smallthinker` in llama.cpp. transformers has no class for it, so its config.json must say everything."""


def build_smallthinker(settings: Settings) -> Graph:
    """`smallthinker` of both kinds of checkpoint."""
    settings = settings.under(DEFAULTS)
    make = NodeMaker(settings, {**ATTENTION, **MOE, **NAMES})
    hidden = settings.integer("hidden_size", "embedding_length")
    routing = Routing(
        experts=settings.integer("moe_num_primary_experts", "expert_count"),
        top_k=settings.integer("moe_num_active_primary_experts", "expert_used_count"),
        score="softmax" if _softmax(settings) else "sigmoid",
        renormalise=True,
        on_logits=True,
    )
    width = settings.integer("moe_ffn_hidden_size", "expert_feed_forward_length")

    def attention(name: str, layer: int) -> Node:
        window = settings.integer("sliding_window_size", "attention.sliding_window", least=0)
        rotary, sliding = _layout(settings, layer, window)
        return gqa_node(make, name, layer, "half" if rotary else None, window=window if sliding else 0)

    def ffn(name: str, layer: int) -> Node:
        kind = Experts(activation="relu")
        return moe_node(make, name, hidden, width, rms_eps(make), routing, kind=kind, early_router=True)

    return decoder_graph(make, "gqa_moe", attention, ffn)


def _layout(s: Settings, layer: int, window: int) -> tuple[bool, bool]:
    """Whether a layer rotates q and k, and whether it attends within a window."""
    if s.gguf:
        regular = not window or layer % PERIOD != 0
        return regular, regular
    rope, sliding = s.sequence("rope_layout"), s.sequence("sliding_window_layout")
    return layer >= len(rope) or bool(rope[layer]), layer < len(sliding) and bool(sliding[layer])


def _softmax(s: Settings) -> bool:
    if s.gguf:
        function = s.integer("", "expert_gating_func", least=0) or SIGMOID
        if function not in (1, SIGMOID):
            raise s.error(f"expert_gating_func {function} is unknown", "known: 1 (softmax), 2 (sigmoid)")
        return function != SIGMOID
    if s.given("moe_enable_secondary_experts") or s.given("use_qk_norm"):
        raise s.error("secondary experts and norms of q and k, which no released SmallThinker has, are not supported")
    return s.flag("moe_primary_router_apply_softmax", "")
