"""`ktcore convert`: a model with its weights quantised and packed once, in a folder that runs by itself."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ktcore.engine.load.loader import Progress, load_modules
from ktcore.errors import CheckpointError
from ktcore.ops.moe import ExpertsSpec
from ktcore.placement.memory import human_bytes
from ktcore.rules.plan import Plan
from ktcore.rules.prepare import Prepared, prepare
from ktcore.rules.quantize import quantized_formats
from ktcore.weights.checkpoint import Checkpoint
from ktcore.weights.packed.container import PARTS, TENSORS, canonical, digest, write_error, write_manifest
from ktcore.weights.packed.export import ReadLog, describe_source, keep_tensors
from ktcore.weights.packed.fingerprint import files_fingerprint, model_fingerprint
from ktcore.weights.packed.lock import write_lock
from ktcore.weights.packed.parts import Bytes, Fill, PackedParts, Part
from ktcore.weights.packed.writer import JOURNAL, PartWriter

PARTIAL = ".partial"
LOCK = "lock"
SPARE = 1.02
"""More room than planned that a disk must have: paddings, metadata."""


@dataclass(frozen=True)
class Converted:
    """What a conversion wrote, or would write.

    Attributes:
        source_bytes: tensor data of the source.
        packed_bytes, kept_bytes: of the packed parts, and of tensors that are kept as they are.
        resumed_bytes: of the packed parts, what an earlier run had done.
        errors: operator -> relative error of what was quantised.
    """

    folder: Path
    plan: Plan
    source_bytes: int
    packed_bytes: int
    kept_bytes: int = 0
    resumed_bytes: int = 0
    errors: Mapping[str, float] | None = None


def convert(
    source: Path,
    folder: Path,
    *,
    experts: str | None = None,
    rules: str | Path | None = None,
    backend: str = "auto",
    experts_from: Path | None = None,
    packing: str | None = None,
    threads: int | None = None,
    keep_dense: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> Converted:
    """Write `source` to `folder` as the plan for this machine's backend packs it.

    The folder appears under its name when it is complete. An interrupted run is gone on with by the same call.

    Args:
        experts: format that float routed experts are quantised to, "int4_g128" say; None leaves it to the rules.
        packing: "compact" or "fast" wherever the rules have no such option.
        keep_dense: also keep the tensors beside the routed experts as they are, so that an accelerator can load them.
        dry_run: plan only; the sizes are the plan's.

    Raises:
        CheckpointError: `folder` exists, cannot be written, or is too small a disk's; what else `ktcore.load` raises.
    """
    if folder.exists():
        raise CheckpointError(f"{folder}: exists already", "give another name, or delete it first")
    prepared = prepare(
        source, backend=backend, rules=rules, experts_from=experts_from, quantize_experts=experts, packing=packing
    )
    with prepared.checkpoint as checkpoint:
        if prepared.packed is not None:
            raise CheckpointError(f"{source}: is a converted model already", "give the model that it was made from")
        _check_experts(prepared.plan, source, experts)
        planned = sum(choice.packed_bytes for choice in prepared.plan.choices.values())
        if dry_run:
            return Converted(folder, prepared.plan, checkpoint.nbytes, planned)
        return _write(prepared, folder, planned, threads, keep_dense, progress)


def plan_digest(plan: Plan) -> str:
    """What of a plan decides how weights are packed: implementations, devices, options, quantised formats."""
    nodes = {
        name: [c.implementation.id, c.device, c.options, c.resident.experts if c.resident else ()]
        for name, c in plan.choices.items()
    }
    return digest(canonical([nodes, quantized_formats(plan.graph)]))


def _write(
    prepared: Prepared, folder: Path, planned: int, threads: int | None, keep_dense: bool, progress: Progress | None
) -> Converted:
    checkpoint, plan = prepared.checkpoint, prepared.plan
    partial = folder.with_name(folder.name + PARTIAL)
    try:
        partial.mkdir(parents=True, exist_ok=True)
        free, done = shutil.disk_usage(partial).free, _present(partial)
    except OSError as error:
        raise write_error(partial, error) from error
    if planned * SPARE > free + done:
        raise CheckpointError(
            f"{folder}: needs about {human_bytes(planned)}, the disk has {human_bytes(free + done)} free",
            "free some room or give another place",
        )
    identity = {
        "model": model_fingerprint(checkpoint),
        "files of the model": files_fingerprint(checkpoint),
        "plan": plan_digest(plan),
    }
    with write_lock(partial / LOCK):
        if folder.exists():
            raise CheckpointError(f"{folder}: exists already", "another process has finished it")
        writer = PartWriter(partial, identity)
        try:
            log = ReadLog(checkpoint)
            loaded = load_modules(plan, log, prepared.registry, threads, progress, packed=_Unwatched(writer, log))
            errors = {op: loss.relative for op, loss in loaded.losses.items()}
            loaded.close()
            del loaded
            writer.flush()
            names = {**log.read, **dict.fromkeys(plan.graph.read), **(_dense(plan, checkpoint) if keep_dense else {})}
            kept = keep_tensors(partial, checkpoint, names)
            body = manifest(partial, writer, plan, identity)
            body.update(describe_source(partial, checkpoint), kept=kept)
            body["files"][TENSORS] = (partial / TENSORS).stat().st_size
        finally:
            writer.close()
        publish(partial, folder, body)
    kept_bytes = sum(entry["nbytes"] for entry in kept.values())
    return Converted(folder, plan, checkpoint.nbytes, writer.nbytes, kept_bytes, writer.resumed, errors)


def manifest(folder: Path, writer: PartWriter, plan: Plan, identity: Mapping[str, str]) -> dict[str, Any]:
    """What is known of the packed parts when all are written."""
    return {
        "identity": dict(identity),
        "parts": writer.parts,
        "quantized": quantized_formats(plan.graph),
        "files": {PARTS: (folder / PARTS).stat().st_size},
        "kept": {},
    }


def publish(partial: Path, folder: Path, body: Mapping[str, Any]) -> None:
    """Give a finished folder its name, at once and for good.

    Raises:
        CheckpointError: it cannot be written or renamed.
    """
    try:
        write_manifest(partial, body)
        for name in (JOURNAL, LOCK):
            (partial / name).unlink(missing_ok=True)
        os.rename(partial, folder)
        if hasattr(os, "O_DIRECTORY"):
            parent = os.open(folder.parent, os.O_RDONLY | os.O_DIRECTORY)
            os.fsync(parent)
            os.close(parent)
    except OSError as error:
        raise write_error(folder, error) from error


class _Unwatched(PackedParts):
    """Reads that pack a part are not noted: the part takes the tensor's place."""

    def __init__(self, parts: PackedParts, log: ReadLog) -> None:
        self._parts, self._log = parts, log

    def get(self, part: Part, fill: Fill) -> Bytes | None:
        self._log.watching = False
        try:
            return self._parts.get(part, fill)
        finally:
            self._log.watching = True


def _check_experts(plan: Plan, source: Path, experts: str | None) -> None:
    if experts is None:
        return
    nodes = [node for node in plan.graph.walk() if isinstance(node.spec, ExpertsSpec)]
    if not nodes:
        raise CheckpointError(f"{source}: has no routed experts to quantise", "leave --experts out")
    if not any(ref.stored for node in nodes for ref in node.weights.values()):
        formats = ", ".join(sorted({f for node in nodes for f in node.spec.formats()}))
        raise CheckpointError(
            f"{source}: its experts are {formats} already, and are not quantised again",
            "leave --experts out to pack them as they are, or give a model in BF16, F16, F32 or FP8",
        )


def _dense(plan: Plan, checkpoint: Checkpoint) -> dict[str, None]:
    """Names of all tensors that routed experts have no part in."""
    nodes = [node for node in plan.graph.walk() if isinstance(node.spec, ExpertsSpec)]
    taken = {name for node in nodes for ref in node.weights.values() for name in ref.sources}
    return {name: None for name in checkpoint.tensors if name not in taken}


def _present(partial: Path) -> int:
    return sum(path.stat().st_size for path in partial.iterdir() if path.is_file())
