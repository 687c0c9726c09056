"""A right backend passes the whole kit; otherwise the mutants would prove nothing."""

from __future__ import annotations

import pytest

from ktcore.conformance.case import Case
from ktcore.conformance.levels import all_cases
from ktcore.conformance.runner import run_cases
from ktcore.conformance.status import Status
from ktcore.weights.formats import known_formats

from .plain import plain_target


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    """Small tensors."""


FEW = {"F32", "F8_E4M3", "Q4_K", "MXFP4", "INT4_G32"}
"""One format of each kind of storage: what is built of products has the same cases for every one, as linear does."""


def _another_format(case: Case) -> bool:
    _, op, *rest = case.id.split(".")
    return op not in ("linear", "rms_norm", "router") and rest[0] in set(known_formats()) - FEW


# memory figures of this process are the business of the mutants' own cases
CHOSEN = [c for c in all_cases() if not c.id.endswith("leak") and c.level < 5 and not _another_format(c)]


@pytest.mark.parametrize(("level", "operator"), sorted({(c.level, c.operator) for c in CHOSEN}))
def test_a_right_backend_fails_nothing(level: int, operator: str) -> None:
    results = run_cases(plain_target(), [c for c in CHOSEN if (c.level, c.operator) == (level, operator)])
    assert [(r.id, r.reason) for r in results if r.status is Status.FAIL] == []
    assert {r.status for r in results} <= {Status.PASS, Status.NOT_APPLICABLE}
    assert all(r.status is Status.PASS for r in results if r.level == 2)


@pytest.mark.parametrize("seed", [1, 2])
def test_nor_with_other_inputs(seed: int) -> None:
    chosen = [c for c in all_cases() if c.level in (2, 3) and ".F32." in c.id]
    assert {r.status for r in run_cases(plain_target(), chosen, seed)} == {Status.PASS}
