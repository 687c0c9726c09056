"""What a vendor's package declares to the kit: known gaps with their reasons, precisions, and how its device is run.

A plugin returns an `Expectations` from the hook `ktcore_conformance_expectations`. Permanent and temporary gaps are
different types on purpose: the first are never run, the second are run, and one that passes is a failure.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from ktcore.conformance.status import Mode

_RANK = ("float64", "float32", "float16", "bfloat16")


@dataclass(frozen=True)
class NotSupported:
    """Cases that will never pass.

    Attributes:
        cases: a case id, or a pattern with `*` ("L2.linear.F8_*").
        reason: why, in words for the user.
    """

    cases: str
    reason: str


@dataclass(frozen=True)
class ExpectedFailure:
    """Cases that fail for now, strictly: one that passes is a FAIL until the entry is removed.

    Attributes:
        cases: a case id, or a pattern with `*`.
        issue: where the vendor tracks it.
    """

    cases: str
    issue: str


@dataclass(frozen=True)
class Precision:
    """In what precision implementations compute. Their error is measured against torch's own in the same one.

    Attributes:
        compute: torch dtype's name of products, sums and whatever is kept between operators.
        activations: how inputs of a product are quantised: None, "int8/16" (symmetric, absolute maximum of each 16
            values), "int8/row", "float8_e4m3fn/128" …: a dtype, and the values that share a scale; "bfloat16": rounded.
        kv: dtype's name of cached keys and values; None is `compute`.
        deterministic: two runs give the same bits.
        batch_invariant: a token's result has the same bits whatever else is in the batch.
    """

    compute: str = "float32"
    activations: str | None = None
    kv: str | None = None
    deterministic: bool = True
    batch_invariant: bool = False

    def merged(self, other: Precision) -> Precision:
        """The precision of a whole that has parts of both."""
        by_rank = sorted((self.compute, other.compute), key=lambda n: _RANK.index(n) if n in _RANK else len(_RANK))
        return Precision(
            by_rank[-1],
            self.activations or other.activations,
            self.kv or other.kv,
            self.deterministic and other.deterministic,
            self.batch_invariant and other.batch_invariant,
        )


@dataclass(frozen=True)
class Expectations:
    """All that a plugin tells the kit. Everything is optional.

    Attributes:
        backend: the backend that this is about; None for all of the plugin's.
        mode: whether the device is hardware, a simulation, or code that was only compiled.
        precision: pattern -> precision; the first that matches counts, plain float32 where none does. A pattern is an
            implementation id, or an id and a weight format ("cpu.linear@Q4_*"), both with `*`.
        versions: called once a run: name -> version of driver and libraries.
        fallbacks: called with the open runtime: how many operators it has handed to the host so far; None when the
            device does not count them.
        freed_access_is_an_error: work on memory that was given back before it ran raises on this device.
        fail_late: called with the open runtime and a stream: launches work that fails when the stream gets to it, for
            the case that the error comes back to the host; None when the device has no such thing.
    """

    backend: str | None = None
    mode: Mode = Mode.HARDWARE
    unsupported: tuple[NotSupported, ...] = ()
    expected_failures: tuple[ExpectedFailure, ...] = ()
    precision: Mapping[str, Precision] = field(default_factory=dict)
    versions: Callable[[], Mapping[str, str]] | None = None
    fallbacks: Callable[[Any], int] | None = None
    freed_access_is_an_error: bool = False
    fail_late: Callable[[Any, Any], None] | None = None

    def never(self, case_id: str) -> NotSupported | None:
        """The permanent gap that covers a case."""
        return next((gap for gap in self.unsupported if fnmatchcase(case_id, gap.cases)), None)

    def not_yet(self, case_id: str) -> ExpectedFailure | None:
        """The temporary gap that covers a case."""
        return next((gap for gap in self.expected_failures if fnmatchcase(case_id, gap.cases)), None)

    def precision_of(self, implementation: str, formats: Iterable[str] = ()) -> Precision:
        """The declared precision of an implementation; of several weight formats, the lowest."""
        lowest = None
        for fmt in tuple(formats) or ("",):
            own = next(
                (p for pattern, p in self.precision.items() if _covers(pattern, implementation, fmt)), Precision()
            )
            lowest = own if lowest is None else lowest.merged(own)
        return lowest or Precision()

    def stale(self, case_ids: set[str]) -> list[str]:
        """Patterns of gaps that cover no case: the case was renamed, or never existed."""
        patterns = [g.cases for g in self.unsupported] + [g.cases for g in self.expected_failures]
        return [p for p in patterns if not any(fnmatchcase(i, p) for i in case_ids)]


def _covers(pattern: str, implementation: str, fmt: str) -> bool:
    name, at, formats = pattern.partition("@")
    return fnmatchcase(implementation, name) and (not at or fnmatchcase(fmt, formats))
