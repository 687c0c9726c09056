"""The pytest side: options, the target opened once a session, one test a case, and the report at the end."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from ktcore.conformance.case import Case
from ktcore.conformance.levels import all_cases, select
from ktcore.conformance.open import open_target
from ktcore.conformance.report import Result, make_report, save_report
from ktcore.conformance.runner import run_case
from ktcore.conformance.status import Status
from ktcore.conformance.target import Target
from ktcore.errors import KtcoreError

_TARGET = pytest.StashKey[Target]()
_RESULTS = pytest.StashKey[list[Result]]()
_CHOSEN = pytest.StashKey[list[Case]]()
_THREADS = pytest.StashKey[int]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """The kit's options."""
    group = parser.getgroup("ktcore conformance kit")
    group.addoption("--backend", help="the backend to test")
    group.addoption("--level", type=int, help="levels up to this one (default: all)")
    group.addoption("--seed", type=int, default=0, help="seed of all inputs (default: 0)")
    group.addoption("--report", type=Path, help="write the report to this file")
    group.addoption("--case", action="append", help="run only this case; may be repeated, may hold *")


def pytest_configure(config: pytest.Config) -> None:
    """Open the backend and choose cases before anything is collected: a wrong name is one error, not one a module."""
    name = config.getoption("--backend")
    if not name:
        raise pytest.UsageError("the conformance kit needs --backend NAME")
    try:
        config.stash[_CHOSEN] = select(all_cases(), config.getoption("--level"), config.getoption("--case"))
    except ValueError as error:
        raise pytest.UsageError(str(error)) from error
    try:
        config.stash[_TARGET] = target = open_target(name)
        if config.getoption("--level") != 0:
            target.registry.require(target.name)
    except KtcoreError as error:
        raise pytest.UsageError(f"{error}\n  what needs no device can be tested with: --level 0") from error
    config.stash[_RESULTS] = []
    # the truth is made of small tensors: threads that wait for each other cost more than they give
    config.stash[_THREADS] = torch.get_num_threads()
    torch.set_num_threads(1)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test for every selected case of the module's level."""
    if "case" not in metafunc.fixturenames or not hasattr(metafunc.module, "LEVEL"):
        return
    mine = [case for case in metafunc.config.stash[_CHOSEN] if case.level == metafunc.module.LEVEL]
    metafunc.parametrize("case", [pytest.param(case, id=case.id) for case in mine])


@pytest.fixture
def verdict(case: Case, request: pytest.FixtureRequest) -> Result:
    """The case's result, kept for the report."""
    config = request.config
    result = run_case(config.stash[_TARGET], case, config.getoption("--seed"))
    config.stash[_RESULTS].append(result)
    return result


def conclude(result: Result) -> None:
    """Tell pytest: a pass, a skip with its reason, or a failure."""
    if result.status is Status.FAIL:
        pytest.fail(f"{result.id}: {result.about}\n  {result.reason}", pytrace=False)
    if result.status in (Status.NOT_APPLICABLE, Status.UNSUPPORTED, Status.XFAIL):
        pytest.skip(f"{result.status.value}: {result.reason}")


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Write the report and let go of the device."""
    config = session.config
    if _TARGET not in config.stash:
        return
    target, results = config.stash[_TARGET], config.stash[_RESULTS]
    path = config.getoption("--report")
    if path and results:
        save_report(make_report(target, results, config.getoption("--seed"), _selection(config)), path)
    target.close()
    torch.set_num_threads(config.stash[_THREADS])


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Counts by status, and what the references answered."""
    results = config.stash.get(_RESULTS, [])
    if not results:
        return
    counts = {s: sum(r.status is s for r in results) for s in Status}
    terminalreporter.section(f"conformance of {config.getoption('--backend')}")
    terminalreporter.line("  ".join(f"{s.value} {n}" for s, n in counts.items() if n))
    wrong = [r for r in results if r.status is Status.FAIL]
    for r in wrong:
        terminalreporter.line(
            f"again: pytest --pyargs ktcore.conformance --backend {config.getoption('--backend')} --case {r.id}"
        )
    sys.stdout.flush()


def _selection(config: pytest.Config) -> str:
    cases, level = config.getoption("--case"), config.getoption("--level")
    if cases:
        return "cases " + ", ".join(cases)
    return "" if level is None else f"levels up to {level}"
