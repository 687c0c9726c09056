"""The shared operators in the conformance kit, against float64 math: kernels in the interpreter, products in float16.

A choice of the kit's cases; `KTCORE_TRITON_FULL=1` runs all of levels 2 and 3. Experts by format and masked ones are in
test_experts.py, ragged prompts in test_attention.py.
"""

from __future__ import annotations

import os
from fnmatch import fnmatchcase

import pytest
import torch
from ktcore_triton.affine import affine_bank, affine_bytes, affine_weight
from ktcore_triton.operators import implementations
from ktcore_triton.operators.moe import refused_formats

from ktcore.backend import Capabilities, Unsupported
from ktcore.conformance.case import Case
from ktcore.conformance.levels import all_cases
from ktcore.conformance.runner import run_case
from ktcore.conformance.status import Status
from ktcore.conformance.target import Target
from ktcore.ops.linear import LinearSpec
from ktcore.ops.moe import ExpertsSpec

from .shared_target import shared_target
from .stored import random_rows

CHOSEN = (
    "L2.embedding.*-token",
    "L2.linear.Q?_?.one-token",
    "L2.linear.BF16.one-token",
    "L2.linear.F8_E4M3.one-token",
    "L2.linear.IQ2_S.one-token",
    "L2.linear.Q4_K.7x512x100",
    "L2.linear.company",
    "L2.linear.strided-input",
    "L2.rms_norm.dim-576",
    "L2.rope.*.64-of-192",
    "L2.kv_cache.gqa.reused-pages",
    "L2.kv_cache.mla.one-token",
    "L2.attention.one-token",
    "L2.mla.split-up",
    "L2.mla.one-token",
    "L2.mlp.bare",
    "L2.router.sigmoid-bias-256",
    "L2.moe.one-token",
    "L3.attention.window",
    "L3.kv_cache.*.chosen",
    "L3.index_cache.ragged",
    "L3.index_cache.ties",
    "L3.index_cache.pooled",
    "L3.index_cache.pooled-taken-back",
    "L3.block_index_cache.mean",
    "L3.attention.indexer*",
    "L3.token_indexer.eps",
    "L3.token_indexer.pooled",
    "L3.mla.indexer",
    "L3.mla.pooled-indexer",
    "L3.mla.dense-below-top-k",
    "L3.gated_delta_net.ragged",
    "L3.gated_delta_net.one-token",
    "L3.mla.no-positions",
    "L3.mlp.*",
    "L3.stream_*",
)
FULL = os.environ.get("KTCORE_TRITON_FULL") == "1"
pytestmark = pytest.mark.usefixtures("one_thread")


def _cases() -> list[Case]:
    found = [c for c in all_cases() if c.level in (2, 3)]
    return found if FULL else [c for c in found if any(fnmatchcase(c.id, p) for p in CHOSEN)]


@pytest.fixture(scope="module")
def target() -> Target:
    return shared_target()


@pytest.mark.timeout(900)
@pytest.mark.parametrize("case", _cases(), ids=lambda c: c.id)
def test_the_kit_passes(case: Case, target: Target) -> None:
    result = run_case(target, case)
    # what the kernels do not take is said, and sampling is the host's: only of the whole kit
    others = {Status.NOT_APPLICABLE, Status.PASS_FALLBACK} if FULL else set()
    assert result.status in {Status.PASS, *others}, result.reason


def test_the_choice_names_cases_that_exist() -> None:
    ids = [c.id for c in all_cases()]
    assert [p for p in CHOSEN if not any(fnmatchcase(i, p) for i in ids)] == []


@pytest.mark.parametrize("name", ["Q4_0", "Q6_K", "Q4_K", "Q8_0"])
def test_planned_bytes_are_those_on_the_device(name: str) -> None:
    weight = affine_weight(name, random_rows(name, 40, 512), 40, 512)
    assert affine_bytes(name, 40, 512) == weight.nbytes


class _Stack:
    """Just what `affine_bank` asks of a weight."""

    def __init__(self, name: str, items: list[torch.Tensor]) -> None:
        self.format, self._items = name, items
        self.shape = (len(items), items[0].shape[0], 512)

    def part(self, index: int) -> _Stack:
        return _Stack(self.format, self._items[index : index + 1])

    def raw(self) -> object:
        return self._items[0].numpy()


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("name", ["Q4_0", "Q4_K", "Q6_K", "Q2_K"])
def test_a_bank_holds_each_items_values(name: str, dense: bool) -> None:
    items = [torch.from_numpy(random_rows(name, 8, 512, seed)) for seed in range(3)]
    # an item whose scales float16 holds exactly comes first, so that the others widen the bank
    items.insert(0, torch.zeros_like(items[0]))
    bank = affine_bank(_Stack(name, items), dense=dense)  # type: ignore[arg-type]
    wanted = torch.cat([affine_weight(name, i.numpy(), 8, 512).values() for i in items])
    assert torch.equal(bank.values(), wanted)


def test_a_bank_takes_items_with_zero_points_of_their_own() -> None:
    def item(zeros: list[int]) -> torch.Tensor:
        rows = random_rows("INT4_G64", len(zeros), 512)
        blocks = rows.reshape(len(zeros), 8, -1)
        for row, zero in enumerate(zeros):
            blocks[row, :, 2:4] = torch.tensor([zero, 0], dtype=torch.uint8).numpy()
        return torch.from_numpy(rows)

    items = [item([8, 8]), item([7, 7]), item([3, 9])]
    bank = affine_bank(_Stack("INT4_G64", items))  # type: ignore[arg-type]
    wanted = torch.cat([affine_weight("INT4_G64", i.numpy(), 2, 512).values() for i in items])
    torch.testing.assert_close(bank.values(), wanted, rtol=1e-6, atol=0)


def test_an_absent_triton_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ktcore_triton.operators.base.find_spec", lambda name: None)
    linear = next(i for i in implementations("any") if i.id == "any.linear")
    answer = linear.supports(LinearSpec(64, 64, "Q8_0"), Capabilities("any", "device", live=True))
    assert isinstance(answer, Unsupported)
    assert "Triton is not installed" in answer.reason
    # a plan for a device that is not here does not ask for it
    assert not isinstance(linear.supports(LinearSpec(64, 64, "Q8_0"), Capabilities("any", "device")), Unsupported)


@pytest.mark.parametrize("role", ["gate", "down"])
def test_experts_with_columns_in_orders_of_their_own_are_refused(role: str) -> None:
    """GPTQ's activation order: the kernel reads its input as it comes."""
    ordered = "INT4_G32_ORDERED"
    wide, down = (ordered, "INT4_G32") if role == "gate" else ("INT4_G32", ordered)
    refused = refused_formats(ExpertsSpec(256, 256, 8, 2, "silu", wide, wide, down))
    assert refused == f"experts in {ordered}: each has columns in an order of its own, which the kernel does not follow"
    assert refused_formats(ExpertsSpec(256, 256, 8, 2, "silu", "INT4_G32", "INT4_G32", "INT4_G32")) == ""
