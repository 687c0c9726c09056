"""What GGUF metadata leaves out, says twice, or says with an array."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from ktcore.errors import ArchitectureError, CheckpointError
from ktcore.graph import build_graph
from ktcore.ops import AttentionSpec, MLASpec, MLPSpec, MoESpec, RopeSpec, RouterSpec, Temperature
from ktcore.weights import TensorInfo

from .headers import Headers

H, HEADS, KEY, ROPE, VALUE, LATENT, EXPERTS, WIDTH = 64, 4, 24, 8, 16, 32, 8, 20

DEEPSEEK: dict[str, Any] = {
    "general.architecture": "deepseek2",
    "deepseek2.block_count": 3,
    "deepseek2.context_length": 4096,
    "deepseek2.embedding_length": H,
    "deepseek2.feed_forward_length": 128,
    "deepseek2.attention.head_count": HEADS,
    "deepseek2.attention.head_count_kv": 1,
    "deepseek2.attention.key_length": LATENT + ROPE,
    "deepseek2.attention.value_length": LATENT,
    "deepseek2.attention.key_length_mla": KEY,
    "deepseek2.attention.value_length_mla": VALUE,
    "deepseek2.attention.kv_lora_rank": LATENT,
    "deepseek2.attention.layer_norm_rms_epsilon": 1e-5,
    "deepseek2.rope.dimension_count": ROPE,
    "deepseek2.expert_count": EXPERTS,
    "deepseek2.expert_used_count": 3,
    "deepseek2.expert_feed_forward_length": WIDTH,
    "deepseek2.expert_shared_count": 2,
    "deepseek2.leading_dense_block_count": 1,
}
LLAMA: dict[str, Any] = {
    "general.architecture": "llama",
    "llama.block_count": 2,
    "llama.context_length": 4096,
    "llama.embedding_length": H,
    "llama.feed_forward_length": 96,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
}
Shapes = dict[str, tuple[int, ...]]


def _gated(prefix: str, suffix: str, width: int) -> Shapes:
    shapes = {"gate": (width, H), "up": (width, H), "down": (H, width)}
    return {f"{prefix}.ffn_{name}{suffix}.weight": shape for name, shape in shapes.items()}


def _experts(prefix: str, count: int = EXPERTS) -> Shapes:
    return {
        f"{prefix}.ffn_gate_inp.weight": (count, H),
        f"{prefix}.ffn_gate_exps.weight": (count, WIDTH, H),
        f"{prefix}.ffn_up_exps.weight": (count, WIDTH, H),
        f"{prefix}.ffn_down_exps.weight": (count, H, WIDTH),
    }


def _outside() -> Shapes:
    return {"token_embd.weight": (256, H), "output.weight": (256, H), "output_norm.weight": (H,)}


def _deepseek(layers: int = 3) -> Shapes:
    shapes = _outside()
    for i in range(layers):
        p = f"blk.{i}"
        shapes |= {
            f"{p}.attn_norm.weight": (H,),
            f"{p}.ffn_norm.weight": (H,),
            f"{p}.attn_q.weight": (HEADS * KEY, H),
            f"{p}.attn_kv_a_mqa.weight": (LATENT + ROPE, H),
            f"{p}.attn_kv_a_norm.weight": (LATENT,),
            f"{p}.attn_k_b.weight": (HEADS, LATENT, KEY - ROPE),
            f"{p}.attn_v_b.weight": (HEADS, VALUE, LATENT),
            f"{p}.attn_output.weight": (H, HEADS * VALUE),
        }
        if i == 0:
            shapes |= _gated(p, "", 128)
            continue
        shapes |= _experts(p) | _gated(p, "_shexp", 2 * WIDTH)
    return shapes


def _llama(kv: int = 2, width: int = 96) -> Shapes:
    shapes = _outside()
    for i in range(2):
        p = f"blk.{i}"
        shapes |= {f"{p}.attn_norm.weight": (H,), f"{p}.ffn_norm.weight": (H,)} | _gated(p, "", width)
        rows = {"q": 64, "k": kv * 16, "v": kv * 16, "output": 64}
        shapes |= {f"{p}.attn_{name}.weight": (n, H) for name, n in rows.items()}
    return shapes


def _sparse(name: str, dense: int | None = None, experts: int = EXPERTS) -> tuple[dict[str, Any], Shapes]:
    """Two layers with LLaMA's attention and routed experts; `dense` has an MLP instead."""
    keys = {
        "expert_count": experts,
        "expert_used_count": 1,
        "expert_shared_count": 1,
        "expert_feed_forward_length": WIDTH,
        "expert_shared_feed_forward_length": WIDTH,
    }
    config = {key.replace("llama.", f"{name}."): value for key, value in LLAMA.items()}
    config |= {"general.architecture": name} | {f"{name}.{key}": value for key, value in keys.items()}
    norm = "post_attention_norm" if name == "glm4moe" else "ffn_norm"
    shapes = {n.replace("ffn_norm", norm): s for n, s in _llama().items() if ".ffn_" not in n or "norm" in n}
    for i in range(2):
        p = f"blk.{i}"
        shapes |= _gated(p, "", 96) if i == dense else _experts(p, experts)
        if i != dense and name != "qwen3moe":
            shapes |= _gated(p, "_shexp", WIDTH)
        if name == "qwen2moe":
            shapes[f"{p}.ffn_gate_inp_shexp.weight"] = (H,)
        if name == "qwen3moe":
            shapes |= {f"{p}.attn_{x}_norm.weight": (16,) for x in "qk"}
    return config, shapes


