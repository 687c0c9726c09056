"""From reports to rows, columns and cells: a cell sums up all cases of one operator (and format) on one backend."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from ktcore.conformance.report import Report, ReportError, Result
from ktcore.conformance.status import Mode, Status

_WORST_FIRST = (
    Status.FAIL,
    Status.XFAIL,
    Status.PASS,
    Status.PASS_FALLBACK,
    Status.UNSUPPORTED,
    Status.NOT_APPLICABLE,
)
LEVEL_NAMES = {
    0: "Packaging",
    1: "Runtime",
    2: "Mandatory operators",
    3: "Optional variants",
    4: "Hybrid models",
    5: "Figures",
}
OPERATOR_LEVEL = 2


@dataclass(frozen=True)
class Cell:
    """What the cases of a row say on one backend.

    Attributes:
        status: FAIL if any fails; else the best that is known; None where nothing was run.
        counts: number of cases by status.
        notes: reasons, without repeats.
    """

    status: Status | None
    counts: Mapping[Status, int]
    notes: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """ "12 PASS, 1 XFAIL": the short form."""
        return ", ".join(f"{n} {s.value}" for s, n in self.counts.items() if n) or "never run"


@dataclass(frozen=True)
class Column:
    """A backend, with or without a report; of several reports of one backend, each has its device in the name."""

    backend: str
    mode: Mode
    report: Report | None = None


class Evidence(BaseModel):
    """What is known of a backend's parts beside its report.

    Attributes:
        part: which code.
        word: "run elsewhere" (on something else than the vendor's device), or "compiled".
        where: what it ran on, or was compiled for.
        command: what shows it again.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    backends: tuple[str, ...]
    part: str
    word: Literal["run elsewhere", "compiled"]
    where: str
    command: str


def load_evidence(path: Path) -> tuple[Evidence, ...]:
    """Read `evidence.yaml`, a list of `Evidence`; nothing where there is no such file.

    Raises:
        ReportError: it holds something else.
    """
    if not path.is_file():
        return ()
    try:
        return tuple(Evidence.model_validate(item) for item in yaml.safe_load(path.read_text(encoding="utf-8")) or ())
    except (ValidationError, yaml.YAMLError, TypeError) as error:
        raise ReportError(f"{path}: no list of evidence: {error}") from error


@dataclass(frozen=True)
class Row:
    """Cases that belong together: a subject, and a weight format for operators."""

    level: int
    operator: str
    format: str | None


@dataclass(frozen=True)
class Matrix:
    """All of it."""

    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    cells: Mapping[tuple[Row, str], Cell]
    evidence: tuple[Evidence, ...] = ()

    @property
    def general(self) -> list[Row]:
        """Rows that are about no weight format, by level."""
        return [row for row in self.rows if row.format is None]

    @property
    def formats(self) -> list[str]:
        """All weight formats, in order."""
        return list(dict.fromkeys(row.format for row in self.rows if row.format is not None))

    @property
    def format_operators(self) -> list[str]:
        """Operators that have cases by weight format."""
        return list(dict.fromkeys(row.operator for row in self.rows if row.format is not None))

    def of_format(self, operator: str, fmt: str, column: Column) -> Cell:
        """The cell of an operator in a weight format."""
        return self.cell(Row(OPERATOR_LEVEL, operator, fmt), column)

    def cell(self, row: Row, column: Column) -> Cell:
        """The cell, an empty one where nothing was run."""
        return self.cells.get((row, column.backend), Cell(None, {}))


def build_matrix(reports: Sequence[Report], backends: Sequence[str] = (), evidence: Sequence[Evidence] = ()) -> Matrix:
    """The matrix of these reports; `backends` without a report get a column that says so.

    Raises:
        ValueError: two reports are of one backend on one device.
    """
    names = [r.backend for r in reports]
    twice = [n for n, c in Counter((r.backend, r.device, r.mode) for r in reports).items() if c > 1]
    if twice:
        raise ValueError(f"two reports are of backend '{twice[0][0]}' on one device: keep the newer one")
    # one name a column: of several devices of a backend, with the device's
    label = {id(r): r.backend if names.count(r.backend) == 1 else f"{r.backend}, {r.device}" for r in reports}
    columns = [Column(label[id(r)], r.mode, r) for r in sorted(reports, key=lambda r: (r.backend, r.device))]
    columns += [Column(name, Mode.NEVER_RUN) for name in sorted(set(backends) - set(names))]
    grouped: dict[tuple[Row, str], list[Result]] = {}
    for report in reports:
        for result in report.results:
            row = Row(result.level, result.operator, result.format)
            grouped.setdefault((row, label[id(report)]), []).append(result)
    order = {row: i for i, row in enumerate(dict.fromkeys(row for row, _ in grouped))}
    rows = sorted(order, key=lambda row: (row.level, _first(order, row), row.format is not None, order[row]))
    cells = {key: _cell(found) for key, found in grouped.items()}
    return Matrix(tuple(columns), tuple(rows), cells, tuple(evidence))


def _first(order: Mapping[Row, int], row: Row) -> int:
    """Operators in the order in which they were first met."""
    return min(i for other, i in order.items() if (other.level, other.operator) == (row.level, row.operator))


def _cell(results: Sequence[Result]) -> Cell:
    counted = Counter(r.status for r in results)
    counts = {s: counted[s] for s in _WORST_FIRST if counted[s]}
    reasons = (r.reason if r.status is not Status.FAIL else f"{r.id}: {r.reason}" for r in results)
    return Cell(next(iter(counts)), counts, tuple(dict.fromkeys(r for r in reasons if r)))
