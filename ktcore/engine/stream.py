"""One answer as it comes: text pieces drawn as they are asked for, with its tokens and times."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from ktcore.engine.output import PLAIN, Output
from ktcore.engine.schedule.lookahead import PromptLookup
from ktcore.engine.schedule.pooling import Pool
from ktcore.engine.schedule.sequence import Chosen, Finish, Sequence
from ktcore.ops.sampling import SamplingParams
from ktcore.text.builder import TextBuilder

if TYPE_CHECKING:
    from ktcore.engine.model import Model
    from ktcore.engine.step.engine import Engine


@dataclass
class Stats:
    """Times of one generation: `prefill_s` until the first token was drawn, `decode_s` for all later ones.

    Attributes:
        cached_tokens: of the prompt's, those that the prefix cache had.
        guessed_tokens, right_tokens: next tokens that were guessed, and how many of the guesses were right.
    """

    prompt_tokens: int = 0
    cached_tokens: int = 0
    new_tokens: int = 0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    guessed_tokens: int = 0
    right_tokens: int = 0

    @property
    def prefill_tok_s(self) -> float:
        """Prompt tokens a second."""
        return self.prompt_tokens / self.prefill_s if self.prefill_s else 0.0

    @property
    def decode_tok_s(self) -> float:
        """Drawn tokens a second, the first left out (prefill drew it)."""
        return (self.new_tokens - 1) / self.decode_s if self.decode_s and self.new_tokens > 1 else 0.0


class TextStream:
    """Text pieces of one answer, drawn as they are asked for. Closing it, or leaving the loop, ends the answer.

    Attributes:
        stats: tokens and times, complete when the stream has ended.
    """

    def __init__(
        self,
        model: Model,
        ids: list[int],
        max_new_tokens: int,
        params: SamplingParams,
        stop: tuple[str, ...],
        output: Output = PLAIN,
        user: str = "",
    ) -> None:
        self.stats = Stats(prompt_tokens=len(ids))
        self._model = model
        ends = output.ends(model.tokenizer.stop_ids)
        guide = None if output.structure is None else output.structure.begin()
        pool = None if output.pool is None else Pool(output.pool)
        self._sequence = Sequence(
            ids,
            params,
            0 if pool else max_new_tokens,
            ends,
            all_logits=pool is not None,
            pool=pool,
            top_logprobs=output.logprobs,
            guide=guide,
            user=user,
            **guessing(model.engine, output),
        )
        self._text = TextBuilder(model.tokenizer, stop, output.shown)
        self._pieces: list[str] = []
        self._shown = 0
        self._chosen: deque[Chosen] = deque()
        self._seen = 0
        self._clock = 0.0
        self._flushed = False

    @property
    def active(self) -> bool:
        """Whether more tokens may come."""
        return self._sequence.finish is None

    @property
    def finish(self) -> Finish | None:
        """Why it ended; None while it runs."""
        return self._sequence.finish

    @property
    def ids(self) -> list[int]:
        """The new token ids that were looked at so far, the one that ended the answer included."""
        return self._sequence.new_tokens[: self._seen]

    @property
    def pooled(self) -> torch.Tensor | None:
        """The vector of a prompt that ended, where one is wanted: float32 [hidden] of unit length."""
        pool = self._sequence.pool
        return None if pool is None or self.finish is not Finish.LENGTH else pool.vector()

    @property
    def error(self) -> Exception | None:
        """What ended it early, if that was its own fault."""
        return self._sequence.error

    def check(self) -> None:
        """Refuse a prompt that can never run, before it is queued.

        Raises:
            RequestError: it is empty or does not fit into the context.
        """
        self._model.engine.check(self._sequence)

    def begin(self) -> None:
        """Hand the sequence to the engine."""
        self._clock = time.perf_counter()
        self._model.engine.add(self._sequence)

    def collect(self) -> None:
        """Turn tokens that the engine has drawn since into text, and notice stop strings."""
        for token in self._sequence.new_tokens[self._seen :]:
            self._seen += 1
            self._note_time()
            if token in self._sequence.stop_ids:
                break
            if self._sequence.chosen:
                self._chosen.append(replace(self._sequence.chosen[self._seen - 1], offset=self._text.received))
            piece = self._text.push(token)
            if piece:
                self._pieces.append(piece)
            if self._text.stopped:
                self._model.engine.cancel(self._sequence)
                self._sequence.finish = Finish.STOP
                break

    def drain(self) -> list[str]:
        """Pieces that are ready; with the end of the answer also what was held back."""
        if not self.active and not self._flushed:
            self._flushed = True
            rest = self._text.flush()
            if rest:
                self._pieces.append(rest)
        pieces, self._pieces = self._pieces, []
        self._shown += sum(map(len, pieces))
        return pieces

    def drain_chosen(self) -> tuple[Chosen, ...]:
        """Tokens whose text `drain` has given away, where logprobs are wanted; none of a stop string's."""
        ended = self._flushed and not self._text.stopped
        ready = []
        while self._chosen and (ended or self._chosen[0].offset < self._shown):
            ready.append(self._chosen.popleft())
        return tuple(ready)

    def close(self) -> None:
        """End the answer early and free its pages."""
        self._model.engine.cancel(self._sequence)

    def __iter__(self) -> Iterator[str]:
        model = self._model
        try:
            model._begin((self,))
            while self.active and model._step((self,)):
                yield from self.drain()
            model._collect((self,))
            yield from self.drain()
            if self.error is not None:
                raise self.error
        finally:
            model._leave((self,))

    def _note_time(self) -> None:
        now = time.perf_counter()
        self.stats.new_tokens += 1
        self.stats.guessed_tokens, self.stats.right_tokens = self._sequence.guessed, self._sequence.right
        if self.stats.new_tokens == 1:
            self.stats.cached_tokens = self._sequence.prefix.reused or 0
            self.stats.prefill_s = now - self._clock
        else:
            self.stats.decode_s += now - self._clock
        self._clock = now


def guessing(engine: Engine, output: Output) -> dict[str, Any]:
    """What guesses next tokens of a sequence, as the output wants it: `lookup` and `drafts` of `Sequence`.

    Raises:
        RequestError: more drafts are wanted than the engine makes.
    """
    lookup = PromptLookup(output.prompt_lookup) if output.prompt_lookup else None
    return {"lookup": lookup, "drafts": None if output.pool else engine.drafts(output.draft)}
