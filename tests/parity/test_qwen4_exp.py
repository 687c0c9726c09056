"""Qwen3.8-Flash-Next: what decides over the blocks that are attended to and the rows that are mixed into streams."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import ktcore
from ktcore.backend.reference import block_index, linear_attention, ngram
from ktcore.engine.load.convert import convert
from ktcore.errors import ArchitectureError, KtcoreError
from ktcore.graph import build_graph
from ktcore.ops import (
    AttentionSpec,
    BlockIndexCacheSpec,
    BlockIndexerSpec,
    GatedDeltaNetSpec,
    GatedStreamsSpec,
    KVCacheSpec,
    NGramSpec,
    NGramTableSpec,
    RMSNormSpec,
    RopeSpec,
    Spec,
)
from ktcore.ops.block_indexer import mean_scores
from ktcore.ops.linear_attention import l2_normalised
from ktcore.ops.ngram import gated_values, ngram_rows
from ktcore.weights import open_checkpoint

from .conftest import Tiny
from .driver import Runner
from .gguf_writer import write_gguf
from .qwen4_exp import EOS

pytestmark = pytest.mark.usefixtures("one_thread")
TOLERANCE = 1e-4
BUDGET, RATIO = 12, 4
Mutation = tuple[type[Spec], Callable[[Any], Spec]]


def _set(kind: type[Spec], **fields: Any) -> Mutation:
    return kind, lambda spec: replace(spec, **fields)


def _indexer_norms(spec: RMSNormSpec) -> RMSNormSpec:
    return replace(spec, offset=0.0) if spec.dim == 64 and spec.offset else spec


SPECS: dict[str, Mutation] = {
    "budget": _set(BlockIndexCacheSpec, top=BUDGET // RATIO + 1),
    "length of a block": _set(BlockIndexCacheSpec, block=3, top=4),
    "attention over all": (AttentionSpec, lambda s: replace(s, indexer=None)),
    "norms of index heads are zero-centred": (RMSNormSpec, _indexer_norms),
    "part of index heads that rotates": (RopeSpec, lambda s: replace(s, dim=16)),
    "gate of the delta net's result": _set(GatedDeltaNetSpec, sigmoid_gate=False),
    "gate of attention": (AttentionSpec, lambda s: replace(s, gate=None)),
    "norms of streams are zero-centred": _set(GatedStreamsSpec, norm_offset=0.0),
    "epsilon of streams": _set(GatedStreamsSpec, eps=0.5),
    "epsilon of n-grams": _set(NGramSpec, eps=0.5),
    "norms of n-grams are zero-centred": _set(NGramSpec, norm_offset=0.0),
    "distance between the convolution's tokens": _set(NGramSpec, dilation=2),
    "end of texts": _set(NGramTableSpec, eos=EOS + 1),
    "multipliers of hashes": (NGramTableSpec, lambda s: replace(s, multipliers=s.multipliers[::-1])),
    "sizes of heads": (NGramTableSpec, lambda s: replace(s, sizes=s.sizes[::-1])),
    "places of heads": (NGramTableSpec, lambda s: replace(s, offsets=(0,) * len(s.offsets))),
}


@pytest.mark.parametrize("quirk", SPECS)
def test_parity_sees(quirk: str, tiny: Callable[[str], Tiny]) -> None:
    kind, wrong = SPECS[quirk]
    assert _off(tiny("qwen4-exp"), {kind: wrong}) > 10 * TOLERANCE


def _without_relu(q: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    return torch.einsum("thd,bd->tb", q, keys)


def _one_order(ids: torch.Tensor, before: torch.Tensor, spec: NGramTableSpec) -> torch.Tensor:
    return ngram_rows(ids, before, spec).view(len(ids), 2, -1).flip(1).flatten(1)


FUNCTIONS: dict[str, tuple[Any, str, Callable[..., Any]]] = {
    "relu of index scores": (block_index, "mean_scores", _without_relu),
    "index scores by their size": (block_index, "mean_scores", lambda q, k: -mean_scores(q, k)),
    "pairs before threes": (ngram, "ngram_rows", _one_order),
    "earlier tokens of n-grams": (
        ngram,
        "ngram_rows",
        lambda i, b, s: torch.cat([ngram_rows(i[t : t + 1], torch.full_like(b, s.eos), s) for t in range(len(i))]),
    ),
    "root of the gate": (ngram, "gated_values", lambda s, k, q, v: gated_values(s, k.abs().sqrt(), q, v)),
    "activation of the convolution": (ngram, "dilated_conv", lambda x, b, w, d: (x * 0, torch.cat((b, x))[len(x) :])),
    "L2 norm of the delta net": (linear_attention, "l2_normalised", lambda x: l2_normalised(x) * 2),
}


@pytest.mark.parametrize("quirk", FUNCTIONS)
def test_parity_sees_in_what_is_computed(
    quirk: str, tiny: Callable[[str], Tiny], monkeypatch: pytest.MonkeyPatch
) -> None:
    module, name, wrong = FUNCTIONS[quirk]
    monkeypatch.setattr(module, name, wrong)
    assert _off(tiny("qwen4-exp"), {}) > 10 * TOLERANCE


def _off(t: Tiny, mutate: dict[type[Spec], Callable[[Any], Spec]]) -> float:
    with open_checkpoint(t.folder) as checkpoint:
        return float((Runner(checkpoint, mutate=mutate)(t.ids) - t.logits).abs().max())


def test_up_to_the_budget_and_an_open_block_it_is_dense_attention_to_the_bit(tiny: Callable[[str], Tiny]) -> None:
    t, few = tiny("qwen4-exp"), BUDGET + RATIO - 1
    dense: dict[type[Spec], Callable[[Any], Spec]] = {
        AttentionSpec: lambda s: replace(s, indexer=None),
        KVCacheSpec: lambda s: replace(s, chosen=False),
    }
    with open_checkpoint(t.folder) as checkpoint:
        assert torch.equal(Runner(checkpoint)(t.ids[:few]), Runner(checkpoint, mutate=dense)(t.ids[:few]))
        off = (Runner(checkpoint)(t.ids) - Runner(checkpoint, mutate=dense)(t.ids)).abs().amax(-1)
    assert off[:few].max() < TOLERANCE < off[few]


def test_the_prompt_holds_the_token_that_ends_texts(tiny: Callable[[str], Tiny]) -> None:
    at = (tiny("qwen4-exp").ids == EOS).nonzero()[:, 0]
    assert len(at) >= 2
    assert at.max() < len(tiny("qwen4-exp").ids) - 3


def test_the_table_is_neither_packed_nor_counted_as_memory_and_its_numbers_are_the_files(
    tiny: Callable[[str], Tiny], tmp_path: Path
) -> None:
    t = tiny("qwen4-exp")
    with open_checkpoint(t.folder) as checkpoint:
        spec: Any = build_graph(checkpoint).node("layers.1.ngram.table").spec
    folder = _changed(t.folder, tmp_path, {}, lambda n, v: v + 2 if n.endswith("layer_multipliers") else v)
    with open_checkpoint(folder) as checkpoint:
        other: Any = build_graph(checkpoint).node("layers.1.ngram.table").spec
    assert other.multipliers == tuple(m + 2 for m in spec.multipliers)
    with ktcore.load(t.folder, backend="cpu") as model:
        choice = model.plan.choices["layers.1.ngram.table"]
        assert (choice.implementation.id, choice.device, choice.packed_bytes) == ("reference.ngram_table", "cpu:0", 0)


def test_a_converted_model_answers_alike(tiny: Callable[[str], Tiny], tmp_path: Path) -> None:
    t = tiny("qwen4-exp")
    convert(t.folder, tmp_path / "packed", backend="cpu")
    logits = []
    for path in (t.folder, tmp_path / "packed"):
        with ktcore.load(path, backend="cpu", threads=1) as model:
            logits.append(model.logits(t.ids))
    assert torch.equal(*logits)
    torch.testing.assert_close(logits[0], t.logits, atol=10 * TOLERANCE, rtol=0)


def _changed(source: Path, to: Path, config: dict[str, Any], change: Callable[[str, torch.Tensor], Any]) -> Path:
    folder = Path(shutil.copytree(source, to / "changed"))
    said = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(said))
    path = folder / "model.safetensors"
    changed = {name: change(name, value) for name, value in load_file(path).items()}
    save_file({name: value for name, value in changed.items() if value is not None}, path, {"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"ple_layer_ids": [0]}, "ple_layer_ids"),
        ({"ple_layer_ids": [5]}, "ple_layer_ids"),
        ({"eos_token_id": None}, "eos_token_id"),
        ({"ngram_size": 1}, "ngram_size"),
        ({"split_ngram_parts": 3}, "split_ngram_parts"),
        ({"ple_embed_dim": 66}, "ple_embed_dim"),
        ({"indexer_budget": 13}, "indexer_budget"),
        ({"indexer_kv_heads": 2}, "indexer_kv_heads"),
        ({"indexer_head_dim": 4}, "index heads"),
        ({"output_gate_type": "swish"}, "output_gate_type"),
        ({"hc_count": 1}, "hc_count"),
        ({"layer_types": ["linear_attention", "linear_attention", "other", "full_attention"]}, "layer_types"),
        ({"norm_topk_prob": False}, "norm_topk_prob"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(
    config: dict[str, Any], named: str, tiny: Callable[[str], Tiny], tmp_path: Path
) -> None:
    folder = _changed(tiny("qwen4-exp").folder, tmp_path, config, lambda n, v: v)
    with open_checkpoint(folder) as checkpoint, pytest.raises(KtcoreError, match=named):
        build_graph(checkpoint)


def test_constants_of_another_kind_or_length_are_refused(tiny: Callable[[str], Tiny], tmp_path: Path) -> None:
    def other(name: str, value: torch.Tensor) -> torch.Tensor:
        return value.int() if name.endswith("ngram_heads_offsets") else value

    with (
        open_checkpoint(_changed(tiny("qwen4-exp").folder, tmp_path, {}, other)) as checkpoint,
        pytest.raises(ArchitectureError, match=r"ngram_heads_offsets.*64-bit"),
    ):
        build_graph(checkpoint)


def test_layers_of_another_kind_than_said_are_refused(tiny: Callable[[str], Tiny], tmp_path: Path) -> None:
    kinds = {"layer_types": ["linear_attention"] * 4}
    with (
        open_checkpoint(_changed(tiny("qwen4-exp").folder, tmp_path, kinds, lambda n, v: v)) as checkpoint,
        pytest.raises(KtcoreError, match="linear_attn"),
    ):
        build_graph(checkpoint)


@pytest.mark.parametrize("quirk", ["rows of the table", "value heads"])
def test_parity_of_gguf_sees(quirk: str, tiny: Callable[[str], Tiny], tmp_path: Path) -> None:
    t = tiny("qwen4-exp")
    mutations: dict[str, Mutation] = {
        "rows of the table": (NGramTableSpec, lambda s: replace(s, offsets=tuple(n + 1 for n in s.offsets))),
        "value heads": _set(GatedDeltaNetSpec, tiled=False),
    }
    with open_checkpoint(write_gguf(t.model, tmp_path / "tiny.gguf")) as checkpoint:
        off = Runner(checkpoint, mutate=dict([mutations[quirk]]))(t.ids) - t.logits
    assert off.abs().max() > 10 * TOLERANCE


def test_an_indexer_is_no_layer_of_its_own(tiny: Callable[[str], Tiny]) -> None:
    with open_checkpoint(tiny("qwen4-exp").folder) as checkpoint:
        graph = build_graph(checkpoint)
    kinds = [any(isinstance(node.spec, BlockIndexerSpec) for node in layer.attn.walk()) for layer in graph.layers]
    assert kinds == [False, False, False, True]
