"""Level 3. Variants that some families need."""

from __future__ import annotations

from ktcore.conformance.case import Case
from ktcore.conformance.plugin import conclude
from ktcore.conformance.report import Result

LEVEL = 3


def test_optional(case: Case, verdict: Result) -> None:
    conclude(verdict)
