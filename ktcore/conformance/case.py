"""A case, and what its check gets to work with."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NoReturn

import numpy as np

if TYPE_CHECKING:
    from ktcore.conformance.target import Target

Value = str | int | float


class Failure(Exception):
    """The backend gave a wrong answer; the message says which and how wrong."""


class NotApplicable(Exception):
    """The backend does not declare what the case is about; the message says what."""


@dataclass(frozen=True)
class Case:
    """One thing that is checked.

    Attributes:
        id: stable and printable: level, operator or subject, format where there is one, what is special.
        about: what must hold, in a sentence.
        check: raises `Failure` (or anything) when it does not hold, `NotApplicable` when it need not.
        operator: spec's operator name, or the subject ("stream", "memory") below level 2.
        format: weight format for cases that are about one.
    """

    id: str
    level: int
    operator: str
    about: str
    check: Check = field(compare=False)
    format: str | None = None


Check = Callable[["Context"], None]
"""What a case runs."""


@dataclass
class Context:
    """A case in flight.

    Attributes:
        fallbacks: what answered instead of the backend, in words.
        values: figures for the report ("error" is the largest ratio to the tolerated one).
        timings: figures that differ from run to run.
    """

    case: Case
    target: Target
    seed: int
    fallbacks: list[str] = field(default_factory=list)
    values: dict[str, Value] = field(default_factory=dict)
    timings: dict[str, float] = field(default_factory=dict)

    def rng(self, what: str = "") -> np.random.Generator:
        """A generator that depends on the case's id, the seed and `what`, and on nothing else."""
        digest = hashlib.sha256(f"{self.case.id}|{self.seed}|{what}".encode()).digest()
        return np.random.default_rng(np.frombuffer(digest, dtype=np.uint32))

    def fallback(self, reason: str) -> None:
        """Note that something else than the backend answered."""
        if reason not in self.fallbacks:
            self.fallbacks.append(reason)

    def not_applicable(self, reason: str) -> NoReturn:
        """End the case as N/A."""
        raise NotApplicable(reason)

    def fail(self, reason: str) -> NoReturn:
        """End the case as FAIL."""
        raise Failure(reason)

    def require(self, condition: bool, reason: str) -> None:
        """Fail unless `condition`."""
        if not condition:
            raise Failure(reason)

    def keep_worst(self, name: str, value: float) -> None:
        """Keep the largest value of a figure."""
        self.values[name] = max(float(self.values.get(name, 0.0)), value)
