"""Compiles HIP sources for AMD's chips with a plain clang, where there is no ROCm: Debian's hipcc brings the device
libraries and headers of an old one, to which constants of newer chips are added. A compile check, nothing to ship."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

DEVICE_LIBS = Path("/usr/lib/x86_64-linux-gnu/amdgcn/bitcode")
HEADER = Path("/usr/include/hip/hip_runtime.h")
NEWER = {"942": 9402, "1100": 11000, "1201": 12001}
"""`__oclc_ISA_version` of chips that the old libraries do not know."""
ISA = """target triple = "amdgcn-amd-amdhsa"
@__oclc_ISA_version = linkonce_odr hidden local_unnamed_addr addrspace(4) constant i32 {version}, align 4
"""
LDS_BYTES = 64 << 10


@dataclass(frozen=True)
class Kernel:
    """What a code object's metadata says of a kernel: registers a lane, bytes of its own memory and of the block's."""

    name: str
    vgprs: int
    agprs: int
    spilled: int
    private: int
    lds: int
    wave: int


def clang() -> str | None:
    """A clang that knows all the chips."""
    return os.environ.get("KTCORE_CLANG") or next(filter(None, map(shutil.which, ("clang++-20", "clang++-19"))), None)


def missing() -> str:
    """What is not here to compile with; empty when all is."""
    lacking = [] if clang() else ["clang++-19 (Debian: clang-19 lld-19)"]
    lacking += [f"{path} (Debian: hipcc)" for path in (DEVICE_LIBS / "ocml.bc", HEADER) if not path.is_file()]
    return " and ".join(lacking)


def device_libs(folder: Path) -> Path:
    """The device libraries with what newer chips need, in `folder`."""
    made = folder / "devlib"
    if made.is_dir():
        return made
    shutil.copytree(DEVICE_LIBS, made)
    for chip, version in NEWER.items():
        target = made / f"oclc_isa_version_{chip}.bc"
        if not target.is_file():
            source = folder / "isa.ll"
            source.write_text(ISA.format(version=version))
            options = ["-x", "ir", "-nogpulib", "-emit-llvm", "-c", "--target=amdgcn-amd-amdhsa", "-mcpu=gfx900"]
            subprocess.run([str(clang()), *options, str(source), "-o", str(target)], check=True)
    return made


def compiled(source: Path, arch: str, flags: list[str], folder: Path) -> list[Kernel]:
    """The kernels of the code object that `source` becomes for `arch`; what is built stays in `folder`.

    Raises:
        RuntimeError: it does not compile, with the compiler's words.
    """
    target = folder / f"{arch}.co"
    options = ["-x", "hip", "--offload-device-only", "--no-gpu-bundle-output", "-save-temps=obj", "-Wall", "-Wextra"]
    options += ["--rocm-path=/usr", f"--rocm-device-lib-path={device_libs(folder)}"]
    command = [str(clang()), *options, f"--offload-arch={arch}", *flags, str(source), "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode or "warning:" in done.stderr:
        raise RuntimeError(f"{source.name} for {arch}:\n{done.stderr[-3000:]}")
    (assembly,) = folder.glob(f"*{arch}*.s")
    return kernels(assembly.read_text())


def kernels(assembly: str) -> list[Kernel]:
    """Of the metadata that the assembler puts into the code object."""
    metadata = assembly[assembly.rindex("amdhsa.kernels:") :]
    found = []
    for entry in re.split(r"\n  - ", metadata)[1:]:

        def number(key: str, of: str = entry, default: int | None = None) -> int:
            match = re.search(rf"\.{key}:\s+(\d+)", of)
            if match is None and default is None:
                raise RuntimeError(f"the metadata says nothing of {key}")
            return int(match[1]) if match else int(default or 0)

        name = re.search(r"\.name:\s+(\S+)", entry)
        if name is None or ".vgpr_count" not in entry:
            continue
        found.append(
            Kernel(
                name[1],
                number("vgpr_count"),
                number("agpr_count", default=0),
                number("vgpr_spill_count") + number("sgpr_spill_count"),
                number("private_segment_fixed_size"),
                number("group_segment_fixed_size"),
                number("wavefront_size"),
            )
        )
    return found
