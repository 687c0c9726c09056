"""Level 5. Times, for information."""

from __future__ import annotations

from ktcore.conformance.case import Case
from ktcore.conformance.plugin import conclude
from ktcore.conformance.report import Result

LEVEL = 5


def test_figures(case: Case, verdict: Result) -> None:
    conclude(verdict)
