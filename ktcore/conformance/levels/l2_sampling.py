"""Sampling: greedy is the largest, and draws follow the distribution that float64 gives."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from functools import partial

import numpy as np
import torch

from ktcore.conformance.case import Case, Check, Context
from ktcore.errors import LogitsError
from ktcore.ops import SamplingParams, SamplingSpec

VOCAB = 40
DRAWS = 1500
LIKELY = (7, 7, 9)
"""Tokens of the answer that are likely, so that a penalty of them shows."""
PROMPT = 2
"""Tokens of what was seen that are the prompt."""
DEVIATIONS = 5.0
"""Standard deviations by which a count may differ from what is expected."""


def cases() -> list[Case]:
    """Each parameter by itself, and together."""
    drawn = {
        "temperature": SamplingParams(temperature=0.8),
        "hot": SamplingParams(temperature=2.0),
        "top-k": SamplingParams(temperature=1.0, top_k=5),
        "top-p": SamplingParams(temperature=1.0, top_p=0.7),
        "min-p": SamplingParams(temperature=1.0, min_p=0.2),
        "penalty": SamplingParams(temperature=1.0, repetition_penalty=1.8),
        "typical-p": SamplingParams(temperature=1.0, typical_p=0.6),
        "presence": SamplingParams(temperature=1.0, presence_penalty=2.0),
        "frequency": SamplingParams(temperature=1.0, frequency_penalty=1.5),
        "logit-bias": SamplingParams(temperature=1.0, logit_bias={5: 3.0, 30: -100.0}),
        "all-together": SamplingParams(0.9, top_k=12, top_p=0.9, min_p=0.02, repetition_penalty=1.2),
    }
    found = [_case(name, "draws follow the distribution", partial(_draws, params)) for name, params in drawn.items()]
    return [
        _case("greedy", "temperature 0 takes the largest", _greedy),
        _case("greedy-penalty", "a penalty can change the largest", _greedy_penalty),
        _case("large-vocabulary", "the largest of 151936", _large),
        *found,
        _case("not-a-number", "logits that are not numbers are refused, and the next row is drawn as ever", _nan),
        _case("same-seed", "the same generator state gives the same tokens", _same_seed),
    ]


def _case(name: str, about: str, run: Check) -> Case:
    return Case(f"L2.sampling.{name}", 2, "sampling", about, run)


def _greedy(ctx: Context) -> None:
    for sample in _samplers(ctx, VOCAB):
        for row in range(20):
            logits = _logits(ctx, VOCAB, str(row))
            got = sample(logits, SamplingParams(temperature=0), [], None)
            ctx.require(int(got) == int(logits.argmax()), f"took {int(got)}, the largest is {int(logits.argmax())}")


def _greedy_penalty(ctx: Context) -> None:
    logits = torch.full((VOCAB,), -3.0)
    logits[7], logits[9] = 2.0, 1.5
    for sample in _samplers(ctx, VOCAB):
        got = int(sample(logits, SamplingParams(temperature=0, repetition_penalty=1.5), [7, 7, 1], None))
        ctx.require(got == 9, f"took {got}: token 7 was seen, 2.0 / 1.5 is below token 9's 1.5")


def _large(ctx: Context) -> None:
    logits = _logits(ctx, 151936, "")
    logits[151935] = 20.0
    for sample in _samplers(ctx, 151936):
        got = int(sample(logits, SamplingParams(temperature=0), [], None))
        ctx.require(got == 151935, f"took {got}, the largest is the last")


def _draws(params: SamplingParams, ctx: Context) -> None:
    logits, seen = _logits(ctx, VOCAB, ""), [1, 2, 3, 2, *LIKELY]
    logits[list(LIKELY)] = 2.5
    expected = _distribution(logits, params, seen)
    for sample in _samplers(ctx, VOCAB):
        generator = _generator(ctx, 1)
        counts = Counter(int(sample(logits, params, seen, generator, PROMPT)) for _ in range(DRAWS))
        for token, p in enumerate(expected):
            if p == 0:
                ctx.require(counts[token] == 0, f"token {token} was drawn, but is cut off")
                continue
            off = abs(counts[token] - DRAWS * p) / max(np.sqrt(DRAWS * p * (1 - p)), 1.0)
            ctx.require(off < DEVIATIONS, f"token {token} was drawn {counts[token]} times, expected {DRAWS * p:.0f}")


def _same_seed(ctx: Context) -> None:
    logits, params = _logits(ctx, VOCAB, ""), SamplingParams(temperature=1.0, top_p=0.95)
    for sample in _samplers(ctx, VOCAB):
        runs = []
        for seed in (1, 1, 2):
            generator = _generator(ctx, seed)
            runs.append([int(sample(logits, params, [], generator)) for _ in range(30)])
        ctx.require(runs[0] == runs[1], "two runs of one seed differ")
        ctx.require(runs[0] != runs[2], "two seeds give the same tokens")


def _nan(ctx: Context) -> None:
    """One value, a whole row, or infinity, in each way of drawing. Grammars mask with -inf, which is none of these."""
    good = _logits(ctx, VOCAB, "good")
    good[:20] = -math.inf
    rows = {"a NaN": good.clone(), "nothing but NaN": torch.full((VOCAB,), math.nan), "Inf": good.clone()}
    rows["a NaN"][30], rows["Inf"][30] = math.nan, math.inf
    rows["nothing but -inf"] = torch.full((VOCAB,), -math.inf)
    ways = {
        "greedy": SamplingParams(temperature=0),
        "temperature": SamplingParams(temperature=1.0),
        "top-k": SamplingParams(temperature=1.0, top_k=5),
        "top-p": SamplingParams(temperature=1.0, top_p=0.9),
        "min-p": SamplingParams(temperature=1.0, min_p=0.1),
        "typical-p": SamplingParams(temperature=1.0, typical_p=0.9),
        "penalty": SamplingParams(temperature=1.0, repetition_penalty=1.3, presence_penalty=0.5),
    }
    for sample in _samplers(ctx, VOCAB):
        for way, params in ways.items():
            for what, row in rows.items():
                generator, apart = _generator(ctx, 1), _generator(ctx, 1)
                try:
                    got = int(sample(row, params, [25, 30], generator))
                except LogitsError:
                    pass
                else:
                    ctx.fail(f"{way}: took {got} of logits that hold {what}, instead of refusing them (LogitsError)")
                got, expected = (int(sample(good, params, [25, 30], g)) for g in (generator, apart))
                ctx.require(20 <= got < VOCAB, f"{way}: after {what} it took {got}, which is masked")
                same = params.temperature > 0 or got == expected
                ctx.require(same, f"{way}: after {what} it took {got}, not {expected}")


def _samplers(ctx: Context, vocab: int) -> list[Callable[..., int]]:
    loaded = ctx.target.load(ctx, SamplingSpec(vocab), {})
    # without an implementation of its own a device's logits are sampled on the host
    return [one.module if one.id.startswith("reference.") else partial(_sample, ctx, one.module) for one in loaded]


def _sample(ctx: Context, module: object, logits: torch.Tensor, *rest: object) -> int:
    return int(ctx.target.call(module, logits, *rest))


def _generator(ctx: Context, seed: int) -> torch.Generator:
    own = any(i.spec_type is SamplingSpec for i in ctx.target.implementations)
    generator = torch.Generator(device=ctx.target.runtime.device if own else "cpu")
    generator.manual_seed(int(ctx.rng(f"generator {seed}").integers(2**31)))
    return generator


def _logits(ctx: Context, vocab: int, what: str) -> torch.Tensor:
    return torch.from_numpy(ctx.rng(f"logits {what}").standard_normal(vocab).astype(np.float32) * 2)


def _distribution(logits: torch.Tensor, params: SamplingParams, seen: list[int]) -> np.ndarray:
    """Probabilities by the filters' definitions, one after the other, each renormalised."""
    z = logits.double().numpy().copy()
    for token, amount in params.logit_bias.items():
        z[token] += amount
    for token in set(seen):
        z[token] = z[token] / params.repetition_penalty if z[token] > 0 else z[token] * params.repetition_penalty
    for token, count in Counter(seen[PROMPT:]).items():
        z[token] -= params.presence_penalty + count * params.frequency_penalty
    p = np.exp(z / params.temperature)
    p /= p.sum()
    order = np.argsort(-p, kind="stable")
    keep = np.ones(len(p), dtype=bool)
    if params.top_k:
        keep[order[params.top_k :]] = False
        p = np.where(keep, p, 0) / p[keep].sum()
    if params.top_p < 1:
        before = np.cumsum(p[order]) - p[order]
        p[order[before >= params.top_p]] = 0
        p /= p.sum()
    if params.min_p:
        p[p < params.min_p * p.max()] = 0
        p /= p.sum()
    if params.typical_p < 1:
        p = _typical(p, params.typical_p)
    result: np.ndarray = p
    return result


def _typical(p: np.ndarray, mass: float) -> np.ndarray:
    """Meister et al., 2022: the tokens whose information is nearest to the mean one, until `mass` is reached."""
    held = np.flatnonzero(p)
    information = -np.log(p[held])
    mean = float((p[held] * information).sum())
    order = held[np.argsort(np.abs(information - mean), kind="stable")]
    before = np.cumsum(p[order]) - p[order]
    kept = np.where(np.isin(np.arange(len(p)), order[before < mass]), p, 0.0)
    result: np.ndarray = kept / kept.sum()
    return result
