#!/usr/bin/env python3
"""The shared kernels on a device: W4A16 beside the 16-bit product of torch, and decode of latent attention.

    python benchmarks/device_kernels.py --backend cuda

Times are medians of replayed graphs. Weights of one product are larger than a second-level cache only together, so
several of them take turns. Prints one JSON object; bandwidth is of bytes that must be read at least once.
"""

from __future__ import annotations

import json
from itertools import cycle
from typing import Any

from on_device import Bench, arguments, prepare


def w4a16(bench: Bench, small: bool) -> list[dict[str, Any]]:
    """Products of a Q4_0 weight, by number of tokens."""
    import torch
    from ktcore_triton.affine import AffineWeight
    from ktcore_triton.linear import linear

    rows, cols, copies = (64, 128, 2) if small else (8192, 8192, 4)
    half = torch.bfloat16 if bench.runtime.capabilities().has("bf16") else torch.float16
    found = []
    with bench.runtime.use_stream(bench.stream):
        weights = [
            AffineWeight(
                torch.randint(0, 256, (rows, cols // 2), dtype=torch.uint8).to(bench.device),
                (torch.rand(rows, cols // 32) / 64).half().to(bench.device),
                None,
                4,
                32,
                8,
                32,
            )
            for _ in range(copies)
        ]
        plain = [torch.randn(rows, cols).to(half).to(bench.device) for _ in range(copies)]
    for tokens in (1,) if small else (1, 2, 4, 8, 16, 64):
        with bench.runtime.use_stream(bench.stream):
            x = torch.randn(tokens, cols).to(half).to(bench.device)
        turns, others = cycle(weights), cycle(plain)
        times = 2 if small else 20
        ours = bench.seconds(lambda x=x, turns=turns: linear(x, next(turns)), times)  # type: ignore[misc]
        theirs = bench.seconds(lambda x=x, others=others: torch.mm(x, next(others).t()), times)  # type: ignore[misc]
        found.append(
            {
                "tokens": tokens,
                "w4a16_us": ours * 1e6,
                "torch_16_bit_us": theirs * 1e6,
                "ratio": theirs / ours,
                "w4a16_gb_s": weights[0].nbytes / ours / 1e9,
            }
        )
    return found


def mla_decode(bench: Bench, small: bool) -> list[dict[str, Any]]:
    """One token of each of eight sequences over its latents, at DeepSeek-V3's sizes."""
    import torch
    from ktcore_triton.attention import Pages, latent_attention

    heads, rank, rope = (16, 32, 16) if small else (128, 512, 64)
    half = torch.bfloat16 if bench.runtime.capabilities().has("bf16") else torch.float16
    sequences, page = (2, 16) if small else (8, 64)
    found = []
    for context in (64,) if small else (4096, 16384):
        blocks = context // page
        with bench.runtime.use_stream(bench.stream):
            cache = torch.randn(sequences * context, rank + rope).to(half).to(bench.device)
            q = torch.randn(sequences, heads, rank + rope).to(half).to(bench.device)
            pages = Pages(
                torch.arange(sequences + 1, dtype=torch.int32).to(bench.device),
                torch.full((sequences,), context, dtype=torch.int32).to(bench.device),
                torch.randperm(sequences * blocks).int().view(sequences, blocks).to(bench.device),
                page,
                1,
            )

        def step(q: Any = q, cache: Any = cache, pages: Any = pages) -> object:
            return latent_attention(q, cache, pages, (rank + rope) ** -0.5, rank)

        seconds = bench.seconds(step, 2 if small else 10)
        read = cache.numel() * cache.element_size()
        found.append({"context": context, "sequences": sequences, "us": seconds * 1e6, "gb_s": read / seconds / 1e9})
    return found


def main() -> None:
    """Print one JSON object."""
    given = arguments(__doc__).parse_args()
    prepare(given)
    bench = Bench(given.backend)
    report = {
        "device": bench.runtime.capabilities().name,
        "w4a16": w4a16(bench, given.simulate),
        "mla_decode": mla_decode(bench, given.simulate),
    }
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
