"""What is known of one backend: where it came from, whether it can be used, and why not when it cannot."""

from __future__ import annotations

import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from enum import Enum

from ktcore.backend.spec import API_VERSION, BackendSpec, Probe

PROBE_SECONDS = 5.0
"""A probe that takes longer is given up; drivers that hang must not hang the program."""


class BackendState(Enum):
    """LOADED can run here; UNAVAILABLE lacks a device or library; INCOMPATIBLE was built for another API version;
    BROKEN failed in its own code."""

    LOADED = "loaded"
    UNAVAILABLE = "unavailable"
    INCOMPATIBLE = "incompatible"
    BROKEN = "broken"


@dataclass(frozen=True)
class Verdict:
    """A state with its reason in words, and the traceback where an exception led to it."""

    state: BackendState
    reason: str
    traceback: str | None = None
    devices: int = 0


@dataclass
class BackendRecord:
    """One backend as found. Asking for its state probes it, once.

    Attributes:
        name: what users type; the entry point's name when the plugin failed before it could say.
        distribution: "package version" that brought it.
        spec: None when the plugin failed before it could register one.
    """

    name: str
    distribution: str
    spec: BackendSpec | None = None
    probe_seconds: float = PROBE_SECONDS
    _verdict: Verdict | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    @property
    def accelerator(self) -> bool:
        """Whether it is an accelerator's; True as long as nothing else is known."""
        return self.spec is None or self.spec.accelerator

    @property
    def older_api(self) -> bool:
        """Whether it was written for a major of the plugin API before this one, which is taken in with less trust."""
        return self.spec is not None and self.spec.api_version[0] < API_VERSION[0]

    @property
    def settled(self) -> Verdict | None:
        """What is known without probing."""
        return self._verdict

    @property
    def usable(self) -> bool:
        """Whether its description and implementations can be trusted; does not probe."""
        known = self._verdict
        return self.spec is not None and (known is None or known.state in _USABLE)

    @property
    def verdict(self) -> Verdict:
        """State and reason; the first call probes."""
        with self._lock:
            if self._verdict is None:
                assert self.spec is not None, "a record without a spec is settled when it is made"
                found = bounded_probe(self.spec.probe, self.probe_seconds)
                self._verdict = replace(found, reason=found.reason + _OLDER) if self.older_api else found
            return self._verdict

    @property
    def state(self) -> BackendState:
        """The four-way state; the first call probes."""
        return self.verdict.state

    @property
    def reason(self) -> str:
        """Why it is in this state, in words."""
        return self.verdict.reason

    @property
    def traceback(self) -> str | None:
        """The traceback of the failure, for `BROKEN` ones."""
        return self.verdict.traceback

    def fail(self, state: BackendState, reason: str, trace: str | None = None) -> None:
        """Settle the record on a failure."""
        self._verdict = Verdict(state, reason, trace)


def broken(error: BaseException, doing: str) -> Verdict:
    """The verdict for an exception that a plugin's own code raised while `doing`."""
    trace = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    return Verdict(BackendState.BROKEN, f"{doing}: {describe(error)}", trace)


def describe(error: BaseException) -> str:
    """An exception in one line."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__


def bounded_probe(probe: Callable[[], Probe], seconds: float) -> Verdict:
    """Call a probe on a thread of its own and wait at most `seconds` for it."""
    found: list[Verdict] = []

    def run() -> None:
        try:
            found.append(_judge(probe()))
        except BaseException as error:  # a plugin may even call sys.exit; it must not take the program along
            found.append(broken(error, "its probe failed"))

    thread = threading.Thread(target=run, name="ktcore-probe", daemon=True)
    thread.start()
    thread.join(seconds)
    if found:
        return found[0]
    return Verdict(BackendState.UNAVAILABLE, f"its probe gave no answer within {seconds:g} s: the driver may hang")


def _judge(answer: object) -> Verdict:
    if not isinstance(answer, Probe):
        return Verdict(BackendState.BROKEN, f"its probe returned {type(answer).__name__} instead of a Probe")
    state = BackendState.LOADED if answer.available else BackendState.UNAVAILABLE
    return Verdict(state, answer.reason, devices=answer.devices)


_USABLE = (BackendState.LOADED, BackendState.UNAVAILABLE)
_OLDER = (
    "; written for an older plugin API, without `handles`: it is used only where no optional field of a spec is, "
    "until its author declares them"
)
