"""How panels are best read, few tokens at once and from how far ahead: measured once a machine, kept in its cache."""

from __future__ import annotations

import json
import logging
import os
import platform
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from ktcore_cpu import _native

log = logging.getLogger(__name__)


def switch_file() -> Path:
    """Where the figures are kept, by machine; deleting it has them measured again."""
    # not the engine's own function: expert layers stand alone
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ktcore" / "cpu-switch.json"


class Reading(NamedTuple):
    """How one format's panels are read.

    Attributes:
        few: up to so many tokens are multiplied straight from the panel (`Pool.few`).
        ahead: bytes ahead of which lines are asked for (`Pool.ahead`).
    """

    few: int
    ahead: int


class Switch:
    """The figures of a pool, each format's set when it is first used.

    Args:
        pool: whose products are meant.
        path: in place of `switch_file()`.
    """

    def __init__(self, pool: _native.Pool, path: Path | None = None) -> None:
        self._pool, self._path = pool, path
        self._set: set[str] = set()

    def use(self, *formats: str) -> None:
        """Set the figures of these weight formats, measuring those that no earlier process has kept."""
        wanted = set(formats) - self._set
        if not wanted:
            return
        self._set |= wanted
        path = self._path or switch_file()
        kept = _read(path).get(_machine(), {})
        new = {f: self._measured(f) for f in sorted(wanted - kept.keys())}
        for name in wanted:
            self._set_to(name, (kept | new)[name])
        if new:
            log.info("measured on this machine: %s", new)
            _keep(path, kept | new)

    def _measured(self, format: str) -> Reading:
        ahead = self._pool.measure_ahead(format)
        self._pool.set_ahead(format, ahead)  # the other figure depends on it
        return Reading(self._pool.measure_few(format), ahead)

    def _set_to(self, format: str, how: Reading) -> None:
        self._pool.set_few(format, how.few)
        self._pool.set_ahead(format, how.ahead)


def _machine() -> str:
    """What the figures depend on: the processor, the instruction set in use, and these kernels."""
    from ktcore_cpu import _native

    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    model = next(named, "") or platform.processor() or platform.machine()
    return f"{model}; {_native.isa_selected()}; ktcore-cpu {version('ktcore')}"


def _read(path: Path) -> dict[str, dict[str, Reading]]:
    """All machines' figures; none where there is no file, or one that is not ours."""
    try:
        machines = json.loads(path.read_text())
        return {
            machine: {f: Reading(*how) for f, how in figures.items() if _possible(how)}
            for machine, figures in machines.items()
        }
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, AttributeError) as error:
        log.info("%s is not readable (%s): measuring again", path, error)
        return {}


def _possible(how: object) -> bool:
    from ktcore_cpu import _native

    if not (isinstance(how, list) and len(how) == 2 and all(isinstance(n, int) for n in how)):
        return False
    few, ahead = map(int, how)
    return 0 <= few <= _native.MOST_FEW and 0 <= ahead <= _native.MOST_AHEAD and ahead % 64 == 0


def _keep(path: Path, figures: dict[str, Reading]) -> None:
    """Write the file anew beside the old one, then put it in its place; a folder that takes no file is no error."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=path.name, delete=False) as out:
            json.dump(_read(path) | {_machine(): figures}, out, indent=1)
        os.replace(out.name, path)
    except OSError as error:
        log.info("%s cannot be written (%s): the next process measures again", path, error)