def _router(config: dict[str, Any], shapes: Shapes | None = None) -> RouterSpec:
    spec = build_graph(Headers("gguf", DEEPSEEK | config, shapes or _deepseek())).node("layers.1.ffn.router").spec
    assert isinstance(spec, RouterSpec)
    return spec


def test_absent_routing_keys_mean_plain_softmax() -> None:
    router = _router({})
    assert (router.score, router.choice_bias, router.renormalise, router.scale) == ("softmax", False, False, 1.0)
    assert (router.groups, router.groups_kept, router.top_k) == (1, 1, 3)


def test_routing_keys_are_read() -> None:
    bias = {f"blk.{i}.exp_probs_b.bias": (EXPERTS,) for i in (1, 2)}
    keys = {
        "expert_gating_func": 2,
        "expert_weights_norm": True,
        "expert_weights_scale": 2.5,
        "expert_group_count": 4,
        "expert_group_used_count": 2,
    }
    router = _router({f"deepseek2.{k}": v for k, v in keys.items()}, _deepseek() | bias)
    assert (router.score, router.choice_bias, router.renormalise, router.scale) == ("sigmoid", True, True, 2.5)
    assert (router.groups, router.groups_kept, router.group_score) == (4, 2, "top2_sum")


@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_a_scale_of_0_means_none(scale: float) -> None:
    assert _router({"deepseek2.expert_weights_scale": scale}).scale == 1.0


def test_softmax_groups_are_scored_by_their_best() -> None:
    router = _router({"deepseek2.expert_group_count": 4, "deepseek2.expert_group_used_count": 2})
    assert router.group_score == "max"


def test_a_number_of_groups_alone_is_refused_as_by_llama_cpp() -> None:
    """Its `load_hparams` asserts that some of several groups are kept, and does not ask where there is one."""
    for used in ({}, {"deepseek2.expert_group_used_count": 0}):
        with pytest.raises(ArchitectureError, match=r"expert_group_used_count"):
            _router({"deepseek2.expert_group_count": 4} | used)
    router = _router({"deepseek2.expert_group_count": 1, "deepseek2.expert_group_used_count": 2})
    assert (router.groups, router.groups_kept) == (1, 1)


