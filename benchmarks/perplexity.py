#!/usr/bin/env python3
"""Perplexity of the demo model in every affine format: ktcore's kernels against transformers in float32.

    python benchmarks/perplexity.py [--tokens 4096] [--formats Q4_K INT4_G128 …]

Run it from the repository's root. The reference runs the gguf package's dequantised weights (for INT formats, numpy's).
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
INTEGERS = ("INT4_G32", "INT4_G64", "INT4_G128", "INT8_G32", "INT8_G64", "INT8_G128")


def main() -> int:
    """Print a row a format as soon as it is known."""
    sys.path.insert(0, str(ROOT))
    from ktcore.demo import fetch
    from tests.parity import requantize as r

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--formats", nargs="+", default=[*r.AFFINE, *INTEGERS], choices=[*r.AFFINE, *INTEGERS])
    wanted = parser.parse_args()
    source = fetch()
    ids = r.token_ids(source, (ROOT / "tests" / "data" / "guides.txt").read_text(), wanted.tokens)
    tensors = r.wide_tensors(source)
    print("| format | transformers, float32 | ktcore | change |\n|---|---|---|---|", flush=True)
    for format in wanted.formats:
        with tempfile.TemporaryDirectory() as folder:
            integers = format if format in INTEGERS else None
            path = r.write(
                source, tensors, Path(folder) / "model.gguf", lambda _, f=format, i=integers: "F16" if i else f
            )
            rules = Path(folder) / "rules.yaml"
            rules.write_text(r.rules_with(f"quantize: {format.lower()}"))
            want, got = r.theirs(path, ids, integers), r.ours(path, ids, rules if integers else None)
            print(f"| {format} | {want:.4f} | {got:.4f} | {got / want - 1:+.2%} |", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
