"""`ktcore doctor`: what this machine offers, and why a backend is not available."""

from __future__ import annotations

import os
from collections import Counter
from typing import Annotated, Any

from ktcore.cli import groups as g
from ktcore.cli import options as o

COLOURS = {"loaded": "green", "unavailable": "yellow", "incompatible": "red", "broken": "bold red"}
ISA_VARIABLE = "KTCORE_ISA"


@g.grouped
def doctor(
    as_json: o.JsonOption = False,
    verbose: Annotated[int, o.verbose_option("Show tracebacks of broken backends and all CPU features.")] = 0,
) -> None:
    """Show what this machine offers, and every backend found.

    A backend that is not loaded says what it lacks; KTCORE_PLUGINS=cpu,NAME limits which ones are looked at.

    \b
      ktcore doctor
      ktcore doctor --json | jq '.backends[] | {name, state, reason}'
    """
    from ktcore.cli.machine import examine
    from ktcore.cli.terminal import write_json

    found = examine()
    if as_json:
        write_json(found)
    else:
        _show(found, verbose > 0)


def _show(found: dict[str, Any], verbose: bool) -> None:
    from rich.markup import escape
    from rich.table import Table

    from ktcore.cli.terminal import console

    out = console()
    facts = Table(box=None, show_header=False, pad_edge=False)
    facts.add_column(style="bold", no_wrap=True)
    facts.add_column(overflow="fold")
    for name, value in [*_software(found), *_hardware(found, verbose)]:
        facts.add_row(name, escape(value))
    out.print(facts)

    backends = Table(box=None, header_style="bold", pad_edge=False)
    backends.add_column("backend", no_wrap=True)
    backends.add_column("state", no_wrap=True)
    backends.add_column("from", no_wrap=True)
    backends.add_column("reason", overflow="fold")
    for record in found["backends"]:
        colour = COLOURS.get(record["state"], "")
        state = f"[{colour}]{record['state']}[/]" if colour else record["state"]
        backends.add_row(escape(record["name"]), state, escape(record["distribution"]), escape(record["reason"]))
    out.print()
    out.print(backends)
    out.print()
    auto = found["auto"]
    out.print(f"[bold]auto[/] takes {auto['backend'] or 'nothing'}: {escape(auto['reason'])}")
    traced = [record for record in found["backends"] if record["traceback"]]
    for record in traced if verbose else ():
        out.print(f"\n[bold]{escape(record['name'])}[/]")
        out.print(record["traceback"], markup=False)
    if traced and not verbose:
        out.print("--verbose shows the tracebacks.", style="dim", markup=False)


def _software(found: dict[str, Any]) -> list[tuple[str, str]]:
    packages = ", ".join(f"{name} {version or 'not installed'}" for name, version in found["packages"].items())
    return [
        ("ktcore", found["ktcore"]),
        ("Python", f"{found['python']} ({found['executable']})"),
        ("packages", packages),
        ("torch", _torch(found["torch"])),
        ("rule files", ", ".join(found["rule_folders"])),
    ]


def _torch(build: dict[str, Any]) -> str:
    if build["built_for"] is None:
        return "built for CPUs alone"
    return f"built for {build['built_for']}" + (f": {build['advice']}" if build["advice"] else "")


def _kinds(capacities: list[float]) -> str:
    """Of a machine with quick and slow cores: " (8 of 100%, 4 of 55%)"."""
    kinds = dict(Counter(capacities))
    return f" ({', '.join(f'{count} of {c:.0%}' for c, count in kinds.items())})" if len(kinds) > 1 else ""


def _hardware(found: dict[str, Any], verbose: bool) -> list[tuple[str, str]]:
    from ktcore.placement.memory import human_bytes

    machine = found["machine"]
    quota, limit = machine["cpu_quota"], machine["memory_limit_bytes"]
    cores = f"{machine['physical_cores']} physical{_kinds(machine['core_capacities'])}"
    cores += f", {machine['logical_cpus']} logical that this process may use"
    nodes = (f"{n['id']}: {len(n['cpus'])} CPUs, {human_bytes(n['memory_bytes'])}" for n in machine["numa_nodes"])
    return [
        ("system", machine["os"]),
        ("CPU", machine["cpu"]),
        ("cores", cores + (f", {quota:g} CPUs' worth of time" if quota is not None else "")),
        *_instructions(found["host"], verbose),
        ("NUMA nodes", "; ".join(nodes)),
        (
            "memory",
            f"{human_bytes(machine['memory_bytes'])}, {human_bytes(machine['memory_available_bytes'])} available"
            + (f", control group limit {human_bytes(limit)}" if limit is not None else ""),
        ),
    ]


def _instructions(host: dict[str, Any], verbose: bool) -> list[tuple[str, str]]:
    if host["backend"] is None:
        return [("instructions", host["reason"])]
    properties = host["properties"]
    chosen = [feature.removeprefix("isa:") for feature in host["features"] if feature.startswith("isa:")]
    text = f"{', '.join(chosen) or 'not told'} in use"
    if "isa_supported" in properties:
        text += f"; supported: {properties['isa_supported']}"
    forced = os.environ.get(ISA_VARIABLE)
    text += f" ({ISA_VARIABLE}={forced})" if forced else f" (set {ISA_VARIABLE} to force a lower one)"
    rows = [("instructions", text), ("threads", str(properties.get("threads", "not told")))]
    if "numa" in properties:
        rows.append(("NUMA", str(properties["numa"])))
    if verbose and "cpu_flags" in properties:
        rows.append(("CPU features", str(properties["cpu_flags"])))
    return rows
