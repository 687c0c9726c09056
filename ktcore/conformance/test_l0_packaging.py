"""Level 0. What a backend is before a device is touched."""

from __future__ import annotations

from ktcore.conformance.case import Case
from ktcore.conformance.plugin import conclude
from ktcore.conformance.report import Result

LEVEL = 0


def test_packaging(case: Case, verdict: Result) -> None:
    conclude(verdict)
