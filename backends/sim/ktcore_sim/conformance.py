"""What the conformance kit should know of the simulated device."""

from __future__ import annotations

from ktcore.conformance import Expectations, Mode


def expectations() -> Expectations:
    """Not hardware; counts what it hands to the host, notices memory that is given back too early, fails on demand."""
    return Expectations(
        mode=Mode.SIMULATED,
        fallbacks=lambda runtime: int(runtime.fallback_count()),
        freed_access_is_an_error=True,
        fail_late=lambda runtime, stream: runtime.fail(stream, "asked for by the conformance kit"),
    )
