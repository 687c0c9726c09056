"""What `doctor` reports: this machine, the installed packages, and the backends, as JSON types."""

from __future__ import annotations

import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ktcore import __version__
from ktcore.errors import KtcoreError

if TYPE_CHECKING:
    from ktcore.backend.registry import BackendRecord, Registry

CPU_TORCH = "pip install torch --index-url https://download.pytorch.org/whl/cpu"
PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "gguf", "numpy")


def examine() -> dict[str, Any]:
    """The whole report.

    Raises:
        BackendError: the environment asks for a plugin that is not installed.
    """
    from ktcore.backend.registry import Registry

    registry = Registry.discover()
    return {
        "ktcore": __version__,
        "python": platform.python_version(),
        "executable": sys.executable,
        "packages": {name: _version(name) for name in PACKAGES},
        "torch": torch_build(),
        "machine": _machine(),
        "rule_folders": _rule_folders(registry),
        "backends": [_backend(record) for record in registry.records()],
        "host": _host(registry),
        "auto": _auto(registry),
    }


def torch_build() -> dict[str, Any]:
    """The kind of accelerator that torch is built for, None for CPUs alone; whether one is usable; advice where not."""
    import torch

    built = torch.accelerator.current_accelerator()
    kind = None if built is None else built.type
    usable = kind is not None and torch.accelerator.is_available()
    advice = None
    if kind is not None and not usable:
        advice = f"no such device is usable here; a new environment saves gigabytes by `{CPU_TORCH}` before ktcore"
    return {"built_for": kind, "usable": usable, "advice": advice}


def _machine() -> dict[str, Any]:
    import psutil

    from ktcore.placement.topology import read_topology

    found = read_topology()
    return {
        "os": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": _cpu_name(),
        "logical_cpus": len(found.cpus),
        "physical_cores": found.cores,
        "core_capacities": sorted((round(c, 2) for c in found.capacities.values()), reverse=True),
        "cpu_quota": found.cpu_quota,
        "numa_nodes": [{"id": n.id, "cpus": list(n.cpus), "memory_bytes": n.memory_bytes} for n in found.nodes],
        "memory_bytes": found.memory_bytes,
        "memory_available_bytes": psutil.virtual_memory().available,
        "memory_limit_bytes": found.memory_limit,
    }


def _backend(record: BackendRecord) -> dict[str, Any]:
    verdict = record.verdict
    spec = record.spec
    return {
        "name": record.name,
        "state": verdict.state.value,
        "reason": verdict.reason,
        "distribution": record.distribution,
        "accelerator": record.accelerator,
        "devices": verdict.devices,
        "requirements": spec.requirements if spec else None,
        "declared": [caps.name for caps in spec.declared] if spec else [],
        "traceback": verdict.traceback,
    }


def _host(registry: Registry) -> dict[str, Any]:
    """What the host backend says of this CPU: its features and properties, or why it says nothing."""
    try:
        name = registry.host().name
        runtime = registry.runtime(name)
    except KtcoreError as error:
        return {"backend": None, "reason": error.message}
    try:
        caps = runtime.capabilities()
        return {"backend": name, "features": sorted(caps.features), "properties": dict(caps.properties)}
    finally:
        runtime.close()


def _auto(registry: Registry) -> dict[str, Any]:
    try:
        name, reason = registry.choose("auto")
        return {"backend": name, "reason": reason}
    except KtcoreError as error:
        return {"backend": None, "reason": error.message}


def _rule_folders(registry: Registry) -> list[str]:
    from ktcore.rules.load import rule_folders

    return [str(folder) for folder in rule_folders(registry)]


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or "unknown")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
