"""Every mutant is caught by the case that names it, and that case passes on a right backend."""

from __future__ import annotations

import pytest

from ktcore.backend.host import HostRuntime
from ktcore.conformance import Expectations
from ktcore.conformance.case import Case
from ktcore.conformance.levels import all_cases
from ktcore.conformance.runner import run_case
from ktcore.conformance.status import Status

from .block_mutants import BLOCKS
from .compressed_mutants import COMPRESSED
from .leftover_mutants import LEFTOVERS
from .mutants import MUTANTS, Mutant, expectations
from .plain import plain_target
from .sparse_mutants import SPARSE

ALL = (*MUTANTS, *LEFTOVERS, *SPARSE, *BLOCKS, *COMPRESSED)


@pytest.fixture(scope="module")
def cases() -> dict[str, Case]:
    return {case.id: case for case in all_cases()}


def run(
    cases: dict[str, Case], mutant: Mutant, runtime: type[HostRuntime], declared: Expectations, broken: bool
) -> Status:
    target = plain_target(dict(mutant.makers) if broken else None, runtime, declared)
    result = run_case(target, cases[mutant.case])
    print(result.status, result.reason)
    return result.status


@pytest.mark.parametrize("mutant", ALL, ids=lambda m: m.name.replace(" ", "-"))
def test_the_mutant_is_caught(mutant: Mutant, cases: dict[str, Case], one_thread: None) -> None:
    assert run(cases, mutant, mutant.runtime, expectations(mutant), broken=True) is Status.FAIL


@pytest.mark.parametrize(
    ("case", "runtime"),
    sorted({(m.case, m.right_runtime) for m in ALL}, key=str),
    ids=lambda v: getattr(v, "__name__", v),
)
def test_the_case_passes_on_a_right_backend(
    case: str, runtime: type[HostRuntime], cases: dict[str, Case], one_thread: None
) -> None:
    assert run(cases, Mutant("none", case), runtime, Expectations(), broken=False) is Status.PASS


def test_there_are_enough_and_no_two_of_one_name() -> None:
    names = [m.name for m in ALL]
    assert len(names) == len(set(names))
    assert len(names) >= 40
