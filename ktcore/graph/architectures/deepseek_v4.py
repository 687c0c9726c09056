"""DeepSeek-V4: hyper-connections, attention over a window and compressed entries, experts that clamp their inputs."""

from __future__ import annotations

from ktcore.graph.architectures.deepseek_v4_attention import attention_node, layer_kinds
from ktcore.graph.complete import FURTHER
from ktcore.graph.decoder import decoder_graph, rms_eps
from ktcore.graph.defaults import Defaults
from ktcore.graph.experts import Experts, Routing, moe_node
from ktcore.graph.maker import NodeMaker
from ktcore.graph.names import NameTable
from ktcore.graph.node import Graph, Node
from ktcore.graph.settings import Settings
from ktcore.graph.streams import hyper_connections
from ktcore.ops.mlp import ClampedGLU

ROOT_SOFTPLUS = 4  # `expert_gating_func` in GGUF
HASHED = "hash_moe"

NAMES: NameTable = {
    "embed": ("embed", "token_embd"),
    "norm": ("norm", "output_norm"),
    "head": ("head", "output"),
    "end.mix": ("hc_head", "output_hc"),
    "attn_branch.mix": ("hc_attn", "hc_attn"),
    "ffn_branch.mix": ("hc_ffn", "hc_ffn"),
    "attn.norm": ("attn_norm", "attn_norm"),
    "attn.q_a": ("attn.wq_a", "attn_q_a"),
    "attn.q_a_norm": ("attn.q_norm", "attn_q_a_norm"),
    "attn.q_b": ("attn.wq_b", "attn_q_b"),
    "attn.kv": ("attn.wkv", "attn_kv"),
    "attn.kv_norm": ("attn.kv_norm", "attn_kv_a_norm"),
    "attn.o_a": ("attn.wo_a", "attn_output_a"),
    "attn.o_b": ("attn.wo_b", "attn_output_b"),
    "attn.sinks": ("attn.attn_sink", "attn_sinks.weight"),
    "attn.pool_values": ("attn.compressor.wkv", "attn_compressor_kv"),
    "attn.pool_gates": ("attn.compressor.wgate", "attn_compressor_gate"),
    "attn.pool_norm": ("attn.compressor.norm", "attn_compressor_norm"),
    "attn.ape": ("attn.compressor.ape", "attn_compressor_ape.weight"),
    "attn.indexer.q": ("attn.indexer.wq_b", "indexer.attn_q_b"),
    "attn.indexer.weights": ("attn.indexer.weights_proj", "indexer.proj"),
    "attn.indexer.pool_values": ("attn.indexer.compressor.wkv", "indexer_compressor_kv"),
    "attn.indexer.pool_gates": ("attn.indexer.compressor.wgate", "indexer_compressor_gate"),
    "attn.indexer.pool_norm": ("attn.indexer.compressor.norm", "indexer_compressor_norm"),
    "attn.indexer.ape": ("attn.indexer.compressor.ape", "indexer_compressor_ape.weight"),
    "ffn.norm": ("ffn_norm", "ffn_norm"),
    "ffn.router": ("ffn.gate", "ffn_gate_inp"),
    "ffn.router.bias": ("ffn.gate.bias", "exp_probs_b.bias"),
    "ffn.router.table": ("ffn.gate.tid2eid", "ffn_gate_tid2eid.weight"),
    "ffn.experts.gate": ("ffn.experts.{}.w1", "ffn_gate_exps"),
    "ffn.experts.up": ("ffn.experts.{}.w3", "ffn_up_exps"),
    "ffn.experts.down": ("ffn.experts.{}.w2", "ffn_down_exps"),
    "ffn.shared.gate": ("ffn.shared_experts.w1", "ffn_gate_shexp"),
    "ffn.shared.up": ("ffn.shared_experts.w3", "ffn_up_shexp"),
    "ffn.shared.down": ("ffn.shared_experts.w2", "ffn_down_shexp"),
}

DEFAULTS = Defaults(
    hub={
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "num_key_value_heads": 1,
        "head_dim": 512,
        "q_lora_rank": 1024,
        "max_position_embeddings": 1048576,
        "rope_theta": 10000.0,
        "compress_rope_theta": 160000.0,
        "partial_rotary_factor": None,
        "qk_rope_head_dim": None,
        "layer_types": None,
        "compress_ratios": None,
        "compress_rates": None,
        "compress_rate_csa": None,
        "compress_rate_hca": None,
        "sliding_window": 128,
        "o_groups": 8,
        "o_lora_rank": 1024,
        "index_n_heads": 64,
        "index_head_dim": 128,
        "index_topk": 512,
        "hc_mult": 4,
        "hc_sinkhorn_iters": 20,
        "hc_eps": 1e-6,
        "mlp_layer_types": None,
        "num_hash_layers": None,
        "moe_intermediate_size": 2048,
        "n_routed_experts": 256,
        "num_experts_per_tok": 6,
        "n_shared_experts": 1,
        "routed_scaling_factor": 1.5,
        "swiglu_limit": 10.0,
        "mlp_bias": False,
    },
    null=dict.fromkeys(
        (
            "partial_rotary_factor",
            "qk_rope_head_dim",
            "layer_types",
            "compress_ratios",
            "compress_rates",
            "compress_rate_csa",
            "compress_rate_hca",
            "mlp_layer_types",
            "num_hash_layers",
        )
    ),
    only={
        "scoring_func": ("sqrtsoftplus",),
        "norm_topk_prob": (True,),
        "num_key_value_heads": (1,),
        "n_shared_experts": (1,),
        "hidden_act": ("silu",),
    },
    # of the shared experts; attention has none, whatever attention_bias says
    biases=dict.fromkeys(("gate", "up", "down"), "mlp_bias"),
    left_out={"mtp.": FURTHER},
)
"""Of `DeepseekV4Config`, with the keys of the hub's files that it takes over, and of `deepseek4` in llama.cpp."""

