"""Measures one loaded model: prefill and decode by the engine's own steps, and what a decode step has to read."""

from __future__ import annotations

import random
import resource
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from ktcore.errors import RequestError

if TYPE_CHECKING:
    from ktcore.backend.runtime import DeviceRuntime
    from ktcore.engine.model import Model
    from ktcore.engine.stream import Stats
    from ktcore.graph.node import Node
    from ktcore.rules.plan import Choice, Plan

WARM_UP = (32, 2)
"""Prompt and new tokens of the untimed run."""


@runtime_checkable
class ReadsMemory(Protocol):
    """A host runtime that can measure its memory; optional."""

    def read_bandwidth(self) -> float:
        """Bytes a second that its threads read from main memory, measured now."""
        ...


@dataclass(frozen=True)
class Round:
    """Tokens a second of one prompt and its answer."""

    prefill_tok_s: float
    decode_tok_s: float


class Timer:
    """Times generations of one model over the same random ids; the first, short and untimed, faults memory in.

    Raises:
        RequestError: the context does not hold `prompt` + `new` + 1 tokens.
    """

    def __init__(self, model: Model, prompt: int, new: int, seed: int = 0) -> None:
        if prompt + new + 1 > model.context:
            raise RequestError(
                f"{prompt} + {new} tokens do not fit into the context of {model.context}",
                f"give --context {prompt + new + 1}, or fewer tokens",
            )
        draw = random.Random(seed)
        self._model = model
        self._new = new
        self._ids = [draw.randrange(model.plan.graph.vocab) for _ in range(prompt)]
        _one_round(model, self._ids[: WARM_UP[0]], min(new, WARM_UP[1]))

    def round(self) -> Round:
        """Prefill is timed until the first token is drawn, decode over exactly `new` further ones: none ends it."""
        return _one_round(self._model, self._ids, self._new)


def median(rounds: list[Round]) -> Round:
    """The median of each figure."""
    import statistics

    return Round(statistics.median(r.prefill_tok_s for r in rounds), statistics.median(r.decode_tok_s for r in rounds))


def speeds(stats: Stats) -> str:
    """Of one answer, in words; a speed is told only where there was something to time."""
    kept = f", {stats.cached_tokens} of them kept from before," if stats.cached_tokens else ""
    said = f"prefill {tokens(stats.prompt_tokens)}{kept} at {stats.prefill_tok_s:.1f} tok/s"
    # prefill draws the first token: a speed of decode needs a second one
    if stats.new_tokens > 1 and stats.decode_s > 0:
        guesses = f", {stats.right_tokens} of {stats.guessed_tokens} guesses right" if stats.guessed_tokens else ""
        return f"{said}, decode {tokens(stats.new_tokens)} at {stats.decode_tok_s:.1f} tok/s{guesses}"
    return f"{said}, {tokens(stats.new_tokens)} drawn"


def acceptance(model: Model) -> dict[str, Any] | None:
    """What guessed next tokens of all answers so far, how many, and which share was right; None: nothing guessed."""
    for by, tally in model.engine.guesses.items():
        if tally.guessed:
            return {"by": by, "tokens": tally.guessed, "right": tally.right, "share": tally.right / tally.guessed}
    return None


def tokens(count: int) -> str:
    """So many tokens, in words."""
    return "1 token" if count == 1 else f"{count or 'no'} tokens"


def peak_memory() -> int:
    """Most bytes of memory that this process has had resident so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def decode_read_bytes(plan: Plan, devices: set[str]) -> int:
    """Weight bytes that one token reads on `devices`: all of the dense part, of the experts those that it is sent to.

    The KV cache, which grows with the context, is left out.
    """
    return round(sum(_read_by(choice) for choice in plan.choices.values() if choice.device in devices))


def host_runtime(model: Model) -> tuple[str, DeviceRuntime] | None:
    """The device of the plan that computes on the CPU, and its runtime."""
    for device in model.plan.devices:
        runtime = model.engine.model.devices.runtime(device)
        if runtime.device.type == "cpu":
            return device, runtime
    return None


def _one_round(model: Model, ids: list[int], new: int) -> Round:
    from ktcore.engine.schedule.sequence import Sequence
    from ktcore.ops.sampling import SamplingParams

    engine = model.engine
    greedy = SamplingParams(temperature=0)
    sequence = Sequence(list(ids), greedy, max_new_tokens=new + 1, drafts=engine.drafts(None))
    engine.add(sequence)
    try:
        began = time.perf_counter()
        while not sequence.new_tokens:
            engine.step()
        drawn = time.perf_counter()
        while len(sequence.new_tokens) <= new:
            engine.step()
        ended = time.perf_counter()
    finally:
        engine.cancel(sequence)
    return Round(_rate(len(ids), drawn - began), _rate(new, ended - drawn))


def _rate(count: int, seconds: float) -> float:
    """A second; a coarse clock may say that no time passed."""
    return count / max(seconds, time.get_clock_info("perf_counter").resolution)


def _read_by(choice: Choice) -> float:
    nodes = list(choice.node.walk()) if choice.implementation.fused else [choice.node]
    stored = sum(_own_bytes(node) for node in nodes)
    if not stored:
        return 0.0
    touched = sum(_own_bytes(node) * _share(node, choice) for node in nodes)
    # an implementation that packs nothing reads the file's own bytes
    return touched * (choice.packed_bytes / stored if choice.packed_bytes else 1.0)


def _own_bytes(node: Node) -> int:
    return sum(ref.nbytes for ref in node.weights.values())


def _share(node: Node, choice: Choice) -> float:
    """The part of a node's weights that one token reads."""
    from ktcore.ops.embedding import EmbeddingSpec
    from ktcore.ops.moe import ExpertsSpec

    spec = node.spec
    if isinstance(spec, EmbeddingSpec):
        return 1 / spec.vocab
    if isinstance(spec, ExpertsSpec):
        most = choice.experts.keep if choice.experts is not None and choice.experts.keep else spec.top_k
        return min(most, spec.top_k) / spec.experts
    return 1.0
