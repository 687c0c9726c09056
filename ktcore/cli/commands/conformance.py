"""`ktcore conformance run | render | compare`: the kit for vendors, its matrix, what changed between two reports."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ktcore.cli.groups import grouped
from ktcore.cli.words import KnowingCommand
from ktcore.errors import KtcoreError

app = typer.Typer(help="Test a backend, draw the matrix, compare reports.", no_args_is_help=True)


@app.command(cls=KnowingCommand)
@grouped
def run(
    backend: Annotated[str, typer.Option(help="the backend to test: a name, or name:index")] = "",
    level: Annotated[int | None, typer.Option(min=0, max=5, help="levels up to this one")] = None,
    seed: Annotated[int, typer.Option(help="seed of all inputs")] = 0,
    report: Annotated[Path | None, typer.Option(help="write the report to this file")] = None,
    case: Annotated[list[str] | None, typer.Option(help="only this case; may be repeated, may hold *")] = None,
    list_cases: Annotated[bool, typer.Option("--list", help="print the cases and run nothing")] = False,
) -> None:
    """Run the kit; the exit status is pytest's, 0 when nothing failed."""
    if list_cases:
        _list(level, case)
        return
    if not backend:
        raise typer.BadParameter("name the backend to test", param_hint="--backend")
    try:
        import pytest
    except ModuleNotFoundError as missing:
        raise KtcoreError(
            "the conformance kit runs by pytest, which is not installed", "pip install pytest"
        ) from missing

    arguments = ["-p", "ktcore.conformance.plugin", "--pyargs", "ktcore.conformance", "--tb=short", "-q"]
    # settings of whatever project the shell stands in are not the kit's
    arguments += ["-c", str(_settings()), "--backend", backend, "--seed", str(seed)]
    arguments += ["--level", str(level)] if level is not None else []
    arguments += ["--report", str(report)] if report else []
    for pattern in case or []:
        arguments += ["--case", pattern]
    raise typer.Exit(int(pytest.main(arguments)))


@app.command(cls=KnowingCommand)
@grouped
def render(
    folder: Annotated[Path, typer.Argument(help="folder with reports (*.json)")] = Path("docs/conformance"),
    never_run: Annotated[
        list[str] | None, typer.Option(help="a backend without a report; default: the installed")
    ] = None,
) -> None:
    """Write matrix.md and matrix.html beside the reports."""
    from ktcore.backend.registry import Registry
    from ktcore.cli.terminal import console
    from ktcore.conformance.render import build_matrix, load_evidence, render_html, render_markdown
    from ktcore.conformance.report import ReportError, load_report

    paths = sorted(folder.glob("*.json"))
    if not paths:
        raise ReportError(f"{folder}: holds no report", "make one with: ktcore conformance run --report FILE")
    names = never_run if never_run is not None else [r.name for r in Registry.discover().records()]
    matrix = build_matrix([load_report(p) for p in paths], names, load_evidence(folder / "evidence.yaml"))
    for name, text in (("matrix.md", render_markdown(matrix)), ("matrix.html", render_html(matrix))):
        (folder / name).write_text(text, encoding="utf-8")
        console().print(f"wrote {folder / name}", markup=False, soft_wrap=True)


@app.command(cls=KnowingCommand)
@grouped
def compare(old: Path, new: Path) -> None:
    """Print what changed from OLD to NEW; exit status 1 when something got worse."""
    from rich.markup import escape

    from ktcore.cli.terminal import console
    from ktcore.conformance.compare import compare_reports
    from ktcore.conformance.report import load_report

    out = console()
    changes = compare_reports(load_report(old), load_report(new))
    for change in changes:
        mark = "[red]worse[/]" if change.regression else "     "
        out.print(f"{mark}  {escape(change.describe())}", soft_wrap=True)
    worse = sum(change.regression for change in changes)
    out.print(f"{len(changes)} changed, {worse} of them for the worse" if changes else "nothing changed")
    raise typer.Exit(1 if worse else 0)


def _list(level: int | None, patterns: list[str] | None) -> None:
    from rich.markup import escape

    from ktcore.cli.terminal import console
    from ktcore.conformance.levels import all_cases, select

    out = console()
    for item in select(all_cases(), level, patterns):
        out.print(f"{item.id}  [dim]{escape(item.about)}[/]", soft_wrap=True)


def _settings() -> Path:
    import ktcore.conformance

    return Path(ktcore.conformance.__file__).parent / "pytest.ini"
