"""Statuses: what a case's outcome becomes, with and without a vendor's lists."""

from __future__ import annotations

import pytest

from ktcore.conformance import Expectations, ExpectedFailure, NotSupported, Precision, Status
from ktcore.conformance.case import Case, Context
from ktcore.conformance.levels import all_cases, select
from ktcore.conformance.report import Result
from ktcore.conformance.runner import run_case

from .plain import plain_target


def passes(ctx: Context) -> None:
    ctx.keep_worst("error", 0.5)


def fails(ctx: Context) -> None:
    ctx.require(False, "seven is not eight")


def raises(ctx: Context) -> None:
    raise RuntimeError("the driver\nsays no")


def falls_back(ctx: Context) -> None:
    ctx.fallback("the reference did it")


def does_not_apply(ctx: Context) -> None:
    ctx.not_applicable("no such thing here")


def run(check: object, expectations: Expectations | None = None) -> Result:
    return run_case(plain_target(expectations=expectations), Case("L2.x.y", 2, "x", "z", check))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("check", "status", "reason"),
    [
        (passes, Status.PASS, ""),
        (fails, Status.FAIL, "seven is not eight"),
        (raises, Status.FAIL, "RuntimeError: the driver says no (test_runner.py, raises)"),
        (falls_back, Status.PASS_FALLBACK, "the reference did it"),
        (does_not_apply, Status.NOT_APPLICABLE, "no such thing here"),
    ],
)
def test_an_outcome_becomes_a_status(check: object, status: Status, reason: str) -> None:
    result = run(check)
    assert (result.status, result.reason) == (status, reason)


def test_a_permanent_gap_is_not_run() -> None:
    expectations = Expectations(unsupported=(NotSupported("L2.x.*", "there is no such unit"),))
    result = run(raises, expectations)
    assert (result.status, result.reason) == (Status.UNSUPPORTED, "there is no such unit")


@pytest.mark.parametrize(
    ("check", "status", "reason"),
    [
        (fails, Status.XFAIL, "ticket 7: seven is not eight"),
        (passes, Status.FAIL, "passes, but is listed as an expected failure (ticket 7): remove 'L2.x.y'"),
        (falls_back, Status.FAIL, "passes, but is listed as an expected failure (ticket 7): remove 'L2.x.y'"),
        (does_not_apply, Status.NOT_APPLICABLE, "no such thing here"),
    ],
)
def test_a_temporary_gap_is_strict(check: object, status: Status, reason: str) -> None:
    result = run(check, Expectations(expected_failures=(ExpectedFailure("L2.x.y", "ticket 7"),)))
    assert (result.status, result.reason) == (status, reason)


def test_operators_that_the_device_hands_to_the_host_make_a_pass_a_fallback() -> None:
    counts = iter([3, 5])
    result = run(passes, Expectations(fallbacks=lambda runtime: next(counts)))
    assert (result.status, result.reason) == (Status.PASS_FALLBACK, "the device handed 2 operator calls to the host")


def test_a_gap_that_names_no_case_is_told() -> None:
    expectations = Expectations(
        unsupported=(NotSupported("L2.linear.*", "x"), NotSupported("L2.liner.*", "x")),
        expected_failures=(ExpectedFailure("L2.moe.gone", "y"),),
    )
    assert expectations.stale({c.id for c in all_cases()}) == ["L2.liner.*", "L2.moe.gone"]


def test_the_lowest_precision_of_the_formats_counts() -> None:
    low = Precision(activations="int8/16", batch_invariant=True)
    expectations = Expectations(precision={"a.*@F32": Precision(), "a.linear": low, "a.*": Precision("bfloat16")})
    assert expectations.precision_of("a.linear", ["F32"]) == Precision()
    assert expectations.precision_of("a.linear", ["Q4_K"]) == low
    assert expectations.precision_of("a.linear", ["F32", "Q4_K"]) == Precision(activations="int8/16")
    assert expectations.precision_of("a.mlp", ["Q4_K"]) == Precision("bfloat16")
    assert expectations.precision_of("b.linear", ["F32"]) == Precision()


def test_ids_are_unique_printable_and_begin_with_their_level() -> None:
    cases = all_cases()
    assert all(case.id.startswith(f"L{case.level}.") and case.id.isascii() and " " not in case.id for case in cases)
    assert all(case.about and "\n" not in case.about for case in cases)
    assert len(cases) > 500


def test_selection_by_level_and_by_pattern() -> None:
    cases = all_cases()
    assert {c.level for c in select(cases, level=1)} == {0, 1}
    assert [c.id for c in select(cases, ids=["L2.linear.bias"])] == ["L2.linear.bias"]
    assert all(c.operator == "mla" for c in select(cases, ids=["L2.mla.*"]))
    with pytest.raises(ValueError, match=r"no case is called 'L2.liner'"):
        select(cases, ids=["L2.liner"])


def test_inputs_depend_on_the_case_and_the_seed_alone() -> None:
    target = plain_target()
    one, other = (Case(f"L2.x.{n}", 2, "x", "z", passes) for n in "ab")
    asked = ((one, 0), (one, 0), (one, 1), (other, 0))
    drawn = [Context(case, target, seed).rng("x").integers(1 << 60) for case, seed in asked]
    assert drawn[0] == drawn[1]
    assert len(set(drawn)) == 3
