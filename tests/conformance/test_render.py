"""The matrix: what a cell says, columns without a report, and a page that a browser shows."""

from __future__ import annotations

import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from ktcore.conformance import Mode, Status
from ktcore.conformance.render import build_matrix, load_evidence, render_html, render_markdown
from ktcore.conformance.report import ReportError

from .test_report import report, result

ROOT = Path(__file__).parents[2]
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
ALPHA = report(
    result("a", Status.PASS),
    result("b", Status.PASS_FALLBACK, reason="the reference did it"),
    result("c", Status.PASS, fmt="Q4_K"),
    result("d", Status.FAIL, fmt="Q4_K", reason="off by <one>"),
    result("e", Status.NOT_APPLICABLE, fmt="IQ1_S", reason="no kernel"),
    result("f", Status.XFAIL, operator="moe", reason="ticket 7: later"),
)
BETA = report(result("a", Status.PASS), backend="beta", mode=Mode.SIMULATED)


def test_a_cell_sums_up_its_cases_worst_first() -> None:
    matrix = build_matrix([ALPHA, BETA], ["alpha", "gamma"])
    assert [(c.backend, c.mode) for c in matrix.columns] == [
        ("alpha", Mode.HARDWARE),
        ("beta", Mode.SIMULATED),
        ("gamma", Mode.NEVER_RUN),
    ]
    rows = {(r.operator, r.format): r for r in matrix.rows}
    alpha, beta, gamma = matrix.columns
    assert list(rows) == [("linear", None), ("linear", "Q4_K"), ("linear", "IQ1_S"), ("moe", None)]
    cell = matrix.cell(rows["linear", "Q4_K"], alpha)
    assert (cell.status, cell.text, cell.notes) == (Status.FAIL, "1 FAIL, 1 PASS", ("d: off by <one>",))
    assert matrix.cell(rows["linear", None], alpha).status is Status.PASS
    assert matrix.cell(rows["linear", "Q4_K"], beta).status is None
    assert matrix.cell(rows["linear", None], gamma).text == "never run"


def test_two_reports_of_one_backend_are_refused() -> None:
    with pytest.raises(ValueError, match="two reports are of backend 'alpha'"):
        build_matrix([ALPHA, ALPHA])


def test_reports_of_two_devices_of_one_backend_stand_side_by_side() -> None:
    other = ALPHA.model_copy(update={"device": "another", "results": ALPHA.results[:1]})
    matrix = build_matrix([ALPHA, other], ["alpha"])
    assert {c.backend for c in matrix.columns} == {f"alpha, {ALPHA.device}", "alpha, another"}
    shown = [row for row in matrix.rows if matrix.cell(row, matrix.columns[-1]).status is None]
    assert shown
    assert "alpha, another" in render_html(matrix)


def test_evidence_beside_the_reports_is_shown_and_checked(tmp_path: Path) -> None:
    path = tmp_path / "evidence.yaml"
    assert load_evidence(path) == ()
    path.write_text("- {backends: [alpha], part: kernels, word: compiled, where: chip 9, command: make it}\n")
    matrix = build_matrix([ALPHA], [], load_evidence(path))
    assert "| alpha | kernels | **compiled** | chip 9 | `make it` |" in render_markdown(matrix)
    assert "chip 9" in render_html(matrix)
    path.write_text("- {backends: [alpha], part: kernels, word: believed, where: chip 9, command: make it}\n")
    with pytest.raises(ReportError, match="no list of evidence"):
        load_evidence(path)


def test_markdown_holds_every_cell_and_how_each_backend_was_run() -> None:
    text = render_markdown(build_matrix([ALPHA, BETA], ["gamma"]))
    assert (
        "### Weight formats on alpha (run on hardware)\n\n| | linear |\n|---|---|\n| Q4_K | ✗ |\n| IQ1_S | · |" in text
    )
    assert "### Weight formats on beta (simulated)\n\n| | linear |\n|---|---|\n| Q4_K |  |\n| IQ1_S |  |" in text
    assert "formats on gamma" not in text
    assert "| linear | ✓ 1 ↩ 1 | ✓ 1 |  |" in text
    assert "| alpha | **run on hardware** | Alpha X | alpha 1 | driver 1.2 | 0 | 2026-01-01 |" in text
    assert "| gamma | **never run** |" in text


class _Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.cells: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag not in ("meta", "br", "link"):
            self.open.append(tag)
        if tag == "td" and "cell" in (values.get("class") or ""):
            self.cells.append(values["class"] or "")
        self.links += [v for k, v in attrs if k in ("src", "href") and v]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_html_is_well_formed_self_contained_and_escaped() -> None:
    text = render_html(build_matrix([ALPHA, BETA], ["gamma"]))
    tags = _Tags()
    tags.feed(text)
    assert tags.open == []
    assert tags.links == []
    assert "<script" not in text
    assert "off by &lt;one&gt;" in text
    # two operators on three backends, one by two formats on the two that have a report
    assert len(tags.cells) == 2 * 3 + 2 * 2
    assert tags.cells.count("cell fail") == 1
    assert tags.cells.count("cell never") == 1 + 2 + 2


def test_the_committed_matrix_is_made_of_the_committed_reports() -> None:
    from ktcore.conformance.report import load_report

    folder = ROOT / "docs" / "conformance"
    reports = [load_report(path) for path in sorted(folder.glob("*.json"))]
    # not what backends share
    backends = sorted(p.parts[-3] for p in (ROOT / "backends").glob("*/*/plugin.py"))
    matrix = build_matrix(reports, backends, load_evidence(folder / "evidence.yaml"))
    assert (folder / "matrix.md").read_text(encoding="utf-8") == render_markdown(matrix)
    assert (folder / "matrix.html").read_text(encoding="utf-8") == render_html(matrix)


def test_a_browser_shows_the_matrix_in_colour(tmp_path: Path) -> None:
    browser = next((b for b in BROWSERS if shutil.which(b)), None)
    if browser is None:
        pytest.skip("no Chromium is installed (package chromium)")
    page, picture = tmp_path / "matrix.html", tmp_path / "matrix.png"
    page.write_text(render_html(build_matrix([ALPHA, BETA], ["gamma"])), encoding="utf-8")
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1200,900", "--hide-scrollbars"]
    subprocess.run([*command, f"--screenshot={picture}", page.as_uri()], check=True, capture_output=True, timeout=120)
    pil = pytest.importorskip("PIL.Image")
    with pil.open(picture) as image:
        pixels = image.convert("RGB")
        assert pixels.size == (1200, 900)
        colours = {colour for _, colour in pixels.getcolors(maxcolors=1 << 20)}
    # the failing and the passing cell of the light theme
    assert {(0xF9, 0xC9, 0xC5), (0xCD, 0xEE, 0xD6)} <= colours
