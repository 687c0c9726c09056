"""The rooms that mutants are drawn from, and the tests that have to notice them."""

from __future__ import annotations

# A room: a folder of ktcore/ or of backends/. Tests: files and folders below tests/.
ROOMS: dict[str, tuple[str, ...]] = {
    "ops": ("ops", "engine/test_sampling.py", "backend/test_reference.py", "backend/test_reference_cache.py"),
    "placement": ("placement", "rules/test_plan.py"),
    "rules": ("rules",),
    "graph": (
        "graph",
        "rules/test_shipped.py",
        "parity/test_absent_keys.py",
        "parity/test_mixed.py",
        "parity/test_quirks.py",
        "parity/test_smallthinker.py",
    ),
    "text": ("text",),
    "weights": ("weights", "engine/test_packed_cache.py"),
    "backend": ("backend", "engine/test_handoff.py", "engine/test_states.py"),
    "dialects": ("dialects", "server/test_tools.py", "server/test_reading.py"),
    "engine/load": ("engine",),
    "engine/schedule": ("engine",),
    "engine/step": ("engine", "parity/test_engine.py", "parity/test_decode_graph.py"),
    "engine/experts": ("engine", "parity/test_hybrid.py"),
    "engine/prefix": ("engine", "parity/test_prefix.py"),
    "server": ("server",),
    "cli": ("cli",),
    "conformance": ("conformance",),
    "backends/cpu": ("cpu", "csrc", "parity/test_native.py"),
    "backends/sim": ("sim",),
    "backends/cuda": ("vendors",),
    "backends/rocm": ("vendors",),
    "backends/xpu": ("vendors",),
    "backends/npu": ("vendors",),
    "backends/triton": ("triton_kernels",),
}


def source(room: str) -> str:
    """The room's folder, from the repository's root."""
    return room if room.startswith("backends/") else f"ktcore/{room}"


def watched(room: str) -> str:
    """The folder whose lines are recorded: rooms of the engine share their tests, and so what is known of them."""
    return "ktcore/engine" if room.startswith("engine/") else source(room)
