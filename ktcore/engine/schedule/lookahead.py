"""Guesses of the next tokens by prompt lookup: what followed the last tokens when they came up before.

After "Prompt Lookup Decoding" (Saxena, 2023, as in transformers' `prompt_lookup_num_tokens`). A guess is checked by the
model in the step that draws the next token: every place is drawn as it would be without the guess, and what follows a
token that was guessed wrong is thrown away. So answers are those without guesses, token for token, at any temperature.
"""

from __future__ import annotations

NGRAMS = (3, 2)


class PromptLookup:
    """Guesses for one sequence.

    Args:
        most: tokens guessed at once, where guesses prove right.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self._width = most
        self._seen = 0
        self._after: list[dict[tuple[int, ...], int]] = [{} for _ in NGRAMS]

    def guess(self, tokens: list[int], most: int) -> list[int]:
        """At most `most` tokens that may follow `tokens`, which have only grown since the last call."""
        self._index(tokens)
        for n, after in zip(NGRAMS, self._after, strict=True):
            at = after.get(tuple(tokens[-n:]))
            if at is not None:
                return tokens[at : at + min(self._width, most)]
        return []

    def learn(self, guessed: int, right: int) -> None:
        """Note how many of the guessed tokens were right: the next guess is shorter or longer for it."""
        if guessed:
            self._width = min(self.most, max(1, right + (2 if right == guessed else 1)))

    def _index(self, tokens: list[int]) -> None:
        # the last n-gram is what is looked up: it must not find itself
        for end in range(self._seen, len(tokens)):
            for n, after in zip(NGRAMS, self._after, strict=True):
                if end >= n:
                    after[tuple(tokens[end - n : end])] = end
        self._seen = len(tokens)
