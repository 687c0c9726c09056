"""What a request wants of its answer besides text: when it ends, and what is told about its tokens."""

from __future__ import annotations

from dataclasses import dataclass

from ktcore.text.guides import Structure


@dataclass(frozen=True)
class Output:
    """Attributes:
    stop_ids: further token ids that end the answer.
    ignore_eos: go on past the model's own end tokens.
    logprobs: tell each token's logprob, and those of so many of the likeliest; None tells nothing.
    structure: the form that the answer must have.
    pool: give no text but a vector of the prompt, its hidden states pooled so: "mean" or "last".
    shown: control tokens that belong to the text, because something is read from them.
    prompt_lookup: most next tokens to guess from the text so far (`ktcore.engine.schedule.lookahead`); 0 guesses
        nothing, None leaves it to the server.
    draft: most tokens that the model's drafter guesses at once; 0 none, None as many as it was loaded for.
    """

    stop_ids: frozenset[int] = frozenset()
    ignore_eos: bool = False
    logprobs: int | None = None
    structure: Structure | None = None
    pool: str | None = None
    shown: frozenset[int] = frozenset()
    prompt_lookup: int | None = None
    draft: int | None = None

    def ends(self, own: frozenset[int]) -> frozenset[int]:
        """The ids that end the answer, of a model that has its `own`."""
        return self.stop_ids if self.ignore_eos else self.stop_ids | own


PLAIN = Output()
"""Text alone, until the model ends it."""
