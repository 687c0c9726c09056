"""Perplexity of the demo model in other weight formats, against transformers in float32 on the dequantised weights.

One token's likelihood changes by some 9% when activations are rounded to 8 bits, so a mean of 0.5% takes thousands of
tokens: `KTCORE_TEST_WINDOWS` of 512 (1; `make thorough` takes 8). The divergence of whole answers tells of a fault by a
few hundred. Transformers would need minutes: it checks the unrounded mode, which then checks the rounded one.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from .requantize import (
    AFFINE,
    F32,
    WINDOW,
    divergence,
    native_logits,
    ours,
    perplexity,
    rules_with,
    theirs,
    token_ids,
    wide_tensors,
    write,
)

TEXT = Path(__file__).parents[1] / "data" / "guides.txt"
POSITIONS = int(os.environ.get("KTCORE_TEST_WINDOWS", "1")) * WINDOW


@pytest.fixture(scope="module")
def tensors(smollm2_path: Path) -> dict[str, F32]:
    return wide_tensors(smollm2_path)


@pytest.fixture(scope="module")
def ids(smollm2_path: Path) -> list[int]:
    found = token_ids(smollm2_path, TEXT.read_text())
    assert len(found) >= POSITIONS
    return found[:POSITIONS]


def _mixed(name: str) -> str:
    """Every affine format in one file: layer by layer another one."""
    return AFFINE[int(name.split(".")[1]) % len(AFFINE)] if name.startswith("blk.") else "Q6_K"


def test_every_affine_gguf_format(smollm2_path: Path, tensors: dict[str, F32], ids: list[int], tmp_path: Path) -> None:
    path = write(smollm2_path, tensors, tmp_path / "mixed.gguf", _mixed)
    exact = tmp_path / "exact.yaml"
    exact.write_text(rules_with("activations: f32"))
    first = ids[:WINDOW]
    unrounded = native_logits(path, first, exact)
    assert perplexity(lambda window: unrounded, first) == pytest.approx(theirs(path, first), rel=2e-4)
    assert divergence(unrounded, native_logits(path, first)) <= 4e-3  # 0.0025 over half of these
    if len(ids) > WINDOW:
        assert ours(path, ids) == pytest.approx(ours(path, ids, exact), rel=0.005)


def test_float_weights_quantised_while_loading(
    smollm2_path: Path, tensors: dict[str, F32], ids: list[int], tmp_path: Path
) -> None:
    path = write(smollm2_path, tensors, tmp_path / "half.gguf", lambda name: "F16")
    rules = tmp_path / "integers.yaml"
    rules.write_text(rules_with("quantize: int4_g128", "0-3", head=False))
    expected = theirs(path, ids[:WINDOW], "INT4_G128", range(4))
    assert ours(path, ids[:WINDOW], rules) == pytest.approx(expected, rel=0.005)
