"""`ktcore doctor`: what this machine offers, and what every backend says of itself."""

from __future__ import annotations

import platform
from importlib import metadata
from typing import Annotated, Any

import typer

from ktcore.cli import console, options


def doctor(
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show tracebacks of broken backends.")] = False,
    as_json: options.Json = False,
) -> None:
    """Examine the machine and every backend found: versions, CPU, memory, states and reasons.

    Example: `ktcore doctor --json`
    """
    report = examine(verbose)
    if as_json:
        console.print_json(report)
    else:
        _print(report)


def examine(verbose: bool = False) -> dict[str, Any]:
    """All findings as JSON types."""
    from ktcore.backend.registry import Registry
    from ktcore.errors import KtcoreError
    from ktcore.placement.topology import read_topology
    from ktcore.rules.load import rule_folders

    topology = read_topology()
    registry = Registry.discover()
    try:
        chosen, why = registry.choose("auto")
    except KtcoreError as error:
        chosen, why = "", str(error)
    backends = [
        {
            "name": r.name,
            "distribution": r.distribution,
            "state": r.state.value,
            "reason": r.reason,
            "requirements": r.spec.requirements if r.spec else None,
            **({"traceback": r.verdict.traceback} if verbose else {}),
        }
        for r in registry.records()
    ]
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}",
        "versions": {name: _version(name) for name in ("ktcore", "torch", "transformers", "gguf", "numpy")},
        "cpu": {
            "model": _cpu_model(),
            "usable_cpus": len(topology.cpus),
            "physical_cores": topology.cores,
            "quota": topology.cpu_quota,
        },
        "numa": [{"node": n.id, "cpus": len(n.cpus), "memory_bytes": n.memory_bytes} for n in topology.nodes],
        "memory": {"total_bytes": topology.memory_bytes, "limit_bytes": topology.memory_limit},
        "host": _host_capabilities(registry),
        "backends": backends,
        "auto": {"backend": chosen, "why": why},
        "rule_folders": [str(folder) for folder in rule_folders(registry)],
    }


def _host_capabilities(registry: Any) -> dict[str, Any]:
    """What the host backend says of its device, instruction sets among it; the reason when it does not run."""
    from ktcore.errors import KtcoreError

    try:
        runtime = registry.runtime(registry.host().name)
    except KtcoreError as error:
        return {"error": str(error)}
    try:
        caps = runtime.capabilities()
        return {"name": caps.name, "features": sorted(caps.features), "properties": dict(caps.properties)}
    finally:
        runtime.close()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        return platform.processor()
    return platform.processor()


def _print(report: dict[str, Any]) -> None:
    from rich.table import Table

    from ktcore.placement.memory import human_bytes

    out = console.out_console()
    facts = Table(box=None, show_header=False, pad_edge=False)
    facts.add_column(style="bold")
    facts.add_column(overflow="fold")
    facts.add_row("Python", f"{report['python']} on {report['system']}")
    facts.add_row("packages", ", ".join(f"{k} {v or 'missing'}" for k, v in report["versions"].items()))
    cpu, memory = report["cpu"], report["memory"]
    quota = f", quota of {cpu['quota']:g} CPUs" if cpu["quota"] else ""
    facts.add_row("CPU", f"{cpu['model']}, {cpu['physical_cores']} cores usable ({cpu['usable_cpus']} CPUs{quota})")
    host = report["host"]
    facts.add_row("host backend", host.get("error") or f"{host['name']}: {', '.join(host['features'])}")
    for node in report["numa"]:
        facts.add_row(f"NUMA node {node['node']}", f"{node['cpus']} CPUs, {human_bytes(node['memory_bytes'])}")
    limit = f", limited to {human_bytes(memory['limit_bytes'])}" if memory["limit_bytes"] else ""
    facts.add_row("memory", human_bytes(memory["total_bytes"]) + limit)
    facts.add_row("rules", ", ".join(report["rule_folders"]))
    out.print(facts)
    table = Table(box=None, pad_edge=False, header_style="bold", title="backends")
    for title in ("name", "state", "reason", "from"):
        table.add_column(title, overflow="fold")
    for backend in report["backends"]:
        color = {"loaded": "green", "unavailable": "yellow"}.get(backend["state"], "red")
        table.add_row(backend["name"], f"[{color}]{backend['state']}[/]", backend["reason"], backend["distribution"])
    out.print(table)
    out.print(f"backend 'auto' takes {report['auto']['backend'] or 'nothing'}: {report['auto']['why']}", markup=False)
    for backend in report["backends"]:
        if backend.get("traceback"):
            out.print(f"\n{backend['name']}:\n{backend['traceback']}", markup=False)
