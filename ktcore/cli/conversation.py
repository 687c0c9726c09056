"""The history of a chat, and how it is kept within the model's context."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

Message = dict[str, str]


@dataclass
class Conversation:
    """Messages in order, the system message apart from them."""

    system: str | None = None
    turns: list[Message] = field(default_factory=list)

    @property
    def messages(self) -> list[Message]:
        """All that the model is to see."""
        return ([{"role": "system", "content": self.system}] if self.system else []) + self.turns

    def add(self, role: str, content: str) -> None:
        """Append a message."""
        self.turns.append({"role": role, "content": content})

    def take_back(self) -> None:
        """Remove the last message, which led to nothing."""
        self.turns.pop()

    def clear(self) -> None:
        """Forget everything but the system message."""
        self.turns.clear()

    def shorten(self, count: Callable[[list[Message]], int], limit: int) -> int:
        """Drop the oldest turns, a question with its answer, until the rest has at most `limit` tokens.

        The last message always stays, even when it is too long alone.

        Args:
            count: tokens of messages as the model sees them.

        Returns:
            How many messages were dropped.
        """
        before = len(self.turns)
        while len(self.turns) > 1 and count(self.messages) > limit:
            self.turns.pop(0)
            # templates insist that a conversation begins with a question
            while len(self.turns) > 1 and self.turns[0]["role"] != "user":
                self.turns.pop(0)
        return before - len(self.turns)
