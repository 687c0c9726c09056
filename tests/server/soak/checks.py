"""Puts a server under mixed load for a while, and compares what it says of itself with what its clients saw."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import httpx

from .known import learn
from .load import Tally, Worker

FLAT = 0.05
"""How much more memory a server may hold at the end than after the warm-up."""
WARM = 0.25
"""The share of the time that is warm-up: caches fill, memory that is asked for once is asked for."""


@dataclass(frozen=True)
class Soaked:
    """What came of it.

    Attributes:
        memory: (seconds since the beginning, bytes) of the server's resident memory.
    """

    tally: Tally
    memory: list[tuple[float, int]]
    metrics: dict[str, float]

    @property
    def growth(self) -> float:
        """Resident memory of the last tenth of the time over that of the tenth after the warm-up, less one."""
        ends = self.memory[-1][0]

        def level(begin: float) -> float:
            return statistics.median(m for t, m in self.memory if begin * ends <= t <= (begin + 0.1) * ends)

        return level(0.9) / level(WARM) - 1


async def soak(
    url: str,
    model: str,
    context: int,
    seconds: float,
    workers: int,
    memory: Callable[[], int],
    key: str = "",
    asks: int = 24,
    longest: int = 300,
    seed: int = 0,
) -> Soaked:
    """Learn the answers, load the server, and wait until it is idle.

    Args:
        memory: bytes that the server holds.
        asks: how many different ones.
        longest: words of the longest message.
    """
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=workers)
    async with httpx.AsyncClient(base_url=url, headers=headers, timeout=300, limits=limits) as client:
        known = await learn(client, model, asks, longest, seed)
        before = await metrics(client)
        tally = Tally()
        begins = time.monotonic()
        made = [Worker(client, model, known, context, tally, seed + i) for i in range(workers)]
        tasks = [asyncio.create_task(worker.run(begins + seconds)) for worker in made]
        curve = []
        while any(not task.done() for task in tasks):
            curve.append((time.monotonic() - begins, memory()))
            await asyncio.wait(tasks, timeout=max(seconds / 400, 0.1))
        after = await _idle(client)
    return Soaked(tally, curve, {name: value - before.get(name, 0) for name, value in after.items()})


def problems(soaked: Soaked) -> list[str]:
    """What must not be: answers that differ, sequences that are stuck, counts that do not add up."""
    tally, found = soaked.tally, soaked.metrics
    wrong = tally.failures[:20]
    # gauges are the same as before the load when they differ by 0
    gauges = ("ktcore_waiting", "ktcore_running", "ktcore_kv_pages_free")
    wrong += [f"{name} is off by {found[name]}" for name in gauges if found[name]]
    answers = {name: value for name, value in found.items() if name.startswith("ktcore_answers_total")}
    failed = {name: value for name, value in answers.items() if value and ("error" in name or "deadline" in name)}
    if failed:
        wrong.append(f"answers that failed: {failed}")
    least = tally.choices + tally.left
    if not least <= sum(answers.values()) <= least + tally.unheard:
        wrong.append(f"{answers} do not add up to {least} answers and up to {tally.unheard} that nobody waited for")
    drawn = found["ktcore_generated_tokens_total"]
    if not tally.new_tokens <= drawn <= tally.new_tokens + tally.left_tokens:
        wrong.append(f"{drawn} tokens were drawn, the clients saw {tally.new_tokens}, and left {tally.left_tokens}")
    if found["ktcore_prompt_tokens_total"] < tally.prompt_tokens:
        wrong.append(f"{found['ktcore_prompt_tokens_total']} prompt tokens, the clients gave {tally.prompt_tokens}")
    return wrong


async def metrics(client: httpx.AsyncClient) -> dict[str, float]:
    """All of them by name and labels."""
    lines = (await client.get("/metrics")).text.splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))}


async def _idle(client: httpx.AsyncClient) -> dict[str, float]:
    ends = time.monotonic() + 30
    while True:
        found = await metrics(client)
        if not found["ktcore_running"] + found["ktcore_waiting"] or time.monotonic() > ends:
            return found
        await asyncio.sleep(0.1)
