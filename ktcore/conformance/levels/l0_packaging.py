"""What a backend is before any device is touched: found, honest about itself, inert."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from importlib.metadata import EntryPoint, entry_points

from ktcore.backend.hookspecs import ENTRY_POINT_GROUP
from ktcore.backend.record import PROBE_SECONDS, BackendState
from ktcore.backend.spec import API_VERSION
from ktcore.conformance.case import Case, Check, Context
from ktcore.errors import BackendError

REPORT_IMPORTS = """
import importlib, json, sys
import ktcore.backend, torch, numpy, psutil, pluggy
before = set(sys.modules)
importlib.import_module({module!r})
from ktcore.backend.discovery import find_plugins
find_plugins([{name!r}])
new = {{n: getattr(m, "__file__", None) or "" for n, m in list(sys.modules.items()) if n not in before}}
print(json.dumps(new))
"""


def cases() -> list[Case]:
    """Packaging and registration."""
    return [
        _case("found", "the backend is registered and usable", _found),
        _case("api-version", "it was written for this API", _api),
        _case("requirements", "it says in words what it needs", _requirements),
        _case("declared", "it declares a device class under its own name", _declared),
        _case("probe", "its probe says available, or why not, quickly and twice the same", _probe),
        _case("inert", "registering it imports no third-party library and no native code", _inert),
        _case("entry", "its entry gives a backend object", _entry),
        _case("expectations", "its listed gaps name cases that exist", _expectations),
    ]


def _case(name: str, about: str, run: Check) -> Case:
    return Case(f"L0.packaging.{name}", 0, "packaging", about, run)


def _found(ctx: Context) -> None:
    record = ctx.target.registry.known(ctx.target.name)
    ctx.require(record.spec is not None, "it has no spec")


def _api(ctx: Context) -> None:
    spec = ctx.target.registry.known(ctx.target.name).spec
    assert spec is not None
    wanted, has = spec.api_version, API_VERSION
    fits = wanted[0] == has[0] and wanted[1] <= has[1]
    ctx.require(fits, f"written for {wanted}, this is {has}: declare `handles` of every implementation, then raise it")


def _requirements(ctx: Context) -> None:
    spec = ctx.target.registry.known(ctx.target.name).spec
    assert spec is not None
    ctx.require(len(spec.requirements.split()) >= 1, "requirements are empty: a user without them learns nothing")


def _declared(ctx: Context) -> None:
    spec = ctx.target.registry.known(ctx.target.name).spec
    assert spec is not None
    for device in spec.declared:
        ctx.require(device.backend == spec.name, f"a declared device belongs to '{device.backend}', not '{spec.name}'")
        ctx.require(bool(device.name), "a declared device has no name")
        ctx.require(not device.live, "a declared device is marked live: nothing was read from a device")


def _probe(ctx: Context) -> None:
    record = ctx.target.registry.known(ctx.target.name)
    assert record.spec is not None
    started = time.perf_counter()
    answers = [record.spec.probe() for _ in range(2)]
    took = time.perf_counter() - started
    ctx.require(took < PROBE_SECONDS, f"two probes took {took:.1f} s")
    ctx.require(answers[0].available == answers[1].available, "two probes disagree")
    ctx.require(bool(answers[0].reason), "the probe gives no reason")
    ctx.require(not answers[0].available or answers[0].devices > 0, "available, but no device is counted")
    if record.state is BackendState.UNAVAILABLE:
        ctx.not_applicable(f"no device here: {record.reason}")


def _inert(ctx: Context) -> None:
    entry = installed_entry_point(ctx)
    if entry is None:
        ctx.not_applicable("the backend was not found by an entry point")
    code = REPORT_IMPORTS.format(module=entry.module.partition(".")[0], name=entry.name)
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    ctx.require(run.returncode == 0, f"registering it alone fails: {run.stderr.strip()[-400:]}")
    new: dict[str, str] = json.loads(run.stdout.strip().splitlines()[-1])
    own = entry.module.partition(".")[0]
    known = {"ktcore", own, *sys.stdlib_module_names}
    foreign = sorted({n.partition(".")[0] for n in new} - known)
    foreign = [n for n in foreign if not n.startswith("_")]
    ctx.require(not foreign, f"registering imports {', '.join(foreign)}")
    native = sorted(n for n, file in new.items() if n.partition(".")[0] == own and file.endswith((".so", ".pyd")))
    ctx.require(not native, f"registering loads native code: {', '.join(native)}")


def _entry(ctx: Context) -> None:
    backend = ctx.target.registry.backend_object(ctx.target.name)
    ctx.require(list(backend.implementations()) is not None, "it lists no implementations")
    try:
        ctx.target.registry.runtime(f"{ctx.target.name}:999").close()
    except BackendError:
        return
    ctx.fail("device 999 opens")


def _expectations(ctx: Context) -> None:
    from ktcore.conformance.levels import all_cases

    stale = ctx.target.expectations.stale({c.id for c in all_cases()})
    ctx.require(not stale, f"listed gaps match no case: {', '.join(stale)}")


def installed_entry_point(ctx: Context) -> EntryPoint | None:
    """The entry point that brought the backend; None when it was registered in another way."""
    distribution = ctx.target.registry.known(ctx.target.name).distribution
    for entry in entry_points(group=ENTRY_POINT_GROUP):
        if entry.dist is not None and f"{entry.dist.name} {entry.dist.version}" == distribution:
            return entry
    return None
