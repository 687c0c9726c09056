"""Sparse attention: what decides over the tokens that are attended to; it is dense as long as all of them are."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GlmMoeDsaConfig

from ktcore.conformance.levels.tiny_configs import plain_rope
from ktcore.errors import ArchitectureError
from ktcore.graph import build_graph
from ktcore.ops import IndexCacheSpec, MLASpec
from ktcore.weights import open_checkpoint

from .conftest import Tiny
from .driver import Runner
from .gguf_writer import write_gguf
from .models import INDEX, sparse

pytestmark = pytest.mark.usefixtures("one_thread")
TOLERANCE = 1e-4
SPARSE = dict.fromkeys(("v32", "glm-dsa", "glm-dsa-shared"), INDEX["index_topk"])
SPARSE["glm5-next"] = 12 + 4 - 1  # the budget, and what of a pool is open
Configured = Callable[..., Path]


@pytest.fixture
def configured(tiny: Callable[[str], Tiny], tmp_path: Path) -> Configured:
    """A tiny model's folder with other settings."""

    def make(name: str, **changes: Any) -> Path:
        folder = Path(shutil.copytree(tiny(name).folder, tmp_path / "m"))
        config = json.loads((folder / "config.json").read_text()) | changes
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return make


@pytest.mark.parametrize("name", SPARSE)
def test_up_to_top_k_tokens_it_is_dense_attention_to_the_bit(name: str, tiny: Callable[[str], Tiny]) -> None:
    t, top_k = tiny(name), SPARSE[name]
    with open_checkpoint(t.folder) as checkpoint:
        sparse = Runner(checkpoint)(t.ids)
        short = Runner(checkpoint)(t.ids[:top_k])
        dense = Runner(checkpoint, mutate={MLASpec: _dense})(t.ids[:top_k])
    assert torch.equal(short, dense)
    with open_checkpoint(t.folder) as checkpoint:
        long = Runner(checkpoint, mutate={MLASpec: _dense})(t.ids)
    off = (sparse - long).abs().amax(-1)
    assert off[:top_k].max() < TOLERANCE
    assert off[top_k] > TOLERANCE, "the first token that sees more than top k is the first to differ"


def _dense(spec: MLASpec) -> MLASpec:
    return replace(spec, indexer=None, shared_index=False)


def test_index_heads_of_glm_rotate_pairs(tiny: Callable[[str], Tiny], configured: Configured) -> None:
    t = tiny("glm-dsa")
    with open_checkpoint(configured("glm-dsa", indexer_rope_interleave=False)) as checkpoint:
        off = (Runner(checkpoint)(t.ids) - t.logits).abs().max()
    assert off > 10 * TOLERANCE


@pytest.mark.parametrize(
    ("changes", "kinds"),
    [
        ({"index_topk_pattern": "FSFS"}, "FSFS"),
        ({"index_topk_freq": 2, "index_skip_topk_offset": 1}, "FSFS"),
        ({"index_topk_freq": 4, "index_skip_topk_offset": 1}, "FSSS"),
        ({"index_topk_freq": 4}, "FFSS"),
    ],
)
def test_layers_share_as_transformers_class_derives_it(
    changes: dict[str, Any], kinds: str, configured: Configured, tiny: Callable[[str], Tiny]
) -> None:
    folder = configured("glm-dsa", indexer_types=None, **changes)
    unused = {f"model.layers.{i}." for i, kind in enumerate(kinds) if kind == "S"}
    _without(folder, lambda name: ".indexer." in name and any(name.startswith(layer) for layer in unused))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    ids = tiny("glm-dsa").ids[:40]
    with open_checkpoint(folder) as checkpoint, torch.no_grad():
        graph = build_graph(checkpoint)
        assert "".join("F" if "indexer" in layer.attn.parts else "S" for layer in graph.layers) == kinds
        torch.testing.assert_close(Runner(checkpoint)(ids), model(ids[None]).logits[0], atol=TOLERANCE, rtol=0)


def test_an_indexer_in_a_layer_that_shares_is_a_tensor_that_nothing_uses(configured: Configured) -> None:
    folder = configured("glm-dsa", indexer_types=["full", "full", "full", "shared"])
    with (
        open_checkpoint(folder) as checkpoint,
        pytest.raises(ArchitectureError, match=r"layers\.3\.self_attn\.indexer"),
    ):
        build_graph(checkpoint)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"indexer_types": ["shared", "full", "full", "full"]}, "indexer_types"),
        ({"indexer_types": ["full", "full"]}, "indexer_types"),
        ({"indexer_types": None, "index_topk_pattern": "FFXF"}, "indexer_types"),
        ({"mlp_layer_types": ["dense", "other", "sparse", "sparse"]}, "mlp_layer_types"),
        ({"q_lora_rank": None}, "q_lora_rank"),
        ({"index_topk": 0}, "index_topk"),
        ({"index_head_dim": 6}, "index_head_dim"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(changes: dict[str, Any], named: str, configured: Configured) -> None:
    with open_checkpoint(configured("glm-dsa", **changes)) as checkpoint, pytest.raises(Exception, match=named):
        build_graph(checkpoint)


def test_mlp_layer_types_decide_over_the_leading_dense_layers(configured: Configured) -> None:
    with open_checkpoint(configured("v32", first_k_dense_replace=3)) as checkpoint:
        ops = [layer.ffn.spec.op for layer in build_graph(checkpoint).layers]
    assert ops == ["mlp", "moe", "moe", "moe"]


def test_top_k_beyond_the_context_chooses_all(tiny: Callable[[str], Tiny]) -> None:
    t = tiny("v32")
    wide = {IndexCacheSpec: lambda spec: replace(spec, top_k=4096)}
    with open_checkpoint(t.folder) as checkpoint:
        many = Runner(checkpoint, mutate=wide)(t.ids)
        dense = Runner(checkpoint, mutate={MLASpec: _dense})(t.ids)
    assert torch.equal(many, dense)


def _without(folder: Path, gone: Callable[[str], bool]) -> None:
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    save_file({name: value for name, value in load_file(path).items() if not gone(name)}, path, {"format": "pt"})


@pytest.mark.parametrize(("context", "kinds"), [(202752, "FFFFFFFFFFF"), (1048576, "FFFSSSFSSSF")])
def test_gguf_that_does_not_say_which_layers_share_is_read_as_llama_cpp_reads_it(
    context: int, kinds: str, tmp_path: Path
) -> None:
    config = GlmMoeDsaConfig(
        **sparse(
            num_hidden_layers=11,
            max_position_embeddings=context,
            n_group=1,
            indexer_types=[{"F": "full", "S": "shared"}[kind] for kind in kinds],
            rope_parameters=plain_rope(1e6),
        )
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    path = write_gguf(model, tmp_path / "m.gguf", sharing_unsaid=True)
    with open_checkpoint(path) as checkpoint:
        found = "".join("F" if "indexer" in layer.attn.parts else "S" for layer in build_graph(checkpoint).layers)
    assert found == kinds
