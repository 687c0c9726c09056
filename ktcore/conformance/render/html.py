"""The matrix as one HTML file: no script, nothing fetched, light and dark."""

from __future__ import annotations

from pathlib import Path

import jinja2

from ktcore.conformance.render.markdown import MEANINGS, SIGNS
from ktcore.conformance.render.matrix import LEVEL_NAMES, OPERATOR_LEVEL, Cell, Matrix
from ktcore.conformance.status import Status

CLASSES = {
    Status.PASS: "pass",
    Status.FAIL: "fail",
    Status.NOT_APPLICABLE: "na",
    Status.PASS_FALLBACK: "fallback",
    Status.UNSUPPORTED: "unsupported",
    Status.XFAIL: "xfail",
}
NOTES_SHOWN = 4


def render_html(matrix: Matrix) -> str:
    """The whole page."""
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string((Path(__file__).parent / "matrix.html.j2").read_text(encoding="utf-8"))
    return template.render(
        matrix=matrix,
        levels=LEVEL_NAMES,
        operator_level=OPERATOR_LEVEL,
        legend=[(CLASSES[s], SIGNS[s], text) for s, text in MEANINGS.items()],
        style=_style,
        sign=lambda cell: SIGNS[cell.status] if cell.status else "",
        share=_share,
        hint=_hint,
    )


def _style(cell: Cell) -> str:
    return CLASSES[cell.status] if cell.status else "never"


def _share(cell: Cell) -> str:
    """ "7/9": passed of those that apply; nothing where none applies."""
    applies = sum(n for s, n in cell.counts.items() if s not in (Status.NOT_APPLICABLE, Status.UNSUPPORTED))
    good = cell.counts.get(Status.PASS, 0) + cell.counts.get(Status.PASS_FALLBACK, 0)
    return f"{good}/{applies}" if applies else ""


def _hint(cell: Cell) -> str:
    more = len(cell.notes) - NOTES_SHOWN
    notes = [*cell.notes[:NOTES_SHOWN], *([f"… and {more} more"] if more > 0 else [])]
    return "\n".join([cell.text, *notes])
