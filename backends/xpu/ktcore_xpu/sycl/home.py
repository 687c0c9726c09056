"""Where a SYCL runtime with its just-in-time compiler lies: pip's packages or a oneAPI installation."""

from __future__ import annotations

import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from ktcore.errors import BackendError

VARIABLE = "KTCORE_SYCL_HOME"
HINT = f"pip install intel-sycl-rt of torch's own version (XPU builds of torch require it), or set {VARIABLE}"


@dataclass(frozen=True)
class SyclHome:
    """A folder with `include/sycl/sycl.hpp`, `lib/libsycl.so` and `lib/libsycl-jit.so`."""

    root: Path

    @property
    def include(self) -> Path:
        """Headers."""
        return self.root / "include"

    @property
    def lib(self) -> Path:
        """Libraries."""
        return self.root / "lib"

    @property
    def version(self) -> str:
        """The runtime's ABI: "libsycl.so.9"."""
        names = [path.name for path in self.lib.glob("libsycl.so.*")]
        return min((n for n in names if re.fullmatch(r"libsycl\.so\.\d+", n)), default="libsycl.so")

    def missing(self) -> str | None:
        """What it lacks; None when it is whole."""
        for part in ("include/sycl/sycl.hpp", "lib/libsycl.so", "lib/libsycl-jit.so"):
            if not (self.root / part).exists():
                return f"{self.root} has no {part}"
        return None


def find_home() -> SyclHome:
    """The first that is whole of: $KTCORE_SYCL_HOME (which then must be), this Python's prefix, oneAPI's compiler.

    Raises:
        BackendError: none is, or a SYCL runtime of another ABI is loaded in this process already.
    """
    asked = os.environ.get(VARIABLE)
    homes = [SyclHome(Path(asked))] if asked else [SyclHome(path) for path in _usual()]
    reasons = [home.missing() for home in homes]
    for home, reason in zip(homes, reasons, strict=True):
        if reason is None:
            _check_loaded(home)
            return home
    raise BackendError(f"no SYCL runtime with its compiler: {'; '.join(str(r) for r in reasons)}", HINT)


def _usual() -> list[Path]:
    found = [Path(sys.prefix)]
    if "CMPLR_ROOT" in os.environ:
        found.append(Path(os.environ["CMPLR_ROOT"]))
    found.append(Path(os.environ.get("ONEAPI_ROOT", "/opt/intel/oneapi")) / "compiler" / "latest")
    return found


def _check_loaded(home: SyclHome) -> None:
    """A queue of one ABI handed to another would crash without a word."""
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        return
    loaded = set(re.findall(r"/(libsycl\.so\.\d+)", maps))
    if loaded and home.version not in loaded:
        raise BackendError(
            f"{home.root} has {home.version}, this process runs {', '.join(sorted(loaded))}",
            "the SYCL runtime must be the one that torch was built with",
        )
