"""The packed-weight cache: what a plan packs is left on disk, and mapped from there the next time."""

from __future__ import annotations

import logging
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ktcore.engine.load.convert import PARTIAL, manifest, plan_digest, publish
from ktcore.engine.load.loader import Progress, load_modules
from ktcore.engine.step.runner import LoadedModel
from ktcore.errors import CheckpointError
from ktcore.rules.prepare import Prepared
from ktcore.weights.packed.container import PARTS, VERSION, canonical, digest, read_manifest, write_error
from ktcore.weights.packed.fingerprint import files_fingerprint, model_fingerprint
from ktcore.weights.packed.lock import write_lock
from ktcore.weights.packed.reader import PackedMismatch, PartReader, verify
from ktcore.weights.packed.writer import PartWriter

LOG = logging.getLogger("ktcore")


def load_cached(
    prepared: Prepared, directory: Path, threads: int | None = None, progress: Progress | None = None
) -> LoadedModel:
    """Load a plan's modules with their packed weights in an entry of the cache, which is made when it is not there.

    An entry belongs to one model and plan, its name holds a hash of both. One that is damaged, or whose model's files
    have changed since, is made again, and a warning is logged. Processes that want the same entry wait for each other.

    Raises:
        CheckpointError: the cache cannot be written; what else `load_modules` raises.
    """
    return _Entry(prepared, directory, threads, progress).load()


@dataclass
class _Entry:
    prepared: Prepared
    directory: Path
    threads: int | None
    progress: Progress | None

    def __post_init__(self) -> None:
        checkpoint, plan = self.prepared.checkpoint, self.prepared.plan
        self.identity = {
            "model": model_fingerprint(checkpoint),
            "files of the model": files_fingerprint(checkpoint),
            "plan": plan_digest(plan),
            "version": str(VERSION),
        }
        key = digest(canonical([self.identity["model"], self.identity["plan"]]))[:16]
        name = re.sub(r"[^\w.-]+", "-", checkpoint.path.resolve().stem)[:64]
        self.folder = self.directory / f"{name}-{key}"
        self.partial = self.directory / f"{self.folder.name}{PARTIAL}"

    def load(self) -> LoadedModel:
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise write_error(self.directory, error) from error
        found = self._read()
        if found is not None:
            return found
        waited = f"packed cache: another process is writing {self.folder}; waiting for it"
        with write_lock(self.directory / f"{self.folder.name}.lock", lambda: LOG.warning(waited)):
            # it may have been finished in the meantime
            return self._read(replace=True) or self._write()

    def _read(self, replace: bool = False) -> LoadedModel | None:
        """The modules out of a good entry; of a bad one nothing, which `replace` also removes."""
        if not self.folder.exists():
            return None
        try:
            reader = PartReader(self.folder, self._checked())
            try:
                return self._modules(reader)
            finally:
                reader.close()
        except (PackedMismatch, OSError) as error:
            reason = error.message if isinstance(error, CheckpointError) else str(error)
        if replace:
            LOG.warning("packed cache: %s; made again", reason)
            shutil.rmtree(self.folder)
        return None

    def _checked(self) -> dict[str, Any]:
        try:
            body = read_manifest(self.folder)
        except CheckpointError as error:
            raise PackedMismatch(error.message) from error
        differs = sorted(key for key, value in self.identity.items() if body["identity"].get(key) != value)
        if differs:
            raise PackedMismatch(f"{self.folder}: stale, differs in: {', '.join(differs)}")
        touched = (self.folder / PARTS).stat().st_mtime_ns != body["changed"]  # a copy, or damage
        if touched and (damaged := verify(self.folder, body)):
            raise PackedMismatch(f"{self.folder}: damaged: {damaged[0]}")
        return body

    def _write(self) -> LoadedModel:
        try:
            writer = PartWriter(self.partial, self.identity)
        except PackedMismatch as error:
            LOG.warning("packed cache: %s; begun again", error.message)
            shutil.rmtree(self.partial)
            writer = PartWriter(self.partial, self.identity)
        try:
            modules = self._modules(writer)
            try:
                writer.flush()
                body = manifest(self.partial, writer, self.prepared.plan, self.identity)
                body["changed"] = (self.partial / PARTS).stat().st_mtime_ns
                publish(self.partial, self.folder, body)
            except BaseException:
                modules.close()
                raise
            return modules
        finally:
            writer.close()

    def _modules(self, parts: PartReader | PartWriter) -> LoadedModel:
        p = self.prepared
        return load_modules(p.plan, p.checkpoint, p.registry, self.threads, self.progress, packed=parts)
