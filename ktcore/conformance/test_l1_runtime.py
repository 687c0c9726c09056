"""Level 1. Streams, events, copies, memory, callbacks, graphs."""

from __future__ import annotations

from ktcore.conformance.case import Case
from ktcore.conformance.plugin import conclude
from ktcore.conformance.report import Result

LEVEL = 1


def test_runtime(case: Case, verdict: Result) -> None:
    conclude(verdict)
