"""Level 2. The operators that every model needs."""

from __future__ import annotations

from ktcore.conformance.case import Case
from ktcore.conformance.plugin import conclude
from ktcore.conformance.report import Result

LEVEL = 2


def test_operators(case: Case, verdict: Result) -> None:
    conclude(verdict)