@pytest.mark.parametrize(
    ("name", "score", "renormalise"),
    [("qwen2moe", "softmax", False), ("qwen3moe", "softmax", True), ("glm4moe", "sigmoid", False)],
)
def test_absent_routing_keys_are_those_of_llama_cpp(name: str, score: str, renormalise: bool) -> None:
    """Its src/models: qwen3moe.cpp renormalises whatever the file says, glm4-moe.cpp takes sigmoid for no function."""
    config, shapes = _sparse(name)
    router = build_graph(Headers("gguf", config, shapes)).node("layers.0.ffn.router").spec
    assert isinstance(router, RouterSpec)
    assert (router.score, router.renormalise, router.scale, router.groups) == (score, renormalise, 1.0, 1)
    if name == "glm4moe":
        softmax = build_graph(Headers("gguf", config | {"glm4moe.expert_gating_func": 1}, shapes))
        assert softmax.node("layers.0.ffn.router").spec == replace(router, score="softmax", group_score="max")


def test_a_choice_bias_without_a_gating_function_is_of_sigmoid() -> None:
    """GLM-4.7-Flash's files, whose converter knows no function to write."""
    shapes = _deepseek() | {f"blk.{i}.exp_probs_b.bias": (EXPERTS,) for i in (1, 2)}
    router = _router({}, shapes)
    assert (router.score, router.choice_bias) == ("sigmoid", True)
    with pytest.raises(ArchitectureError, match=r"nothing uses tensors blk\.1\.exp_probs_b\.bias"):
        _router({"deepseek2.expert_gating_func": 1}, shapes)


def test_queries_of_deepseek2_files_grow_where_the_file_says_so() -> None:
    keys = {"deepseek2.attention.temperature_scale": 0.1, "deepseek2.attention.temperature_length": 8192}
    for config, found in ((keys, Temperature(0.1, 8192, 0.0)), ({}, None)):
        spec = build_graph(Headers("gguf", DEEPSEEK | config, _deepseek())).layers[0].attn.spec
        assert isinstance(spec, MLASpec)
        assert spec.temperature == found


def test_an_unknown_gating_function_is_an_error() -> None:
    with pytest.raises(ArchitectureError, match="expert_gating_func 7"):
        _router({"deepseek2.expert_gating_func": 7})


def test_shared_experts_are_one_mlp() -> None:
    graph = build_graph(Headers("gguf", DEEPSEEK, _deepseek()))
    assert isinstance(graph.node("layers.0.ffn").spec, MLPSpec)
    moe = graph.node("layers.2.ffn").spec
    assert isinstance(moe, MoESpec)
    assert moe.shared is not None
    assert moe.shared.intermediate == 2 * WIDTH
    assert graph.architecture == "deepseek2"


def test_prediction_layers_are_dropped() -> None:
    config = DEEPSEEK | {"deepseek2.block_count": 4, "deepseek2.nextn_predict_layers": 1}
    assert len(build_graph(Headers("gguf", config, _deepseek(4))).layers) == 3


def test_old_files_say_the_real_widths_without_mla_keys() -> None:
    old = {k: v for k, v in DEEPSEEK.items() if not k.endswith("_mla")}
    old |= {"deepseek2.attention.key_length": KEY, "deepseek2.attention.value_length": VALUE}
    shapes = {n: s for n, s in _deepseek().items() if "_k_b" not in n and "_v_b" not in n}
    shapes |= {f"blk.{i}.attn_kv_b.weight": (HEADS * (KEY - ROPE + VALUE), LATENT) for i in range(3)}
    new_spec = build_graph(Headers("gguf", DEEPSEEK, _deepseek())).layers[1].attn.spec
    old_spec = build_graph(Headers("gguf", old, shapes)).layers[1].attn.spec
    assert isinstance(new_spec, MLASpec)
    assert isinstance(old_spec, MLASpec)
    assert (new_spec.split_kv_b, old_spec.split_kv_b) == (True, False)
    for field in ("nope_dim", "rope_dim", "value_dim", "latent", "scale", "cache"):
        assert getattr(new_spec, field) == getattr(old_spec, field)


