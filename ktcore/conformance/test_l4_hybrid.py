"""Level 4. Whole tiny models, device and host together."""

from __future__ import annotations

from ktcore.conformance.case import Case
from ktcore.conformance.plugin import conclude
from ktcore.conformance.report import Result

LEVEL = 4


def test_hybrid(case: Case, verdict: Result) -> None:
    conclude(verdict)
