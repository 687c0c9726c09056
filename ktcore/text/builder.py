"""From token ids to text pieces: decodes as tokens come, and ends at stop strings without showing any part of them."""

from __future__ import annotations

from collections.abc import Sequence as Seq

from ktcore.text.tokenizer import Tokenizer


class TextBuilder:
    """Feeds drawn tokens through the tokenizer's stream decoder and watches for stop strings.

    Text that could still become a stop string is held back until that is settled.

    Args:
        shown: control tokens whose spelling belongs to the text.

    Attributes:
        received: characters of the tokens so far, those of a stop string included.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Seq[str], shown: frozenset[int] = frozenset()) -> None:
        self._decoder = tokenizer.stream_decoder(shown=shown)
        self._stop = tuple(s for s in stop if s)
        self._held = ""
        self.stopped = False
        self.received = 0

    def push(self, token: int) -> str:
        """The text that is certain after this token, possibly none."""
        return self._settle(self._decoder.push(token))

    def flush(self) -> str:
        """What is left at the end of the answer."""
        piece = self._settle(self._decoder.flush())
        if self.stopped:
            return piece
        held, self._held = self._held, ""
        return piece + held

    def _settle(self, piece: str) -> str:
        self.received += len(piece)
        if self.stopped:
            return ""
        text = self._held + piece
        found = [at for at in (text.find(s) for s in self._stop) if at >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = self._could_begin_stop(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def _could_begin_stop(self, text: str) -> int:
        """Length of the longest end of `text` with which a stop string begins."""
        longest = max((len(s) - 1 for s in self._stop), default=0)
        for size in range(min(longest, len(text)), 0, -1):
            if any(s.startswith(text[-size:]) for s in self._stop):
                return size
        return 0
