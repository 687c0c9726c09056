"""Reports: equal for one seed, checked when read, compared case by case."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from ktcore.conformance import Mode, Status
from ktcore.conformance.compare import compare_reports
from ktcore.conformance.levels import all_cases, select
from ktcore.conformance.report import Report, ReportError, Result, load_report, make_report, save_report
from ktcore.conformance.runner import run_cases

from .plain import plain_target


def result(name: str, status: Status, operator: str = "linear", fmt: str | None = None, **more: Any) -> Result:
    return Result(id=name, level=2, operator=operator, format=fmt, about="a thing", status=status, **more)


def report(*results: Result, backend: str = "alpha", **more: Any) -> Report:
    given: dict[str, Any] = {"mode": Mode.HARDWARE, "seed": 0, "date": "2026-01-01"} | more
    given |= {"versions": {"driver": "1.2"}}
    return Report(backend=backend, distribution="alpha 1", device="Alpha X", results=results, **given)


def test_two_runs_of_one_seed_differ_in_times_only(one_thread: None) -> None:
    chosen = select(all_cases(), ids=["L2.linear.*", "L2.experts.masked", "L2.sampling.top-k", "L5.*"])
    texts = []
    for seed in (3, 3, 4):
        target = plain_target()
        texts.append(make_report(target, run_cases(target, chosen, seed), seed).without_times())
    assert texts[0] == texts[1]
    assert texts[0] != texts[2]
    assert '\n "seed": 3,\n' in texts[0]  # one value a line, so that a difference is one


def test_a_case_that_runs_alone_gives_what_it_gave_among_others(one_thread: None) -> None:
    among = run_cases(plain_target(), select(all_cases(), ids=["L2.linear.*", "L2.mla.*"]))
    alone = run_cases(plain_target(), select(all_cases(), ids=["L2.mla.yarn-scale"]))
    assert alone[0].values == next(r for r in among if r.id == alone[0].id).values
    assert alone[0].values["error"] > 0


def test_a_report_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "alpha.json"
    written = report(result("a", Status.XFAIL, reason="ticket 7: no", values={"error": 0.5}, seconds=0.1))
    save_report(written, path)
    assert load_report(path) == written


def test_a_report_does_not_say_where_its_python_lies(tmp_path: Path) -> None:
    asked = result("L2.a", Status.NOT_APPLICABLE, reason=f"{sys.prefix} has no include/x.h; /opt/x has no include/x.h")
    save_report(report(asked), tmp_path / "r.json")
    (found,) = load_report(tmp_path / "r.json").results
    assert found.reason == "$VIRTUAL_ENV has no include/x.h; /opt/x has no include/x.h"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": 2}, "schema_version"),
        ({"mode": "imagined"}, "mode"),
        ({"colour": "red"}, "colour"),
        ({"results": [{"id": "a"}]}, r"results\.0\.level"),
    ],
)
def test_what_is_no_report_is_refused_with_the_field(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = tmp_path / "alpha.json"
    save_report(report(), path)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ReportError, match=message):
        load_report(path)


def test_a_missing_report_says_so(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match="cannot be read"):
        load_report(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("before", "after", "worse"),
    [
        (Status.PASS, Status.FAIL, True),
        (Status.PASS, Status.PASS_FALLBACK, True),
        (Status.PASS_FALLBACK, Status.NOT_APPLICABLE, True),
        (Status.XFAIL, Status.FAIL, True),
        (Status.PASS, None, True),
        (None, Status.FAIL, True),
        (None, Status.PASS, False),
        (Status.NOT_APPLICABLE, None, False),
        (Status.FAIL, Status.XFAIL, False),
        (Status.XFAIL, Status.PASS, False),
        (Status.NOT_APPLICABLE, Status.PASS_FALLBACK, False),
    ],
)
def test_what_got_worse_is_a_regression(before: Status | None, after: Status | None, worse: bool) -> None:
    reports = [report(*([result("a", s)] if s else [])) for s in (before, after)]
    (change,) = compare_reports(*reports)
    assert change.regression is worse
    assert change.describe().startswith(f"a: {before.value if before else 'not there'} -> ")


def test_equal_reports_have_no_changes_and_regressions_come_first() -> None:
    old = report(result("a", Status.FAIL), result("b", Status.PASS), result("c", Status.PASS))
    new = report(result("a", Status.PASS), result("b", Status.FAIL), result("c", Status.PASS))
    assert compare_reports(old, old) == []
    assert [c.id for c in compare_reports(old, new)] == ["b", "a"]


def test_a_grown_error_is_told_but_no_regression() -> None:
    reports = [report(result("a", Status.PASS, values={"error": e})) for e in (0.2, 0.9)]
    (change,) = compare_reports(*reports)
    assert not change.regression
    assert change.describe() == "a: error 0.2 -> 0.9 of what is tolerated"


def test_a_partial_run_is_compared_in_its_own_cases() -> None:
    old = report(result("a", Status.PASS), result("b", Status.PASS))
    assert compare_reports(old, report(result("a", Status.PASS), selection="cases a")) == []
