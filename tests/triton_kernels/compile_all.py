"""Compiles configurations for targets and prints a JSON line for each; a process of its own, without interpreter.

python compile_all.py TARGET [full]
"""

from __future__ import annotations

import importlib
import json
import re
import struct
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from configurations import Configuration, configurations  # type: ignore[import-not-found]
from targets import TARGETS, Target  # type: ignore[import-not-found]


def main(name: str, full: bool) -> None:
    """One line a configuration."""
    target = next(t for t in TARGETS if t.name == name)
    for configuration in configurations(full):
        if configuration.needs not in ("", target.float8):
            continue
        try:
            found = measure(configuration, target)
        except Exception as error:  # whatever the compiler raises is the test's to show
            found = {"error": f"{type(error).__name__}: {error}"[:2000]}
        print(json.dumps({"name": configuration.name, **found}), flush=True)


def measure(c: Configuration, target: Target) -> dict[str, Any]:
    """What the compiled kernel takes: bytes of code and shared memory, registers a thread, bytes spilled."""
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, function = c.kernel.split(":")
    kernel = getattr(importlib.import_module(f"ktcore_triton.kernels.{module}"), function)
    kinds = {"fp16": tl.float16, "bf16": tl.bfloat16, "fp32": tl.float32, "fp8e4nv": tl.float8e4nv,
             "fp8e4b8": tl.float8e4b8}  # fmt: skip
    constants = {**c.constants, **{key: kinds[kind] for key, kind in c.compute.items()}}
    signature = {a: c.types.get(a, "constexpr") for a in kernel.arg_names}
    aligned = {(kernel.arg_names.index(a),): [["tt.divisibility", 16]] for a, t in c.types.items() if t[0] == "*"}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    built = triton.compile(
        source,
        target=GPUTarget(target.compiler, target.arch, target.subgroup),
        options={"num_warps": c.warps, "num_stages": c.stages},
    )
    found: dict[str, Any] = {"shared": built.metadata.shared}
    if target.compiler == "hip":
        text = built.asm["amdgcn"]
        found["code"] = len(built.asm["hsaco"])
        found["registers"] = int(re.findall(r"\.vgpr_count:\s+(\d+)", text)[0])
        found["spilled"] = int(re.findall(r"\.private_segment_fixed_size:\s+(\d+)", text)[0])
    else:
        found["code"] = len(built.asm["cubin"])
        found["registers"], found["spilled"] = cubin_registers(built.asm["cubin"])
    return found


def cubin_registers(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of stack a thread: attributes REGCOUNT (0x2f), FRAME_SIZE (0x11) of the ELF's `.nv.info`."""
    start = struct.unpack_from("<Q", cubin, 40)[0]
    size, count, names = struct.unpack_from("<HHH", cubin, 58)
    sections = [struct.unpack_from("<IIQQQQIIQQ", cubin, start + i * size) for i in range(count)]
    texts = sections[names][4]
    found = {0x2F: 0, 0x11: 0}
    for name, _, _, _, at, length, *_ in sections:
        if not cubin[texts + name :].startswith(b".nv.info\0"):
            continue
        here = at
        while here < at + length:
            form, attribute, bytes_ = struct.unpack_from("<BBH", cubin, here)
            if form == 4 and attribute in found:
                found[attribute] = max(found[attribute], struct.unpack_from("<II", cubin, here + 4)[1])
            here += 4 + (bytes_ if form == 4 else 0)
    return found[0x2F], found[0x11]


if __name__ == "__main__":
    main(sys.argv[1], "full" in sys.argv[2:])
