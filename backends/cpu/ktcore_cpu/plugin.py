"""Registers the CPU backend; importing this loads no native code."""

from __future__ import annotations

import platform
from dataclasses import replace

from ktcore.backend import API_VERSION, BackendSpec, Capabilities, Probe, hookimpl

DECLARED = Capabilities(
    backend="cpu",
    name=f"host CPU ({platform.machine()})",
    features=frozenset({"f32", "f16", "bf16", "int8_dot"}),
)


def declared() -> Capabilities:
    """`DECLARED`, and how many NUMA nodes can hold experts, which decides whether the fused branch runs."""
    from ktcore.placement.topology import read_topology
    from ktcore_cpu.numa.nodes import usable_places

    return replace(DECLARED, properties={"numa_nodes": len(usable_places(read_topology()))})


def probe() -> Probe:
    """Available when the native module loads; the reason names the instruction set it chose."""
    try:
        from ktcore_cpu import _native

        return Probe(True, f"instruction set {_native.isa_selected()}", devices=1)
    except (ImportError, ValueError, RuntimeError) as error:
        return Probe(False, f"the native module does not load: {error}")


@hookimpl
def ktcore_register_backends() -> list[BackendSpec]:
    """The one backend of this package."""
    return [
        BackendSpec(
            name="cpu",
            api_version=API_VERSION,
            requirements="x86-64; AVX2 or AVX-512 for speed",
            entry="ktcore_cpu.backend:CpuBackend",
            probe=probe,
            declared=(declared(),),
            accelerator=False,
        )
    ]


@hookimpl
def ktcore_conformance_expectations() -> object:
    """Precision of the kernels."""
    from ktcore_cpu.conformance import expectations

    return expectations()
