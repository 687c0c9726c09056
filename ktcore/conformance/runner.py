"""Runs cases and turns what happened into statuses. Knows nothing of pytest, so that tests can run single cases."""

from __future__ import annotations

import time
import traceback
from collections.abc import Iterable
from typing import Any

from ktcore.conformance.case import Case, Context, NotApplicable
from ktcore.conformance.report import Result
from ktcore.conformance.status import Status
from ktcore.conformance.target import Target


def run_cases(target: Target, cases: Iterable[Case], seed: int = 0) -> list[Result]:
    """Run every case and return the results in order; nothing that a case raises gets out."""
    return [run_case(target, case, seed) for case in cases]


def run_case(target: Target, case: Case, seed: int = 0) -> Result:
    """Run one case."""
    never = target.expectations.never(case.id)
    if never is not None:
        return Result(**_about(case), status=Status.UNSUPPORTED, reason=never.reason)
    ctx = Context(case, target, seed)
    started = time.perf_counter()
    status, reason = _outcome(ctx)
    if status is Status.FAIL:
        _settle(target)
    seconds = time.perf_counter() - started
    status, reason = _strict(ctx, status, reason)
    shown = status is not Status.NOT_APPLICABLE
    return Result(
        **_about(case),
        status=status,
        reason=reason,
        values=dict(sorted(ctx.values.items())) if shown else {},
        timings=ctx.timings,
        seconds=round(seconds, 4),
    )


def _outcome(ctx: Context) -> tuple[Status, str]:
    counted = ctx.target.expectations.fallbacks
    before = counted(ctx.target.runtime) if counted and ctx.case.level >= 2 else 0
    try:
        ctx.case.check(ctx)
        if counted and ctx.case.level >= 2:
            handed = counted(ctx.target.runtime) - before
            if handed:
                ctx.fallback(f"the device handed {handed} operator calls to the host")
    except NotApplicable as why:
        return Status.NOT_APPLICABLE, str(why)
    except KeyboardInterrupt:
        raise
    except AssertionError as error:
        return Status.FAIL, _one_line(error, "the check failed")
    except BaseException as error:
        return Status.FAIL, _one_line(error, type(error).__name__)
    if ctx.fallbacks:
        return Status.PASS_FALLBACK, "; ".join(ctx.fallbacks)
    return Status.PASS, ""


def _settle(target: Target) -> None:
    """Take in errors that a failed case left in the device, so that they are not the next case's."""
    try:
        target.runtime.synchronize()
    except Exception:
        return


def _strict(ctx: Context, status: Status, reason: str) -> tuple[Status, str]:
    """Expected failures: the failure is expected, a pass is not."""
    expected = ctx.target.expectations.not_yet(ctx.case.id)
    if expected is None or status is Status.NOT_APPLICABLE:
        return status, reason
    if status is Status.FAIL:
        return Status.XFAIL, f"{expected.issue}: {reason}"
    return Status.FAIL, f"passes, but is listed as an expected failure ({expected.issue}): remove '{expected.cases}'"


def _one_line(error: BaseException, kind: str) -> str:
    text = " ".join(str(error).split())
    if type(error).__name__ == "Failure":
        return text
    where = traceback.extract_tb(error.__traceback__)[-1]
    return f"{kind}: {text} ({where.filename.rsplit('/', 1)[-1]}, {where.name})"


def _about(case: Case) -> dict[str, Any]:
    return {
        "id": case.id,
        "level": case.level,
        "operator": case.operator,
        "format": case.format,
        "about": case.about,
    }
