"""The report of a run: a JSON file with a schema, the same for two runs of one seed but for date and times."""

from __future__ import annotations

import datetime
import json
import platform
import sys
from collections import Counter
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ktcore.backend.record import BackendState
from ktcore.conformance.status import Mode, Status
from ktcore.errors import KtcoreError

if TYPE_CHECKING:
    from ktcore.conformance.target import Target

ENVIRONMENT = "$VIRTUAL_ENV"
_VOLATILE = {"date": True, "results": {"__all__": {"seconds", "timings"}}}


class ReportError(KtcoreError):
    """A report cannot be read, or is not one."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Result(_Strict):
    """How one case ended. `values` hold figures, such as the error relative to the tolerated one."""

    id: str
    level: int = Field(ge=0, le=5)
    operator: str
    format: str | None = None
    about: str
    status: Status
    reason: str = ""
    values: dict[str, str | int | float] = {}
    timings: dict[str, float] = {}
    seconds: float = 0.0


class Report(_Strict):
    """A run of the kit on one device of one backend."""

    schema_version: Literal[1] = 1
    backend: str
    distribution: str
    device: str
    mode: Mode
    seed: int
    date: str
    versions: dict[str, str]
    selection: str = ""
    results: tuple[Result, ...]

    def counts(self) -> dict[Status, int]:
        """Number of cases by status, all statuses in order."""
        found = Counter(r.status for r in self.results)
        return {s: found[s] for s in Status}

    def without_times(self) -> str:
        """JSON of all that must be equal in two runs of one seed."""
        return self.model_dump_json(exclude=_VOLATILE, indent=1)  # type: ignore[arg-type]


def make_report(target: Target, results: list[Result], seed: int, selection: str = "") -> Report:
    """Put results together with where they come from."""
    record = target.registry.known(target.name)
    here = record.state is BackendState.LOADED
    assert record.spec is not None
    own = target.expectations.versions
    return Report(
        backend=target.name,
        distribution=record.distribution,
        device=target.device.name if here else record.spec.declared[0].name,
        mode=target.expectations.mode if here else Mode.NEVER_RUN,
        seed=seed,
        date=datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        versions={**_common_versions(), **(dict(own()) if own else {})},
        selection=selection,
        results=tuple(results),
    )


def save_report(report: Report, path: Path) -> None:
    """Write it as JSON, one value a line, so that versions of it compare well.

    A reason may name a file of this Python's environment: reports are published, and say `ENVIRONMENT` for its folder.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    text = report.model_dump_json(indent=1).replace(json.dumps(sys.prefix, ensure_ascii=False)[1:-1], ENVIRONMENT)
    path.write_text(text + "\n", encoding="utf-8")


def load_report(path: Path) -> Report:
    """Read and check a report.

    Raises:
        ReportError: the file is missing or is no report of this schema; the message names the first wrong field.
    """
    try:
        return Report.model_validate_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ReportError(f"{path}: cannot be read: {error.strerror}") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise ReportError(f"{path}: no conformance report: {where}: {first['msg']}") from error


def _common_versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "system": f"{platform.system()} {platform.machine()}"}
    for name in ("ktcore", "torch", "gguf"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "unknown"
    return found
