"""Compiles the shared kernels in a backend's own launch shapes and prints a JSON line for each; without interpreter.

python compile_tuned.py TARGET [NAME …]
"""

from __future__ import annotations

import importlib
import json
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
# what compile_all.py imports beside itself
sys.path.insert(0, str(Path(__file__).parents[1] / "triton_kernels"))

from ktcore_triton.tuning import AttentionTiles, DeltaTiles, LinearTiles, Product, Tuning

from tests.triton_kernels.compile_all import measure
from tests.triton_kernels.configurations import Configuration, configurations
from tests.triton_kernels.targets import TARGETS


def main(name: str, wanted: list[str]) -> None:
    """One line a shape."""
    target = next(t for t in TARGETS if t.name == name)
    backend = "cuda" if target.compiler == "cuda" else "rocm"
    declared = importlib.import_module(f"ktcore_{backend}.devices").DECLARED
    device = next(c for c in declared if c.properties["arch"] == name)
    tuning: Tuning = importlib.import_module(f"ktcore_{backend}.tuning").tuning(device)
    known = {c.name: c for c in configurations(True)}
    for case, tiles in shapes(tuning).items():
        if not wanted or case in wanted:
            print(json.dumps({"name": case, **measure(shaped(known[case], tiles), target)}), flush=True)


def shapes(tuning: Tuning) -> dict[str, LinearTiles | AttentionTiles | DeltaTiles]:
    """A shape for each kernel and kind of call, by the name of its configuration."""
    return {
        "linear-4bit-g32-fp16-16x32": tuning.linear(Product(1, 4096, 4096)),
        "linear-6bit-g16-bf16-64x64": tuning.linear(Product(512, 4096, 4096)),
        "linear-8bit-g32-fp32-32x32": tuning.linear(Product(512, 4096, 4096, True)),
        "attention-decode": tuning.attention(4, 128),
        "attention-prefill": tuning.attention(2048, 128),
        "attention-prefill-192": tuning.attention(2048, 128),
        "attention-latent": tuning.attention(128, 512),
        "attention-chosen-latent": tuning.attention(128, 512),
        "experts-up": tuning.experts(1),
        "delta-chunks": tuning.delta(512, 128),
    }


def shaped(c: Configuration, tiles: LinearTiles | AttentionTiles | DeltaTiles) -> Configuration:
    """The configuration in that shape."""
    constants = dict(c.constants)
    if isinstance(tiles, DeltaTiles):
        constants |= {"BLOCK_V": tiles.block_v, "CHUNK": tiles.chunk}
    else:
        constants |= {"BLOCK_M": tiles.block_m, "BLOCK_N": tiles.block_n}
    if isinstance(tiles, AttentionTiles):
        constants["PART"] = min(tiles.part or constants["MAIN"], constants["MAIN"])
    return replace(c, constants=constants, warps=tiles.launch.warps, stages=tiles.launch.stages)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
