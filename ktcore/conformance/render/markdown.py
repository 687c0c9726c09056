"""The matrix as Markdown, for people who read the repository."""

from __future__ import annotations

from itertools import groupby

from ktcore.conformance.render.matrix import LEVEL_NAMES, OPERATOR_LEVEL, Cell, Column, Matrix
from ktcore.conformance.status import Mode, Status

SIGNS = {
    Status.PASS: "✓",
    Status.FAIL: "✗",
    Status.NOT_APPLICABLE: "·",
    Status.PASS_FALLBACK: "↩",
    Status.UNSUPPORTED: "⊘",
    Status.XFAIL: "⚠",
}
MEANINGS = {
    Status.PASS: "passed by the backend's own code",
    Status.PASS_FALLBACK: "right, but answered by the reference, in whole or in part",
    Status.NOT_APPLICABLE: "not declared",
    Status.UNSUPPORTED: "will not be supported",
    Status.XFAIL: "known to fail, tracked",
    Status.FAIL: "declared and wrong",
}


def render_markdown(matrix: Matrix) -> str:
    """The whole page."""
    lines = ["# Conformance matrix", "", "Made by `ktcore conformance render` from the reports beside this file.", ""]
    lines += [f"- {SIGNS[s]} {text}" for s, text in MEANINGS.items()]
    lines += ["- empty: never run", "", *_devices(matrix), "", *_evidence(matrix)]
    for level, rows in groupby(matrix.general, key=lambda r: r.level):
        lines += [f"## Level {level}: {LEVEL_NAMES[level]}", ""]
        lines += ["| | " + " | ".join(_head(c) for c in matrix.columns) + " |"]
        lines += ["|---|" + "---|" * len(matrix.columns)]
        for row in rows:
            cells = " | ".join(_text(matrix.cell(row, column)) for column in matrix.columns)
            lines.append(f"| {row.operator} | {cells} |")
        lines.append("")
        if level == OPERATOR_LEVEL:
            for column in matrix.columns:
                lines += _formats(matrix, column)
    return "\n".join(lines)


def _formats(matrix: Matrix, column: Column) -> list[str]:
    if column.report is None:
        return []
    lines = [f"### Weight formats on {column.backend} ({column.mode.value})", ""]
    lines += ["| | " + " | ".join(matrix.format_operators) + " |", "|---|" + "---|" * len(matrix.format_operators)]
    for fmt in matrix.formats:
        found = (matrix.of_format(operator, fmt, column).status for operator in matrix.format_operators)
        lines.append(f"| {fmt} | " + " | ".join(SIGNS[s] if s else "" for s in found) + " |")
    return [*lines, ""]


def _devices(matrix: Matrix) -> list[str]:
    lines = ["| backend | how | device | package | versions | seed | date |", "|---|---|---|---|---|---|---|"]
    for column in matrix.columns:
        report = column.report
        if report is None:
            lines.append(f"| {column.backend} | **{Mode.NEVER_RUN.value}** | | | | | |")
            continue
        versions = ", ".join(f"{k} {v}" for k, v in report.versions.items())
        lines.append(
            f"| {column.backend} | **{column.mode.value}** | {report.device} | {report.distribution} | {versions} "
            f"| {report.seed} | {report.date} |"
        )
    return lines


def _evidence(matrix: Matrix) -> list[str]:
    if not matrix.evidence:
        return []
    lines = ["## Beside the reports", "", "| backend | part | how | on or for | shown by |", "|---|---|---|---|---|"]
    for e in matrix.evidence:
        lines.append(f"| {', '.join(e.backends)} | {e.part} | **{e.word}** | {e.where} | `{e.command}` |")
    return [*lines, ""]


def _head(column: Column) -> str:
    return f"{column.backend}<br>*{column.mode.value}*"


def _text(cell: Cell) -> str:
    if cell.status is None:
        return ""
    return " ".join(f"{SIGNS[s]} {n}" for s, n in cell.counts.items())