def test_yarn_magnitude_comes_from_the_log_multiplier() -> None:
    yarn = {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": 40.0,
        "rope.scaling.original_context_length": 4096,
        "rope.scaling.yarn_log_multiplier": 0.0707,
    }
    graph = build_graph(Headers("gguf", DEEPSEEK | {f"deepseek2.{k}": v for k, v in yarn.items()}, _deepseek()))
    spec = graph.layers[0].attn.spec
    assert isinstance(spec, MLASpec)
    # DeepSeek-V2's published scale, rescaled from its key width of 192
    assert spec.scale == pytest.approx(0.114721 * (192 / KEY) ** 0.5, rel=1e-5)


def test_fused_gate_and_up_experts_are_sliced() -> None:
    shapes = {n: s for n, s in _deepseek().items() if "gate_exps" not in n and "up_exps" not in n}
    shapes |= {f"blk.{i}.ffn_gate_up_exps.weight": (EXPERTS, 2 * WIDTH, H) for i in (1, 2)}
    weights = build_graph(Headers("gguf", DEEPSEEK, shapes)).node("layers.1.ffn.experts").weights
    assert (weights["gate"].rows, weights["up"].rows) == (((0, WIDTH, 1),), ((WIDTH, 2 * WIDTH, 1),))


def test_pairing_of_the_llama_architecture_is_that_of_permuted_rows() -> None:
    spec = build_graph(Headers("gguf", LLAMA, _llama())).node("layers.0.attn.rope").spec
    assert isinstance(spec, RopeSpec)
    assert spec.pairing == "interleaved"


@pytest.mark.parametrize(("experts", "normed"), [(16, True), (128, False)])
def test_llama_4_with_128_experts_has_no_norms_of_queries_and_keys(experts: int, normed: bool) -> None:
    """`llama4.cpp` of llama.cpp, which knows Maverick by them; the two models' config.json say it by `use_qk_norm`."""
    config, shapes = _sparse("llama4", experts=experts)
    spec = build_graph(Headers("gguf", config | {"llama4.interleave_moe_layer_step": 1}, shapes)).layers[0].attn.spec
    assert isinstance(spec, AttentionSpec)
    assert (spec.q_norm is not None, spec.k_norm is not None) == (normed, normed)


@pytest.mark.parametrize(
    ("window", "rotates", "chunks"),
    [({}, [True, True, True, False], [8192] * 3 + [0]), ({"llama4.attention.sliding_window": 0}, [True] * 4, [0] * 4)],
)
def test_llama_4_without_chunks_rotates_everywhere(
    window: dict[str, Any], rotates: list[bool], chunks: list[int]
) -> None:
    """As `llama4.cpp` says: "always use rope"."""
    config, shapes = _sparse("llama4")
    shapes |= {name.replace("blk.1.", f"blk.{i}."): shape for name, shape in shapes.items() for i in (2, 3)}
    more = {"llama4.interleave_moe_layer_step": 1, "llama4.block_count": 4, **window}
    specs = [layer.attn.spec for layer in build_graph(Headers("gguf", config | more, shapes)).layers]
    found = [(spec.rope is not None, spec.cache.chunk) for spec in specs if isinstance(spec, AttentionSpec)]
    assert found == list(zip(rotates, chunks, strict=True))


def test_values_may_be_arrays_over_layers() -> None:
    config = LLAMA | {"llama.attention.head_count_kv": [2, 2], "llama.feed_forward_length": [96, 96]}
    graph = build_graph(Headers("gguf", config, _llama()))
    assert all(isinstance(la.attn.spec, AttentionSpec) and la.attn.spec.kv_heads == 2 for la in graph.layers)
    llama4, shapes = _sparse("llama4", dense=0)
    uneven = {"llama4.interleave_moe_layer_step": 2, "llama4.feed_forward_length": [96, 0]}
    graph = build_graph(Headers("gguf", llama4 | uneven, shapes))
    assert [type(layer.ffn.spec) for layer in graph.layers] == [MLPSpec, MoESpec]
    with pytest.raises(ArchitectureError, match="none for layer 1"):
        build_graph(Headers("gguf", LLAMA | {"llama.feed_forward_length": [96]}, _llama()))
    with pytest.raises(ArchitectureError, match=r"blk\.1\.ffn_gate"):
        build_graph(Headers("gguf", LLAMA | {"llama.feed_forward_length": [96, 64]}, _llama()))


