"""Answers of the OpenAI API, whole and in pieces."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterable
from collections.abc import Sequence as Seq
from typing import Any

from ktcore.engine.model import Stats
from ktcore.engine.sequence import Chosen, Finish
from ktcore.engine.tokenizer import Tokenizer
from ktcore.server.answers import Answer
from ktcore.server.logprobs import chat_logprobs, plain_logprobs

_REASONS = {Finish.STOP: "stop", Finish.LENGTH: "length", Finish.CANCELLED: "stop"}
DONE = "data: [DONE]\n\n"


def event(body: Any) -> str:
    """One server-sent event."""
    return f"data: {json.dumps(body)}\n\n"


def usage(stats: Iterable[Stats], choices: int) -> dict[str, int]:
    """Counts of all answers; a prompt with several choices counts once.

    Args:
        stats: of every answer, the choices of a prompt next to each other.
        choices: how many each prompt has.
    """
    every = list(stats)
    prompt = sum(s.prompt_tokens for s in every[::choices])
    new = sum(s.new_tokens for s in every)
    return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}


class Reply:
    """Builds the objects of one answer: `chat` or not decides their shape."""

    def __init__(self, model: str, chat: bool, tokenizer: Tokenizer) -> None:
        self._chat = chat
        self._tokenizer = tokenizer
        self._base = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
        }

    def whole(self, answers: list[Answer], choices: int) -> dict[str, Any]:
        """The complete answer."""
        made = []
        for i, answer in enumerate(answers):
            said: dict[str, Any] = (
                {"message": {"role": "assistant", "content": answer.text}} if self._chat else {"text": answer.text}
            )
            logprobs = self._logprobs(answer.chosen)
            made.append({"index": i, **said, "logprobs": logprobs, "finish_reason": _REASONS[answer.finish]})
        kind = "chat.completion" if self._chat else "text_completion"
        return {**self._base, "object": kind, "choices": made, "usage": usage((a.stats for a in answers), choices)}

    def opening(self, index: int) -> dict[str, Any]:
        """A chat's first piece: who speaks."""
        return self._piece([self._choice(index, {"role": "assistant", "content": ""}, None)])

    def piece(self, index: int, text: str, chosen: Seq[Chosen] = ()) -> dict[str, Any]:
        """More text of one choice."""
        choice = self._choice(index, {"content": text} if self._chat else text, None)
        return self._piece([{**choice, "logprobs": self._logprobs(chosen)}])

    def end(self, index: int, finish: Finish) -> dict[str, Any]:
        """The end of one choice."""
        return self._piece([self._choice(index, {} if self._chat else "", _REASONS[finish])])

    def counts(self, stats: Iterable[Stats], choices: int) -> dict[str, Any]:
        """The last piece, where it was asked for: no choices, and the usage of all."""
        return {**self._piece([]), "usage": usage(stats, choices)}

    def _logprobs(self, chosen: Seq[Chosen]) -> dict[str, Any] | None:
        if not chosen:
            return None
        return (chat_logprobs if self._chat else plain_logprobs)(self._tokenizer, chosen)

    def _choice(self, index: int, said: Any, reason: str | None) -> dict[str, Any]:
        return {"index": index, "delta" if self._chat else "text": said, "logprobs": None, "finish_reason": reason}

    def _piece(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self._chat else "text_completion"
        return {**self._base, "object": kind, "choices": choices}
