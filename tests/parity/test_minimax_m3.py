"""MiniMax-M3: what decides over the blocks that each key head attends to, and keys of the hub's files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ktcore.backend.reference import block_index
from ktcore.errors import ArchitectureError
from ktcore.graph import build_graph
from ktcore.ops import (
    AttentionSpec,
    BlockIndexCacheSpec,
    ExpertsSpec,
    KVCacheSpec,
    MLPSpec,
    RMSNormSpec,
    RopeSpec,
    RouterSpec,
    Spec,
)
from ktcore.ops.block_indexer import choose_blocks, max_scores
from ktcore.weights import open_checkpoint

from .conftest import Tiny
from .driver import Runner

pytestmark = pytest.mark.usefixtures("one_thread")
TOLERANCE = 1e-4
BUDGET = 12
Mutation = tuple[type[Spec], Callable[[Any], Spec]]


def _set(kind: type[Spec], **fields: Any) -> Mutation:
    return kind, lambda spec: replace(spec, **fields)


def _clamped(kind: type[Spec], **fields: Any) -> Mutation:
    return kind, lambda spec: replace(spec, clamped=replace(spec.clamped, **fields))


SPECS: dict[str, tuple[str, Mutation]] = {
    "number of blocks": ("minimax-m3", _set(BlockIndexCacheSpec, top=4)),
    "length of blocks": ("minimax-m3", _set(BlockIndexCacheSpec, block=3, top=4)),
    "own block": ("minimax-m3", _set(BlockIndexCacheSpec, local=0)),
    "blocks before the own": ("minimax-m3-limit", _set(BlockIndexCacheSpec, local=1)),
    "attention over all": ("minimax-m3", (AttentionSpec, lambda s: replace(s, indexer=None))),
    "zero-centred norms": ("minimax-m3", _set(RMSNormSpec, offset=0.0)),
    "part that rotates": ("minimax-m3", _set(RopeSpec, dim=32)),
    "limit of experts": (
        "minimax-m3-limit",
        _clamped(ExpertsSpec, limit=7.0),
    ),
    "limit of MLPs": ("minimax-m3-limit", _clamped(MLPSpec, limit=7.0)),
    "alpha of experts": (
        "minimax-m3-limit",
        _clamped(ExpertsSpec, alpha=1.7),
    ),
    "1 beside up": ("minimax-m3", _clamped(MLPSpec, plus=0.0)),
    "scale of routed experts": ("minimax-m3", _set(RouterSpec, scale=1.0)),
    "choice bias": ("minimax-m3", _set(RouterSpec, choice_bias=False)),
    "renormalisation": ("minimax-m3", _set(RouterSpec, renormalise=False)),
}


@pytest.mark.parametrize("quirk", SPECS)
def test_parity_sees(quirk: str, tiny: Callable[[str], Tiny]) -> None:
    name, (kind, wrong) = SPECS[quirk]
    assert _off(tiny(name), {kind: wrong}) > 10 * TOLERANCE


FUNCTIONS: dict[str, tuple[str, Callable[..., Any]]] = {
    "relu, which others have": ("max_scores", lambda *a: max_scores(*a).relu()),
    "one choice for all key heads": ("choose_blocks", lambda *a: choose_blocks(*a)[:, :1].expand(-1, 2, -1)),
    "choices of the other head": ("choose_blocks", lambda *a: choose_blocks(*a).flip(1)),
}


@pytest.mark.parametrize("quirk", FUNCTIONS)
def test_parity_sees_in_what_is_computed(
    quirk: str, tiny: Callable[[str], Tiny], monkeypatch: pytest.MonkeyPatch
) -> None:
    name, wrong = FUNCTIONS[quirk]
    monkeypatch.setattr(block_index, name, wrong)
    assert _off(tiny("minimax-m3"), {}) > 10 * TOLERANCE


def _off(t: Tiny, mutate: dict[type[Spec], Callable[[Any], Spec]]) -> float:
    with open_checkpoint(t.folder) as checkpoint:
        return float((Runner(checkpoint, mutate=mutate)(t.ids) - t.logits).abs().max())


def test_up_to_the_budget_it_is_dense_attention_to_the_bit(tiny: Callable[[str], Tiny]) -> None:
    t = tiny("minimax-m3")
    dense: dict[type[Spec], Callable[[Any], Spec]] = {
        AttentionSpec: lambda s: replace(s, indexer=None),
        KVCacheSpec: lambda s: replace(s, chosen=False),
    }
    with open_checkpoint(t.folder) as checkpoint:
        assert torch.equal(Runner(checkpoint)(t.ids[:BUDGET]), Runner(checkpoint, mutate=dense)(t.ids[:BUDGET]))
        off = (Runner(checkpoint)(t.ids) - Runner(checkpoint, mutate=dense)(t.ids)).abs().amax(-1)
    assert off[:BUDGET].max() < TOLERANCE < off[BUDGET]


RELEASED = {
    "layer_types": None,
    "mlp_layer_types": None,
    "moe_layer_freq": [0, 1, 1, 1],
    "hidden_act": "swigluoai",
    "scoring_func": "sigmoid",
    "use_gemma_norm": True,
    "qk_norm_type": "per_head",
    # the nested keys count, whatever stands outside
    "index_topk_blocks": 9,
    "sparse_attention_config": {
        "use_sparse_attention": True,
        "sparse_num_index_heads": 2,
        "sparse_index_dim": 64,
        "sparse_block_size": 4,
        "sparse_topk_blocks": 3,
        "sparse_local_block": 1,
        "sparse_init_block": 0,
        "sparse_score_type": "max",
        "sparse_attention_freq": [0, 1, 1, 1],
    },
}


def _configured(t: Tiny, to: Path, **changes: Any) -> Path:
    folder = Path(shutil.copytree(t.folder, to / "m"))
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_keys_of_released_files_are_read(tiny: Callable[[str], Tiny], tmp_path: Path) -> None:
    t = tiny("minimax-m3")
    with open_checkpoint(_configured(t, tmp_path, **RELEASED)) as checkpoint:
        torch.testing.assert_close(Runner(checkpoint)(t.ids), t.logits, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"sparse_attention_config": {"sparse_init_block": 1}}, "sparse_init_block"),
        ({"sparse_attention_config": {"sparse_score_type": "mean"}}, "sparse_score_type"),
        ({"sparse_attention_config": {"use_sparse_attention": False}}, "use_sparse_attention"),
        ({"sparse_attention_config": [1]}, "sparse_attention_config"),
        ({"index_n_heads": 4}, "index_n_heads"),
        ({"index_local_blocks": 4}, "index_local_blocks"),
        ({"layer_types": ["full_attention", "other", "full_attention", "full_attention"]}, "layer_types"),
        ({"mlp_layer_types": ["dense"]}, "mlp_layer_types"),
        ({"qk_norm_type": "per_layer"}, "qk_norm_type"),
        ({"attention_output_gate": True}, "attention_output_gate"),
        ({"hidden_act": "gelu"}, "hidden_act"),
    ],
)
def test_what_is_not_known_is_refused_by_name(
    changes: dict[str, Any], named: str, tiny: Callable[[str], Tiny], tmp_path: Path
) -> None:
    folder = _configured(tiny("minimax-m3"), tmp_path, **changes)
    with open_checkpoint(folder) as checkpoint, pytest.raises(ArchitectureError, match=named):
        build_graph(checkpoint)
