"""Run in the environment that `run.py` makes: a line a kernel, how many HIVM operations it has become, or why not."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("TRITON_DISABLE_LINE_INFO", "1")
ROOT = Path(__file__).resolve().parents[3]
sys.path[:0] = [str(ROOT / "backends" / "triton"), str(ROOT / "tests" / "triton_kernels")]
CHIP = "Ascend910B3"
FLAGS = ("--enable-triton-kernel-compile=true", "--enable-hfusion-compile=true", "--enable-hivm-compile=true")
# where the package's own part ends: what follows is a program of CANN
DONE = "returning module before running external compiler"


def main() -> None:
    """For every kernel's representative configuration."""
    from configurations import configurations  # type: ignore[import-not-found]

    for configuration in configurations(False):
        try:
            found = f"HIVM, {hivm(linalg(configuration))} operations"
        except Exception as error:  # whatever the compiler raises is the caller's to show
            found = f"{type(error).__name__} {error}"[:300].replace("\n", " ")
        print(f"{configuration.name}: {found}", flush=True)


def linalg(configuration: Any) -> str:
    """A kernel as Linalg, by triton-ascend."""
    import triton.backends.ascend.compiler as ascend  # type: ignore[import-not-found]
    import triton.language as tl
    from triton._C.libtriton import ir
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, function = configuration.kernel.split(":")
    kernel = getattr(importlib.import_module(f"ktcore_triton.kernels.{module}"), function)
    kinds = {"fp16": tl.float16, "bf16": tl.bfloat16, "fp32": tl.float32, "fp8e4nv": tl.float8e4nv}
    constants = {**configuration.constants, **{key: kinds[kind] for key, kind in configuration.compute.items()}}
    signature = {a: configuration.types.get(a, "constexpr") for a in kernel.arg_names}
    target = GPUTarget("npu", CHIP, 0)
    backend = ascend.AscendBackend(target)
    options = backend.parse_options({})
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    source: Any = ASTSource(fn=kernel, signature=signature, constants=constants)  # type: ignore[call-arg]
    made = source.make_ir(options, backend.get_codegen_implementation(), backend.get_module_map(), context)
    metadata = {"target": target, **options.__dict__}
    text: str = ascend.ttir_to_linalg(ascend.make_ttir(made, metadata, options), metadata, options, named_ops=True)
    return text


def hivm(source: str) -> int:
    """How many HIVM operations a Linalg module becomes, by AscendNPU-IR."""
    import ascendnpuir  # type: ignore[import-not-found]

    compiler = Path(ascendnpuir.__file__).parent / "bin" / "bishengir-compile"
    with tempfile.TemporaryDirectory() as folder:
        given = Path(folder, "kernel.mlir")
        given.write_text(source)
        where = [f"--save-temps={folder}", "-o", f"{folder}/out.o"]
        words = [str(compiler), str(given), f"--target={CHIP}", *FLAGS, *where]
        done = subprocess.run(words, capture_output=True, text=True, timeout=300, check=False)
        made = Path(folder, "module.hivm.opt.mlir")
        if not made.is_file() or DONE not in done.stderr + done.stdout:
            raise RuntimeError(f"AscendNPU-IR gives no HIVM: {(done.stderr + done.stdout)[-250:]}")
        return made.read_text().count("hivm.hir.")


if __name__ == "__main__":
    main()
