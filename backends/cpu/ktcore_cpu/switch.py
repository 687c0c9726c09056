"""Where products of few tokens end and those of many begin: measured once a machine, kept in the user's cache."""

from __future__ import annotations

import json
import logging
import os
import platform
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ktcore_cpu import _native

log = logging.getLogger(__name__)


def switch_file() -> Path:
    """Where the figures are kept, by machine; deleting it has them measured again."""
    # not the engine's own function: expert layers stand alone
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ktcore" / "cpu-switch.json"


class Switch:
    """The switch points of a pool, each set when its format is first used.

    Args:
        pool: whose products are meant.
        path: in place of `switch_file()`.
    """

    def __init__(self, pool: _native.Pool, path: Path | None = None) -> None:
        self._pool, self._path = pool, path
        self._set: set[str] = set()

    def use(self, *formats: str) -> None:
        """Set the switch points of these weight formats, measuring those that no earlier process has kept."""
        wanted = set(formats) - self._set
        if not wanted:
            return
        self._set |= wanted
        path = self._path or switch_file()
        kept = _read(path).get(_machine(), {})
        new = {f: self._pool.measure_few(f) for f in sorted(wanted - kept.keys())}
        for name in wanted:
            self._pool.set_few(name, (kept | new)[name])
        if new:
            log.info("measured on this machine: products of few tokens are those of up to %s", new)
            _keep(path, kept | new)


def _machine() -> str:
    """What the figures depend on: the processor, the instruction set in use, and these kernels."""
    from ktcore_cpu import _native

    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    model = next(named, "") or platform.processor() or platform.machine()
    return f"{model}; {_native.isa_selected()}; ktcore-cpu {version('ktcore')}"


def _read(path: Path) -> dict[str, dict[str, int]]:
    """All machines' figures; none where there is no file, or one that is not ours."""
    from ktcore_cpu import _native

    try:
        machines = json.loads(path.read_text())
        return {
            machine: {f: n for f, n in figures.items() if isinstance(n, int) and 0 <= n <= _native.MOST_FEW}
            for machine, figures in machines.items()
        }
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, AttributeError) as error:
        log.info("%s is not readable (%s): measuring again", path, error)
        return {}


def _keep(path: Path, figures: dict[str, int]) -> None:
    """Write the file anew beside the old one, then put it in its place; a folder that takes no file is no error."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=path.name, delete=False) as out:
            json.dump(_read(path) | {_machine(): figures}, out, indent=1)
        os.replace(out.name, path)
    except OSError as error:
        log.info("%s cannot be written (%s): the next process measures again", path, error)
