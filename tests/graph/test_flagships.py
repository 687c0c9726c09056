"""Full-size models from their config.json alone: parameters as published, and as transformers counts them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, PreTrainedConfig

from ktcore.errors import CheckpointError
from ktcore.graph import Graph, Node, build_graph
from ktcore.weights.bare import BareCheckpoint, open_config
from tests.parity.models import CONFIGS as TINY
from tests.parity.models import untrained

CONFIGS = Path(__file__).parents[1] / "data" / "configs"
# billions, as their makers say: DeepSeek-V3's, Qwen3's and Mixtral's model cards, Kimi-K2's page on the hub (its card
# rounds to 1T), GLM-4.5's report
PUBLISHED = {
    "deepseek-v3": 671,
    "deepseek-v3.2": 671,
    "glm-5": 744,
    "deepseek-v4-flash": 284,
    "glm-5.3-flash": 320,
    "kimi-k2": 1026.5,
    "qwen3-235b-a22b": 235,
    "glm-4.6": 355,
    "mixtral-8x22b": 141,
    "qwen3-next-80b-a3b": 80,
    "qwen3.5-397b-a17b": 397,
    "minimax-m2": 229,
    "minimax-m3": 428,
    "llama-4-maverick": 400,
    "gemma-4-26b-a4b": 25.2,
    "mimo-v2-flash": 309,
    "step-3.5-flash": 196.8,
    "hunyuan-a13b": 80,
}
UNKNOWN_TO_TRANSFORMERS = {"kimi-k2"}
# DeepSeek-V4's two files are put together from what others quote; the width of V4-Pro's experts follows from its size
BUFFERS = ("e_score_correction_bias", "tid2eid", "layer_scalar")  # of the choice of experts, and factors of layers
# whose makers round too far: "48B" are 49.1, "125B" 125.7 beside a table of 51.2
ROUNDED = ["deepseek-v4-pro", "kimi-linear-48b-a3b", "qwen3.8-flash-next"]


def _graph(name: str, weights: str | None = None) -> Graph:
    return build_graph(open_config(CONFIGS / f"{name}.json", weights))


def _as_published(name: str, graph: Graph) -> int:
    """Some makers count the prediction layer, which is one like layer `like` and a projection of two hidden states."""
    like = {"glm-4.6": -1, "glm-5.3-flash": 43}.get(name)
    if like is None:
        return graph.parameters
    layer = sum(torch.Size(ref.shape).numel() for root in _branches(graph, like) for ref in root.all_weights().values())
    # GLM-4.5's report does not count the tables
    tables = 2 * graph.vocab * graph.hidden if name == "glm-4.6" else 0
    return graph.parameters + layer + 2 * graph.hidden**2 - tables


def _branches(graph: Graph, layer: int) -> list[Node]:
    roots = (graph.layers[layer].attn, graph.layers[layer].ffn)
    return [root.parts.get("branch", root) for root in roots]


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_those_published(name: str) -> None:
    assert _as_published(name, _graph(name)) / 1e9 == pytest.approx(PUBLISHED[name], rel=0.005)


@pytest.mark.parametrize("name", [*(n for n in PUBLISHED if n not in UNKNOWN_TO_TRANSFORMERS), *ROUNDED])
def test_parameters_are_those_of_transformers(name: str) -> None:
    config = json.loads((CONFIGS / f"{name}.json").read_text())
    config = config.get("text_config", config)
    config.pop("quantization_config", None)
    _same_count(_graph(name), AutoConfig.for_model(**config))


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("name", TINY)
def test_biases_that_a_configuration_asks_for_are_those_of_transformers(name: str, biased: bool) -> None:
    config = TINY[name]()
    for flag in {"attention_bias", "mlp_bias", "qkv_bias"} & config.to_dict().keys():
        setattr(config, flag, biased)
    _same_count(build_graph(BareCheckpoint(Path("config.json"), json.loads(json.dumps(config.to_dict())))), config)


def _same_count(graph: Graph, config: PreTrainedConfig) -> None:
    with torch.device("meta"):
        model = untrained(config)
    biases = sum(value.numel() for name, value in model.named_buffers() if name.endswith(BUFFERS))
    assert graph.parameters == sum(p.numel() for p in model.parameters()) + biases


def test_a_table_of_n_grams_is_as_large_as_published() -> None:
    graph = _graph("qwen3.8-flash-next")
    table = torch.Size(graph.node("layers.1.ngram.table").weights["table"].shape).numel()
    assert table / 1e9 == pytest.approx(51, rel=0.005)
    assert (graph.parameters - table) / 1e9 == pytest.approx(125, rel=0.006)


def test_an_assumed_format_is_that_of_all_matrices_that_can_have_it() -> None:
    graph = _graph("mixtral-8x22b", "Q4_K")
    assert graph.node("layers.0.ffn.experts").spec.formats() == ("Q4_K",)
    assert graph.node("norm").spec.formats() == ("BF16",)
    assert graph.node("layers.0.ffn.experts").nbytes == 8 * 3 * 6144 * 16384 * 144 // 256


def test_released_quantisation_is_planned_for() -> None:
    graph = _graph("deepseek-v3")
    assert graph.node("layers.3.ffn.experts").spec.formats() == ("F8_E4M3_G128",)
    assert graph.node("layers.3.ffn.router").spec.formats() == graph.node("head").spec.formats() == ("BF16",)
    # a byte a weight and four for each 128 of a row; two tables have two bytes a weight
    expected = 671e9 * 132 / 128 + 2 * 129280 * 7168
    assert sum(root.nbytes for root in graph.roots()) == pytest.approx(expected, rel=0.005)


def test_experts_in_four_bits_beside_projections_in_eight_are_planned_for() -> None:
    graph = _graph("deepseek-v4-flash")
    attention = graph.node("layers.3.attn").spec
    assert graph.node("layers.3.ffn.experts").spec.formats() == ("MXFP4",)
    assert graph.node("layers.3.attn.q_b").spec.formats() == attention.formats()[1:] == ("F8_E4M3_G128",)
    for part in ("attn.pool_values", "ffn.router"):
        assert graph.node(f"layers.3.{part}").spec.formats() == ("BF16",)


def test_experts_of_other_names_are_quantised_likewise() -> None:
    graph = _graph("minimax-m2")
    assert graph.node("layers.3.ffn.experts").spec.formats() == ("F8_E4M3_G128",)
    assert graph.node("layers.3.ffn.router").spec.formats() == ("BF16",)


def test_kimi_k25_is_planned_with_routed_experts_of_4_bits(tmp_path: Path) -> None:
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
    text = json.loads((CONFIGS / "kimi-k2.json").read_text()) | {
        "quantization_config": {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
            "ignore": ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*", r"re:.*mlp\.(gate|up|down)_proj.*"],
        }
    }
    config = {"model_type": "kimi_k25", "text_config": text, "tie_word_embeddings": False}
    (tmp_path / "config.json").write_text(json.dumps(config))
    graph = build_graph(open_config(tmp_path / "config.json"))
    assert graph.parameters / 1e9 == pytest.approx(1026.5, rel=0.005)
    nodes = ("layers.3.ffn.experts", "layers.3.ffn.shared.up", "layers.0.ffn.up", "layers.3.attn.o", "head")
    formats = [graph.node(name).spec.formats() for name in nodes]
    assert formats == [("INT4_G32",), *[("BF16",)] * 4]


def test_quantisation_that_is_not_known_is_said(tmp_path: Path) -> None:
    config = json.loads((CONFIGS / "qwen3-235b-a22b.json").read_text())
    path = tmp_path / "config.json"
    for section, unplanned, fmt in (
        ({"quant_method": "gptq", "bits": 4, "group_size": 128}, "", "INT4_G128"),
        ({"quant_method": "gptq", "bits": 3, "group_size": 128}, "gptq", "BF16"),
        ({"quant_method": "hqq"}, "hqq", "BF16"),
    ):
        path.write_text(json.dumps(config | {"quantization_config": section}))
        checkpoint = open_config(path)
        assert checkpoint.unplanned == unplanned
        assert build_graph(checkpoint).node("layers.0.ffn.experts").spec.formats() == (fmt,)
        assert open_config(path, "Q4_K").unplanned == ""


@pytest.mark.parametrize(
    "section",
    [
        {"quant_method": "gptq", "dynamic": {"-:.*o_proj": {}, "+:.*self_attn.*": {"bits": 8, "group_size": 32}}},
        {
            "quant_method": "auto-round",
            "extra_config": {
                **{f"model.layers.{i}.self_attn.o_proj": {"bits": 16} for i in range(94)},
                r"self_attn": {"bits": 8, "group_size": 32},
            },
        },
    ],
)
def test_modules_with_bits_of_their_own_are_planned_so(section: dict[str, Any], tmp_path: Path) -> None:
    config = json.loads((CONFIGS / "qwen3-235b-a22b.json").read_text())
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config | {"quantization_config": {"bits": 4, "group_size": 128} | section}))
    graph = build_graph(open_config(path))
    found = {name: graph.node(f"layers.3.{name}").spec.formats() for name in ("ffn.experts", "attn.q", "attn.o")}
    assert found == {"ffn.experts": ("INT4_G128",), "attn.q": ("INT8_G32",), "attn.o": ("BF16",)}


def test_biases_that_the_configuration_implies_are_there(tmp_path: Path) -> None:
    graph = _graph("glm-4.6")
    assert {r: bool(graph.node(f"layers.5.attn.{r}").weights.get("bias")) for r in "qo"} == {"q": True, "o": False}
    assert not _graph("mixtral-8x22b").node("layers.5.attn.q").weights.get("bias")


def test_a_bare_configuration_has_no_bytes_to_give() -> None:
    checkpoint = open_config(CONFIGS / "deepseek-v3.json")
    graph = build_graph(checkpoint)
    with pytest.raises(CheckpointError, match=r"deepseek-v3\.json: holds no weights"):
        graph.head.weights["weight"].open(checkpoint).raw()


def test_a_language_model_inside_has_its_own_type_and_quantisation(tmp_path: Path) -> None:
    config = json.loads((CONFIGS / "qwen3.5-397b-a17b.json").read_text())
    config["text_config"] |= {"dtype": "float16", "quantization_config": {"quant_method": "hqq"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    checkpoint = open_config(tmp_path / "config.json")
    assert checkpoint.unplanned == "hqq"
    assert build_graph(checkpoint).node("layers.0.ffn.experts").spec.formats() == ("F16",)


def test_unknown_formats_and_dtypes_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="'Q5_X'"):
        open_config(CONFIGS / "deepseek-v3.json", "Q5_X")
    (tmp_path / "config.json").write_text('{"model_type": "llama", "torch_dtype": "int3"}')
    with pytest.raises(CheckpointError, match="dtype 'int3' is unknown"):
        open_config(tmp_path / "config.json")
