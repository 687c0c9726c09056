"""What pytest does for mutation testing: record which test runs which line, and run chosen tests, quick ones first."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

COPY = Path(os.environ.get("KTCORE_MUTANT_COPY", "/nonexistent"))
NOT_THE_MUTANT = 90


class Recorder:
    """Notes the lines of a folder that each test runs, and its time."""

    def __init__(self, folder: Path, out: Path) -> None:
        import coverage

        self.out, self.seconds = out, dict[str, float]()
        self.failed = list[str]()
        self.coverage = coverage.Coverage(data_file=None, source=[str(folder)], config_file=False)
        self.coverage.start()

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        self.coverage.switch_context(item.nodeid)
        yield

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.seconds[report.nodeid] = self.seconds.get(report.nodeid, 0.0) + report.duration
        if report.failed:
            self.failed.append(report.nodeid)

    def pytest_sessionfinish(self) -> None:
        self.coverage.stop()
        data = self.coverage.get_data()
        lines: dict[str, dict[str, list[str]]] = {}
        early: dict[str, list[int]] = {}  # before any test: as modules were imported and tests were collected
        for file in data.measured_files():
            contexts = data.contexts_by_lineno(file)
            name = str(Path(file).relative_to(COPY))
            lines[name] = {str(line): [c for c in found if c] for line, found in contexts.items()}
            early[name] = [line for line, found in contexts.items() if "" in found]
        record = {"lines": lines, "early": early, "seconds": self.seconds, "failed": self.failed}
        self.out.write_text(json.dumps(record))


class Chosen:
    """Runs these tests in this order, and checks that the mutated file is the one that was imported."""

    def __init__(self, tests: list[str], file: str) -> None:
        self.order = {test: place for place, test in enumerate(tests)}
        self.file = file

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = sorted((i for i in items if i.nodeid in self.order), key=lambda i: self.order[i.nodeid])

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        if exitstatus != 0:
            return
        files = {os.path.realpath(f) for m in list(sys.modules.values()) if (f := getattr(m, "__file__", None))}
        if os.path.realpath(COPY / self.file) not in files:
            session.exitstatus = NOT_THE_MUTANT


def pytest_configure(config: pytest.Config) -> None:
    if target := os.environ.get("KTCORE_MUTANT_RECORD"):
        folder, out = target.split(os.pathsep)
        config.pluginmanager.register(Recorder(Path(folder), Path(out)), "mutation-recorder")
