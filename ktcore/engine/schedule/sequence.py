"""A sequence: one prompt and its growing answer, with the pages that hold its keys and values."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

import torch

from ktcore.engine.prefix.state import PrefixState
from ktcore.engine.schedule.drafts import Drafts
from ktcore.engine.schedule.lookahead import PromptLookup
from ktcore.engine.schedule.pooling import Pool
from ktcore.ops.sampling import SamplingParams
from ktcore.text.guides import Guide


class Finish(Enum):
    """Why a sequence ended."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"


@dataclass(frozen=True)
class Chosen:
    """A drawn token beside what the model thought of it, before biases, penalties and temperature.

    Attributes:
        logprob: natural logarithm of its probability.
        top: (token, logprob) of the likeliest tokens, in falling order.
        offset: characters of the answer before the token's own, once text is made of it.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    offset: int = 0


@dataclass(eq=False)
class Sequence:
    """State of one request inside the engine.

    Attributes:
        tokens: prompt and answer so far.
        prompt_len: how many of them are the prompt.
        cached: how many of them have keys and values in the cache.
        pages: the pages it owns, in order of position.
        state_slot: its place in the recurrent states, while it runs in a model that has some.
        stop_ids: drawing one of these ends the sequence; it is kept as the last token.
        all_logits: keep logits of every position (for `logits`), not only of the last, or with a `pool` hidden states.
        pool: takes hidden states in place of logits.
        guide: decides which tokens may come next, where the answer has a form.
        error: why it ended early, if by its own fault.
        top_logprobs: how many of the likeliest tokens to note in `chosen` at each place; None notes nothing.
        user: whose it is, for fairness.
        lookup: guesses next tokens, where the request allows it.
        drafts: what a drafter proposes, where the request allows it.
        kept: how many of its tokens a drafting model has keys and values of.
        guessed, right: tokens that were guessed so far, and how many of them were right.
        by_drafter: the last guesses were its drafter's.
        spare_slot: a copy of its recurrent states from before the guesses that are being checked.
        rewound: its states are those before a wrong guess: the tokens since then run again, with the next step.
        arrival: its number in the order of arrival, as the scheduler gave it.
        preempted: how often it had to make room for others.
    """

    tokens: list[int]
    params: SamplingParams
    max_new_tokens: int
    stop_ids: frozenset[int] = frozenset()
    all_logits: bool = False
    prompt_len: int = 0
    cached: int = 0
    pages: list[int] = field(default_factory=list)
    state_slot: int | None = None
    finish: Finish | None = None
    generator: torch.Generator | None = None
    logits: list[torch.Tensor] = field(default_factory=list)
    guide: Guide | None = None
    error: Exception | None = None
    pool: Pool | None = None
    top_logprobs: int | None = None
    chosen: list[Chosen] = field(default_factory=list)
    user: str = ""
    lookup: PromptLookup | None = None
    drafts: Drafts | None = None
    kept: int = 0
    guessed: int = 0
    right: int = 0
    by_drafter: bool = False
    spare_slot: int | None = None
    rewound: bool = False
    arrival: int = 0
    preempted: int = 0
    prefix: PrefixState = field(default_factory=PrefixState)

    def __post_init__(self) -> None:
        self.prompt_len = len(self.tokens)
        if self.params.temperature > 0:
            self.generator = torch.Generator()
            if self.params.seed is None:
                self.generator.seed()
            else:
                self.generator.manual_seed(self.params.seed)

    @property
    def pending(self) -> int:
        """Tokens that are not in the cache yet: the rest of the prompt, or the one drawn last."""
        return len(self.tokens) - self.cached

    @property
    def decodes(self) -> bool:
        """Whether only its last token is left to run, behind others, to give the next one; with the few before it where
        a wrong guess has cost its states."""
        return (self.pending == 1 or self.rewound) and self.cached > 0 and not self.all_logits

    @property
    def new_tokens(self) -> list[int]:
        """The answer so far."""
        return self.tokens[self.prompt_len :]

    @property
    def longest(self) -> int:
        """Most tokens that it can ever hold in the cache."""
        return self.prompt_len + self.max_new_tokens

    def guess(self, most: int) -> list[int]:
        """At most `most` tokens that may come next: what came before, or else what a drafter says."""
        found = self.lookup.guess(self.tokens, most) if self.lookup is not None else []
        self.by_drafter = not found and self.drafts is not None
        if not found and self.drafts is not None:
            found = self.drafts.guess(self.tokens, most)
        return found

    def learn(self, guessed: int, right: int) -> None:
        """Note how many of the last guesses were right."""
        self.guessed += guessed
        self.right += right
        if self.lookup is not None and not self.by_drafter:
            self.lookup.learn(guessed, right)

    def fail(self, error: Exception) -> None:
        """End it with an error of its own."""
        self.error = error
        self.finish = Finish.CANCELLED

    def append(self, token: int) -> None:
        """Add a drawn token and notice the end."""
        self.tokens.append(token)
        if token in self.stop_ids:
            self.finish = Finish.STOP
        elif len(self.tokens) >= self.longest:
            self.finish = Finish.LENGTH
