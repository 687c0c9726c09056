"""What changed between two reports of one backend, and whether it got worse."""

from __future__ import annotations

from dataclasses import dataclass

from ktcore.conformance.report import Report, Result
from ktcore.conformance.status import Status

_GOODNESS = {
    Status.PASS: 3,
    Status.PASS_FALLBACK: 2,
    Status.NOT_APPLICABLE: 1,
    Status.UNSUPPORTED: 1,
    Status.XFAIL: 1,
    Status.FAIL: 0,
}
ERROR_GROWTH = 2.0
"""An error that grew by more than this is worth a line, though it still passes."""


@dataclass(frozen=True)
class Change:
    """One case in two reports; `before` or `after` is None where a report does not have it."""

    before: Result | None
    after: Result | None

    @property
    def id(self) -> str:
        """The case."""
        known = self.after or self.before
        assert known is not None
        return known.id

    @property
    def regression(self) -> bool:
        """Worse than before; a case that is gone counts, unless it gave nothing; so does a new one that fails."""
        if self.after is None:
            return self.before is not None and _GOODNESS[self.before.status] > 1
        if self.before is None:
            return self.after.status is Status.FAIL
        return _GOODNESS[self.after.status] < _GOODNESS[self.before.status]

    def describe(self) -> str:
        """In one line."""
        old = self.before.status.value if self.before else "not there"
        new = self.after.status.value if self.after else "gone"
        reason = f" ({self.after.reason})" if self.after and self.after.reason else ""
        if old == new:
            return f"{self.id}: error {_error(self.before):.3g} -> {_error(self.after):.3g} of what is tolerated"
        return f"{self.id}: {old} -> {new}{reason}"


def compare_reports(before: Report, after: Report) -> list[Change]:
    """All changes, regressions first. Cases outside of what the later run selected are left out."""
    old, new = {r.id: r for r in before.results}, {r.id: r for r in after.results}
    ids = [*new] if after.selection else [*dict.fromkeys([*old, *new])]
    changes = [Change(old.get(i), new.get(i)) for i in ids]
    changed = [c for c in changes if _differs(c)]
    return sorted(changed, key=lambda c: not c.regression)


def _differs(change: Change) -> bool:
    if change.before is None or change.after is None:
        return True
    if change.before.status is not change.after.status:
        return True
    old, new = _error(change.before), _error(change.after)
    return new > 0.1 and new > ERROR_GROWTH * old


def _error(result: Result | None) -> float:
    return float(result.values.get("error", 0.0)) if result else 0.0
