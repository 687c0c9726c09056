"""Graphs of whole published models from their headers, and what is said when headers do not fit."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from ktcore.errors import ArchitectureError, CheckpointError
from ktcore.graph import Graph, build_graph
from ktcore.ops import AttentionSpec, ExpertsSpec, LinearSpec, MLASpec, MLPSpec, MoESpec, RopeSpec, RouterSpec
from ktcore.weights.bare import BareCheckpoint

from .headers import Headers

# the hub's config.json of DeepSeek-V3, Llama-3.2-1B and Qwen3-30B-A3B, keys that matter
DEEPSEEK_V3: dict[str, Any] = {
    "model_type": "deepseek_v3",
    "vocab_size": 129280,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "num_nextn_predict_layers": 1,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "n_shared_experts": 1,
    "n_routed_experts": 256,
    "routed_scaling_factor": 2.5,
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "qk_nope_head_dim": 128,
    "topk_method": "noaux_tc",
    "n_group": 8,
    "topk_group": 4,
    "num_experts_per_tok": 8,
    "moe_layer_freq": 1,
    "first_k_dense_replace": 3,
    "norm_topk_prob": True,
    "scoring_func": "sigmoid",
    "hidden_act": "silu",
    "max_position_embeddings": 163840,
    "rms_norm_eps": 1e-06,
    "tie_word_embeddings": False,
    "rope_theta": 10000,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "attention_bias": False,
}
LLAMA_32: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "hidden_act": "silu",
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-05,
    "tie_word_embeddings": True,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
}
QWEN3_MOE: dict[str, Any] = {
    "model_type": "qwen3_moe",
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "hidden_act": "silu",
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-06,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "sliding_window": None,
    "rope_theta": 1000000.0,
    "rope_scaling": None,
}

Shapes = dict[str, tuple[int, ...]]


def _outside(c: dict[str, Any]) -> Shapes:
    h, v = c["hidden_size"], c["vocab_size"]
    shapes: Shapes = {"model.embed_tokens.weight": (v, h), "model.norm.weight": (h,)}
    return shapes if c["tie_word_embeddings"] else shapes | {"lm_head.weight": (v, h)}


def _gated(prefix: str, hidden: int, width: int) -> Shapes:
    return {
        f"{prefix}.gate_proj.weight": (width, hidden),
        f"{prefix}.up_proj.weight": (width, hidden),
        f"{prefix}.down_proj.weight": (hidden, width),
    }


def _norms(prefix: str, hidden: int) -> Shapes:
    return {f"{prefix}.input_layernorm.weight": (hidden,), f"{prefix}.post_attention_layernorm.weight": (hidden,)}


def _gqa(c: dict[str, Any], prefix: str) -> Shapes:
    h, d = c["hidden_size"], c["head_dim"]
    q, kv = c["num_attention_heads"] * d, c["num_key_value_heads"] * d
    rows = {"q": (q, h), "k": (kv, h), "v": (kv, h), "o": (h, q)}
    return {f"{prefix}.self_attn.{name}_proj.weight": shape for name, shape in rows.items()} | _norms(prefix, h)


def _llama() -> Shapes:
    c, shapes = LLAMA_32, _outside(LLAMA_32)
    for i in range(c["num_hidden_layers"]):
        p = f"model.layers.{i}"
        shapes |= _gqa(c, p) | _gated(f"{p}.mlp", c["hidden_size"], c["intermediate_size"])
    return shapes


def _qwen3_moe() -> Shapes:
    c, shapes = QWEN3_MOE, _outside(QWEN3_MOE)
    h = c["hidden_size"]
    for i in range(c["num_hidden_layers"]):
        p = f"model.layers.{i}"
        shapes |= _gqa(c, p) | {f"{p}.self_attn.{x}_norm.weight": (c["head_dim"],) for x in "qk"}
        shapes[f"{p}.mlp.gate.weight"] = (c["num_experts"], h)
        for e in range(c["num_experts"]):
            shapes |= _gated(f"{p}.mlp.experts.{e}", h, c["moe_intermediate_size"])
    return shapes


def _deepseek(c: dict[str, Any] = DEEPSEEK_V3) -> Shapes:
    shapes = _outside(c)
    h, a = c["hidden_size"], c["num_attention_heads"]
    key, latent = c["qk_nope_head_dim"] + c["qk_rope_head_dim"], c["kv_lora_rank"]
    for i in range(c["num_hidden_layers"] + c["num_nextn_predict_layers"]):
        p, s = f"model.layers.{i}", f"model.layers.{i}.self_attn"
        shapes |= _norms(p, h) | {
            f"{s}.q_a_proj.weight": (c["q_lora_rank"], h),
            f"{s}.q_a_layernorm.weight": (c["q_lora_rank"],),
            f"{s}.q_b_proj.weight": (a * key, c["q_lora_rank"]),
            f"{s}.kv_a_proj_with_mqa.weight": (latent + c["qk_rope_head_dim"], h),
            f"{s}.kv_a_layernorm.weight": (latent,),
            f"{s}.kv_b_proj.weight": (a * (c["qk_nope_head_dim"] + c["v_head_dim"]), latent),
            f"{s}.o_proj.weight": (h, a * c["v_head_dim"]),
        }
        if i < c["first_k_dense_replace"]:
            shapes |= _gated(f"{p}.mlp", h, c["intermediate_size"])
            continue
        shapes[f"{p}.mlp.gate.weight"] = (c["n_routed_experts"], h)
        shapes[f"{p}.mlp.gate.e_score_correction_bias"] = (c["n_routed_experts"],)
        shapes |= _gated(f"{p}.mlp.shared_experts", h, c["moe_intermediate_size"] * c["n_shared_experts"])
        for e in range(c["n_routed_experts"]):
            shapes |= _gated(f"{p}.mlp.experts.{e}", h, c["moe_intermediate_size"])
    p = f"model.layers.{c['num_hidden_layers']}"
    return shapes | {f"{p}.eh_proj.weight": (h, 2 * h), f"{p}.enorm.weight": (h,), f"{p}.hnorm.weight": (h,)}


def _used(graph: Graph) -> Counter[str]:
    return Counter(s for root in graph.roots() for ref in root.all_weights().values() for s in ref.sources)


def _spec(graph: Graph, name: str, kind: type[Any]) -> Any:
    spec = graph.node(name).spec
    assert isinstance(spec, kind)
    return spec


def test_deepseek_v3_uses_every_tensor_once_but_those_of_the_prediction_layer() -> None:
    shapes = _deepseek()
    graph = build_graph(Headers("hf", DEEPSEEK_V3, shapes))
    assert _used(graph) == Counter(name for name in shapes if not name.startswith("model.layers.61."))
    assert (graph.family, graph.architecture, len(graph.layers)) == ("deepseek_v3", "deepseek_v3", 61)
    assert (graph.hidden, graph.vocab, graph.context_length) == (7168, 129280, 163840)
    mla = _spec(graph, "layers.60.attn", MLASpec)
    assert mla.scale == pytest.approx(0.135234, rel=1e-5)
    assert (mla.cache.key_dim, mla.cache.value_dim, mla.cache.kv_heads) == (576, 512, 1)
    assert mla.rope.pairing == "interleaved"
    assert isinstance(graph.layers[2].ffn.spec, MLPSpec)
    assert graph.layers[2].ffn.spec.residual
    moe = _spec(graph, "layers.3.ffn", MoESpec)
    assert (moe.shared.intermediate, moe.shared.norm, moe.shared.residual) == (2048, None, False)
    router = _spec(graph, "layers.3.ffn.router", RouterSpec)
    assert (router.score, router.groups, router.groups_kept, router.group_score) == ("sigmoid", 8, 4, "top2_sum")
    assert (router.choice_bias, router.renormalise, router.scale, router.top_k) == (True, True, 2.5, 8)
    experts = graph.node("layers.60.ffn.experts")
    assert experts.weights["down"].shape == (256, 7168, 2048)
    assert experts.nbytes == 3 * 256 * 7168 * 2048 * 2
    assert experts.layer == 60


def test_llama_ties_its_head_and_stretches_its_rope() -> None:
    shapes = _llama()
    graph = build_graph(Headers("hf", LLAMA_32, shapes))
    used = _used(graph)
    assert set(used) == set(shapes)
    assert used["model.embed_tokens.weight"] == 2
    assert graph.head.spec == LinearSpec(2048, 128256, "BF16")
    attention = _spec(graph, "layers.0.attn", AttentionSpec)
    assert (attention.heads, attention.kv_heads, attention.head_dim, attention.scale) == (32, 8, 64, 0.125)
    rope = _spec(graph, "layers.0.attn.rope", RopeSpec)
    assert (rope.pairing, rope.theta, rope.scaling.kind, rope.scaling.original_context) == (
        "half",
        5e5,
        "llama3",
        8192,
    )


def test_qwen3_moe_uses_every_tensor_once() -> None:
    shapes = _qwen3_moe()
    graph = build_graph(Headers("hf", QWEN3_MOE, shapes))
    assert _used(graph) == Counter(list(shapes))
    assert _spec(graph, "layers.47.ffn", MoESpec).shared is None
    assert _spec(graph, "layers.0.attn", AttentionSpec).q_norm.dim == 128
    assert _spec(graph, "layers.0.attn.rope", RopeSpec).pairing == "half"


def test_names_are_unique_and_follow_the_specs() -> None:
    graph = build_graph(Headers("hf", QWEN3_MOE, _qwen3_moe()))
    names = [node.name for node in graph.walk()]
    assert len(names) == len(set(names))
    roots = [root.name for root in graph.roots()]
    assert roots[:3] == ["embed", "layers.0.attn", "layers.0.ffn"]
    assert roots[-3:] == ["norm", "head", "sampler"]
    for node in graph.walk():
        for role, part in node.parts.items():
            assert part.name == f"{node.name}.{role}"
            assert part.spec == getattr(node.spec, role)
            assert part.layer == node.layer


def test_both_forms_of_rope_settings_give_the_same_graph() -> None:
    merged = {k: v for k, v in DEEPSEEK_V3.items() if k not in ("rope_theta", "rope_scaling")}
    scaling = dict(DEEPSEEK_V3["rope_scaling"])
    merged["rope_parameters"] = scaling | {"rope_type": scaling.pop("type"), "rope_theta": 10000.0}
    shapes = _deepseek()
    hub, saved = (build_graph(Headers("hf", c, shapes)) for c in (DEEPSEEK_V3, merged))
    assert hub.layers[5].attn.spec == saved.layers[5].attn.spec


def test_kimi_k2_is_read_as_deepseek_v3() -> None:
    shapes = _deepseek()
    graph = build_graph(Headers("hf", DEEPSEEK_V3 | {"model_type": "kimi_k2"}, shapes))
    assert (graph.architecture, graph.family) == ("kimi_k2", "deepseek_v3")
    assert graph.layers[5].attn.spec == build_graph(Headers("hf", DEEPSEEK_V3, shapes)).layers[5].attn.spec


def test_experts_may_be_stored_fused() -> None:
    c = QWEN3_MOE
    e, h, w = c["num_experts"], c["hidden_size"], c["moe_intermediate_size"]
    shapes = {n: s for n, s in _qwen3_moe().items() if ".experts." not in n}
    for i in range(c["num_hidden_layers"]):
        shapes[f"model.layers.{i}.mlp.experts.gate_up_proj"] = (e, 2 * w, h)
        shapes[f"model.layers.{i}.mlp.experts.down_proj"] = (e, h, w)
    graph = build_graph(Headers("hf", c, shapes))
    assert set(_used(graph)) == set(shapes)
    weights = graph.node("layers.7.ffn.experts").weights
    assert (weights["gate"].rows, weights["up"].rows) == (((0, w, 1),), ((w, 2 * w, 1),))
    assert weights["gate"].shape == weights["up"].shape == (e, w, h)
    assert _spec(graph, "layers.7.ffn.experts", ExpertsSpec).intermediate == w


def test_fused_projections_have_the_sizes_of_those_stored_one_by_one() -> None:
    c = LLAMA_32 | {"rope_scaling": None}
    h, d, w = c["hidden_size"], c["head_dim"], c["intermediate_size"]
    split = {name: shape for name, shape in _llama().items() if "_proj" in name and "o_proj" not in name}
    shapes = {name: shape for name, shape in _llama().items() if name not in split or "down" in name}
    for i in range(c["num_hidden_layers"]):
        heads = c["num_attention_heads"] + 2 * c["num_key_value_heads"]
        shapes[f"model.layers.{i}.self_attn.qkv_proj.weight"] = (heads * d, h)
        shapes[f"model.layers.{i}.mlp.gate_up_proj.weight"] = (2 * w, h)
    fused = build_graph(Headers("hf", c | {"model_type": "phi3"}, shapes))
    plain = build_graph(Headers("hf", c, _llama()))
    for name in ("attn.q", "attn.k", "attn.v", "ffn.gate", "ffn.up"):
        assert fused.node(f"layers.3.{name}").spec == plain.node(f"layers.3.{name}").spec


def test_dense_layers_among_sparse_ones() -> None:
    def dense(*layers: int) -> Shapes:
        prefixes = tuple(f"model.layers.{i}.mlp." for i in layers)
        shapes = {name: shape for name, shape in _qwen3_moe().items() if not name.startswith(prefixes)}
        return shapes | {n: s for i in layers for n, s in _gated(f"model.layers.{i}.mlp", 2048, 6144).items()}

    graph = build_graph(Headers("hf", QWEN3_MOE | {"mlp_only_layers": [1]}, dense(1)))
    assert [type(layer.ffn.spec) for layer in graph.layers[:3]] == [MoESpec, MLPSpec, MoESpec]
    graph = build_graph(
        Headers(
            "hf",
            QWEN3_MOE | {"num_hidden_layers": 4, "decoder_sparse_step": 4},
            dense(0, 1, 2),
        )
    )
    assert [type(layer.ffn.spec) for layer in graph.layers] == [MLPSpec] * 3 + [MoESpec]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "bert"}, r"'bert' is not supported\n.*llama.*qwen3_moe"),
        ({"model_type": None}, "'model_type' is missing"),
        ({"hidden_size": None}, "'hidden_size' is null"),
        ({"num_attention_heads": "32"}, "num_attention_heads is '32'"),
        ({"num_key_value_heads": 7}, "32 attention heads cannot share 7"),
        ({"hidden_act": "xielu"}, "activation 'xielu' is unknown"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 4.0}}, "rope type 'longrope' is not supported"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 4.0}}, "'low_freq_factor' is missing"),
        ({"rope_scaling": {"full_attention": {"rope_type": "default"}}}, "an object of plain values is needed"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5, which architecture 'llama' is not known to"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false', true or false is needed"),
        ({"model_type": "llama4"}, "'text_config' is missing"),
        ({"model_type": "llama4", "text_config": None}, "'text_config' is null"),
        ({"model_type": "phi3"}, "rope type 'llama3' is not supported"),
        ({"model_type": "deepseek_v2", "topk_method": "noaux_tc"}, "topk_method 'noaux_tc' is unknown beside softmax"),
        (
            {"model_type": "qwen3", "layer_types": ["sliding_attention"] * 16},
            "layer 0 a sliding window, but it has no width\n.*use_sliding_window",
        ),
    ],
)
def test_configurations_that_cannot_be_read(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ArchitectureError, match=message):
        build_graph(Headers("hf", LLAMA_32 | config, _llama()))


@pytest.mark.parametrize("config", [{"head_dim": 63}, {"head_dim": 1}, {"rope_theta": 1.0}])
def test_a_rotation_that_has_no_pairs_or_no_angles_is_refused(config: dict[str, Any]) -> None:
    with pytest.raises(ArchitectureError, match=r"width \d+ and base [\d.]+ is not possible"):
        build_graph(BareCheckpoint(Path("config.json"), LLAMA_32 | config))


def test_a_tensor_of_another_shape_is_named_with_both_shapes() -> None:
    shapes = _llama() | {"model.layers.9.mlp.up_proj.weight": (8192, 1024)}
    with pytest.raises(ArchitectureError, match=r"model\.layers\.9\.mlp\.up_proj\.weight.*8192, 1024.*8192, 2048"):
        build_graph(Headers("hf", LLAMA_32, shapes))


@pytest.mark.parametrize("tensor", ["model.norm.weight", "model.layers.3.self_attn.k_proj.weight"])
def test_a_missing_tensor_is_named(tensor: str) -> None:
    shapes = _llama()
    del shapes[tensor]
    with pytest.raises(CheckpointError, match=f"tensor '{tensor}' is missing"):
        build_graph(Headers("hf", LLAMA_32, shapes))


def test_a_missing_head_is_an_error_unless_it_is_tied() -> None:
    with pytest.raises(CheckpointError, match=r"lm_head\.weight"):
        build_graph(Headers("hf", LLAMA_32 | {"tie_word_embeddings": False}, _llama()))


def test_experts_beyond_the_configured_number_are_an_error() -> None:
    with pytest.raises(ArchitectureError):
        build_graph(Headers("hf", QWEN3_MOE | {"num_experts": 64}, _qwen3_moe()))
