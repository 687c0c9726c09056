"""The loads that servers are put under; each gives figures of one round, times in seconds."""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

from serving_client import Heard, Target, words

Figures = dict[str, float]


@dataclass(frozen=True)
class Load:
    """Sizes, in tokens.

    Attributes:
        prompt: words of a short prompt.
        rate: requests a second that arrive.
        patience: seconds until the first text that a request may take to count as good.
    """

    streams: int = 8
    prompt: int = 32
    new: int = 128
    long: int = 8000  # an 8k context has room for the answer
    prefix: int = 4096
    requests: int = 32
    rate: float = 1.0
    patience: float = 2.0
    pause: float = 0.2


def quantile(values: list[float], share: float) -> float:
    """The value below which so large a share of them lies."""
    ordered = sorted(values)
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)]


async def streams(target: Target, load: Load, rng: random.Random) -> Figures:
    """Tokens a second of one stream, and of several at once, from the first text to the last of all."""
    speeds = []
    for count in (1, load.streams):
        heard = await asyncio.gather(*(target.ask(words(load.prompt, rng), load.new) for _ in range(count)))
        begins, ends = min(h.times[0] for h in heard), max(h.times[-1] for h in heard)
        speeds.append(sum(h.tokens - 1 for h in heard) / (ends - begins))
    return {"one_tok_s": speeds[0], "all_tok_s": speeds[1], "ratio": speeds[1] / speeds[0]}


async def newcomer(target: Target, load: Load, rng: random.Random) -> Figures:
    """Times between the texts of running streams, in peace and while a long prompt is computed."""
    over = asyncio.Event()
    # where one answer follows the other, the newcomer would wait for all of them
    running = [Heard(0.0) for _ in range(0 if target.serial else load.streams // 2)]
    tasks = [asyncio.create_task(target.ask(words(load.prompt, rng), 4000, over, heard)) for heard in running]
    await asyncio.sleep(4 + load.pause)
    asked = time.perf_counter()
    long = await target.ask(words(load.long, rng), 2)
    told = long.times[0]
    await asyncio.sleep(2)
    over.set()
    await asyncio.gather(*tasks)
    spoken = [h for h in running if h.times and h.times[0] < asked - 1]
    calm = [b - a for h in spoken for a, b in _pairs(h) if b < asked and a > asked - 3]
    during = [b - a for h in spoken for a, b in _pairs(h) if b > asked and a < told]
    figures = {"speaking": float(len(spoken)), "newcomer_s": long.first, "newcomer_tokens": float(long.prompt_tokens)}
    for name, values in (("calm", calm), ("during", during)):
        if values:
            figures[f"{name}_p50_s"] = statistics.median(values)
            figures[f"{name}_p99_s"] = quantile(values, 0.99)
    if calm and during:
        figures["ratio_p50"] = figures["during_p50_s"] / figures["calm_p50_s"]
        figures["ratio_p99"] = figures["during_p99_s"] / figures["calm_p50_s"]
    return figures


async def prefix(target: Target, load: Load, rng: random.Random, restart: Callable[[], Target]) -> Figures:
    """Time to the first text of a prompt, of another that begins alike, and of a third after a restart."""
    common = words(load.prefix, rng)
    first = await target.ask(common + words(16, rng), 4)
    await asyncio.sleep(load.pause)
    again = await target.ask(common + words(16, rng), 4)
    # others take its place in the context
    for _ in range(3):
        await target.ask(words(load.prefix, rng), 1)
    later = await target.ask(common + words(16, rng), 4)
    target = await asyncio.to_thread(restart)
    await target.ask(words(load.prompt, rng), 4)
    restarted = await target.ask(common + words(16, rng), 4)
    return {
        "first_s": first.first,
        "again": again.first / first.first,
        "after_others": later.first / first.first,
        "after_restart": restarted.first / first.first,
    }


async def arrivals(target: Target, load: Load, rng: random.Random) -> Figures:
    """Requests of mixed sizes that come when they come (Poisson), whether the server keeps up or not."""
    plan, at = [], 0.0
    for _ in range(load.requests):
        at += rng.expovariate(load.rate)
        plan.append((at, words(rng.choice((32, 128, 512, 1024)), rng), rng.choice((16, 64, 128))))

    async def one(at: float, prompt: str, new: int) -> Heard:
        await asyncio.sleep(at)
        return await target.ask(prompt, new)

    begins = time.perf_counter()
    heard = await asyncio.gather(*(one(*each) for each in plan))
    took = max(h.times[-1] for h in heard) - begins
    firsts, gaps = [h.first for h in heard], [gap for h in heard for gap in h.gaps]
    good = [h for h in heard if h.first <= load.patience]
    return {
        "first_p50_s": statistics.median(firsts),
        "first_p99_s": quantile(firsts, 0.99),
        "gap_p50_s": statistics.median(gaps),
        "gap_p99_s": quantile(gaps, 0.99),
        "tok_s": sum(h.tokens for h in heard) / took,
        "good_share": len(good) / len(heard),
        "good_tok_s": sum(h.tokens for h in good) / took,
    }


def _pairs(heard: Heard) -> list[tuple[float, float]]:
    return list(zip(heard.times, heard.times[1:], strict=False))