HASH_LAYERS = 3  # where neither key says


def build_deepseek_v4(settings: Settings) -> Graph:
    """`deepseek_v4` of hub folders, whose tensors have names of their own, `deepseek4` of GGUF files."""
    settings = settings.under(DEFAULTS)
    make = NodeMaker(settings, NAMES, model="")
    hidden = settings.integer("hidden_size", "embedding_length")
    kinds = layer_kinds(settings)
    hashed = _hashed(settings)
    eps = rms_eps(make)
    streams = hyper_connections(
        make,
        hidden,
        settings.integer("hc_mult", "hyper_connection.count"),
        rounds=settings.integer("hc_sinkhorn_iters", "hyper_connection.sinkhorn_iterations"),
        eps=settings.number("hc_eps", "hyper_connection.epsilon"),
        rms_eps=eps,
        weighted_end=True,
    )

    def ffn(name: str, layer: int) -> Node:
        width = settings.integer("moe_intermediate_size", "expert_feed_forward_length", layer=layer)
        shared = settings.integer("n_shared_experts", "expert_shared_count", least=0)
        limit = of_shared = _limit(settings, "swiglu_clamp_exp", layer)
        if settings.given("", "swiglu_clamp_shexp") is not None:
            of_shared = _limit(settings, "swiglu_clamp_shexp", layer)
        return moe_node(
            make,
            name,
            hidden,
            width,
            eps,
            _routing(make, hashed[layer]),
            shared * width,
            shared_clamped=of_shared,
            kind=Experts(clamped=limit),
            residual=False,
        )

    return decoder_graph(
        make, "deepseek_v4", lambda name, layer: attention_node(make, name, kinds[layer]), ffn, streams
    )


def _routing(make: NodeMaker, hashed: bool) -> Routing:
    s = make.settings
    if s.gguf and s.integer("", "expert_gating_func") != ROOT_SOFTPLUS:
        raise s.error(
            f"expert_gating_func is {s.given('', 'expert_gating_func')}, known is {ROOT_SOFTPLUS} (root of softplus)"
        )
    if not s.flag("", "expert_weights_norm", without=True):
        raise s.error("expert_weights_norm is false, but weights of this architecture's experts add up to the scale")
    return Routing(
        experts=s.integer("n_routed_experts|num_local_experts", "expert_count"),
        top_k=s.integer("num_experts_per_tok", "expert_used_count"),
        choice_bias=not hashed,
        renormalise=True,
        renorm_eps=1e-20,
        scale=s.number("routed_scaling_factor", "expert_weights_scale"),
        by_token=s.integer("vocab_size", "", without=_rows(make)) if hashed else 0,
        root_softplus=True,
    )


def _rows(make: NodeMaker) -> int:
    tensor = make.settings.checkpoint.tensors.get(make.names.of("embed") + ".weight")
    return tensor.shape[0] if tensor is not None else 0


def _hashed(s: Settings) -> list[bool]:
    """Which layers go by token ids: `mlp_layer_types`, or the first `num_hash_layers`."""
    layers = s.layers()
    kinds = s.get("mlp_layer_types", "", without=None)
    if kinds is None:
        first = s.get("num_hash_layers", "hash_layer_count")
        first = HASH_LAYERS if first is None else s.integer("num_hash_layers", "hash_layer_count", least=0)
        return [layer < first for layer in range(layers)]
    if not isinstance(kinds, list) or len(kinds) < layers or not set(kinds[:layers]) <= {HASHED, "moe"}:
        raise s.error(f"mlp_layer_types is {kinds!r}, '{HASHED}' or 'moe' is needed for each of {layers} layers")
    return [kind == HASHED for kind in kinds[:layers]]


def _limit(s: Settings, key: str, layer: int) -> ClampedGLU | None:
    """SwiGLU's; GGUF files may hold 0 for none."""
    value = s.get("swiglu_limit", key, layer=layer)
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not 0 <= value < float("inf") or (value == 0 and not s.gguf):
        raise s.error(f"{key if s.gguf else 'swiglu_limit'} is {value!r}, a number above 0 is needed")
    return ClampedGLU(1.0, float(value), plus=0.0) if value else None
