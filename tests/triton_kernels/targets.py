"""Chips that every kernel is compiled for, with the shared memory that a program may take on them.

Sources: NVIDIA CUDA C++ Programming Guide, table of technical specifications per compute capability; AMD's ISA
documents (LDS of 64 KiB a workgroup, 160 KiB on CDNA 4).
"""

from __future__ import annotations

from dataclasses import dataclass

KIB = 1024


@dataclass(frozen=True)
class Target:
    """Triton's name of a chip: its compiler, architecture and subgroup; bytes of shared memory a program may take; the
    flavour of 8-bit floats that its matrix instructions take."""

    compiler: str
    arch: int | str
    subgroup: int
    shared: int
    float8: str = ""

    @property
    def name(self) -> str:
        """As people write it."""
        return f"sm_{self.arch}" if isinstance(self.arch, int) else self.arch


TARGETS = (
    Target("cuda", 80, 32, 163 * KIB),
    Target("cuda", 86, 32, 99 * KIB),
    Target("cuda", 89, 32, 99 * KIB, "e4m3fn"),
    Target("cuda", 90, 32, 227 * KIB, "e4m3fn"),
    Target("cuda", 120, 32, 99 * KIB, "e4m3fn"),
    Target("hip", "gfx90a", 64, 64 * KIB),
    Target("hip", "gfx942", 64, 64 * KIB, "e4m3fnuz"),
    Target("hip", "gfx950", 64, 160 * KIB, "e4m3fn"),
    Target("hip", "gfx1100", 32, 64 * KIB),
    Target("hip", "gfx1201", 32, 64 * KIB, "e4m3fn"),
)