def test_a_file_without_output_weight_has_a_tied_head() -> None:
    shapes = _llama()
    del shapes["output.weight"]
    graph = build_graph(Headers("gguf", LLAMA, shapes))
    assert graph.head.weights == graph.embed.weights


def test_absent_rotary_keys_are_those_of_llama_cpp() -> None:
    """Its `load_hparams`: base 10000, the whole head, no scaling; also where hub folders would rotate half a head."""
    shapes = {name.replace("ffn_gate", "ffn_up"): shape for name, shape in _llama().items() if "ffn_up" not in name}
    for i in range(2):
        shapes[f"blk.{i}.ffn_up.weight"] = (2 * 96, H)
        shapes |= {f"blk.{i}.{name}.weight": (H,) for name in ("post_attention_norm", "post_ffw_norm")}
    glm = {key.replace("llama.", "glm4."): value for key, value in LLAMA.items()} | {"general.architecture": "glm4"}
    for config, stored in ((LLAMA, _llama()), (glm, shapes)):
        rope = build_graph(Headers("gguf", config, stored)).node("layers.0.attn.rope").spec
        assert isinstance(rope, RopeSpec)
        assert (rope.dim, rope.theta, rope.scaling) == (16, 10000.0, None)


def test_frequency_divisors_are_found_without_a_key() -> None:
    graph = build_graph(Headers("gguf", LLAMA, _llama() | {"rope_freqs.weight": (8,)}))
    assert graph.node("layers.1.attn.rope").weights["freq_factors"].shape == (8,)
    with pytest.raises(ArchitectureError, match=r"rope_freqs\.weight"):
        build_graph(Headers("gguf", LLAMA, _llama() | {"rope_freqs.weight": (16,)}))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"general.architecture": "rwkv7"}, "'rwkv7' is not supported"),
        ({"llama.expert_count": 8}, r"'llama\.expert_used_count' is missing"),
        ({"llama.rope.scaling.type": "longrope"}, "'longrope' is not supported"),
        ({"llama.attention.value_length": 32}, "widths differ"),
        ({"llama.block_count": None}, r"'llama\.block_count' is missing"),
        ({"llama.rope.freq_base": 1.0}, r"of width 16 and base 1\.0 is not possible"),
    ],
)
def test_metadata_that_cannot_be_read(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ArchitectureError, match=message):
        build_graph(Headers("gguf", LLAMA | config, _llama()))


def test_a_missing_tensor_is_named() -> None:
    shapes = _deepseek()
    del shapes["blk.2.ffn_up_exps.weight"]
    with pytest.raises(CheckpointError, match=r"'blk\.2\.ffn_up_exps\.weight' is missing"):
        build_graph(Headers("gguf", DEEPSEEK, shapes))


@pytest.mark.parametrize(("fmt", "size"), [("Q8_1", 32), ("Q8_K", 256), ("F4", 2), ("F6_E2M3", 4), ("U32", 1)])
def test_a_weight_that_nothing_can_read_is_named_while_planning(fmt: str, size: int) -> None:
    shapes = _llama()
    headers = Headers("gguf", LLAMA, shapes)
    name = "blk.1.ffn_up.weight"
    shape = shapes[name]
    headers.tensors[name] = TensorInfo(name, shape, fmt, 0)
    with pytest.raises(CheckpointError, match=f"'{name}' is {fmt}, whose values nothing here can read"):
        build_graph(headers)
