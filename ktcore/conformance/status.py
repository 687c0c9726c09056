"""The statuses a case can end with, and the ways in which a backend can have been run."""

from __future__ import annotations

from enum import Enum


class Status(str, Enum):
    """How a case ended."""

    PASS = "PASS"
    """The backend's own code gave the right answer."""
    FAIL = "FAIL"
    """Declared and wrong, or raised; or an expected failure that passed."""
    NOT_APPLICABLE = "N/A"
    """The backend does not declare what the case is about."""
    PASS_FALLBACK = "PASS-FALLBACK"
    """Right, but the reference or a counted fallback gave the answer, in whole or in part."""
    UNSUPPORTED = "UNSUPPORTED"
    """The vendor's package says that this will never work, and why. Not run."""
    XFAIL = "XFAIL"
    """The vendor's package says that this does not work yet and names an issue, and it did fail."""


class Mode(str, Enum):
    """What a report's results are worth."""

    HARDWARE = "run on hardware"
    SIMULATED = "simulated"
    COMPILED = "compiled"
    NEVER_RUN = "never run"
