"""Answers of the OpenAI API, whole and in pieces."""

from __future__ import annotations

import time
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator
from collections.abc import Sequence as Seq
from typing import Any

from ktcore.dialects.base import Call
from ktcore.dialects.dialect import Part
from ktcore.engine.schedule.sequence import Chosen, Finish
from ktcore.engine.stream import Stats
from ktcore.server.api.chat import Prompt, call_id
from ktcore.server.api.custom_tools import text_of_call
from ktcore.server.api.logprobs import chat_logprobs, plain_logprobs
from ktcore.server.http.errors import dumps
from ktcore.server.models.answers import Answer

_REASONS = {Finish.STOP: "stop", Finish.LENGTH: "length", Finish.CANCELLED: "stop"}
DONE = "data: [DONE]\n\n"


def event(body: Any) -> str:
    """One server-sent event."""
    return f"data: {dumps(body)}\n\n"


def usage(stats: Iterable[Stats], choices: int) -> dict[str, Any]:
    """Counts of all answers; a prompt with several choices counts once.

    Args:
        stats: of every answer, the choices of a prompt next to each other.
        choices: how many each prompt has.
    """
    every = list(stats)
    prompt = sum(s.prompt_tokens for s in every[::choices])
    new = sum(s.new_tokens for s in every)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": new,
        "total_tokens": prompt + new,
        "prompt_tokens_details": {"cached_tokens": sum(s.cached_tokens for s in every[::choices])},
    }


def _reason(finish: Finish, called: bool) -> str:
    return "tool_calls" if called and finish is Finish.STOP else _REASONS[finish]


class Reply:
    """Builds the objects of one answer.

    Args:
        chat: or a completion, whose objects have another shape.
        counted: whether a stream ends with its usage.
        custom: names of the tools whose calls are told as text.
    """

    def __init__(
        self, model: str, chat: bool, prompt: Prompt, counted: bool = False, custom: frozenset[str] = frozenset()
    ) -> None:
        self._chat = chat
        self._custom = custom
        # a stream that ends with its usage says null in every piece before (OpenAI's API reference)
        self._uncounted = {"usage": None} if counted else {}
        self._prompt = prompt
        self._calls: Counter[int] = Counter()
        self._base = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
        }

    def whole(self, answers: list[Answer], choices: int) -> dict[str, Any]:
        """The complete answer."""
        made = []
        for i, answer in enumerate(answers):
            said: dict[str, Any] = {"message": self._message(answer)} if self._chat else {"text": answer.content}
            logprobs = self._logprobs(answer.chosen)
            reason = _reason(answer.finish, bool(answer.calls))
            made.append({"index": i, **said, "logprobs": logprobs, "finish_reason": reason})
        kind = "chat.completion" if self._chat else "text_completion"
        return {**self._base, "object": kind, "choices": made, "usage": usage((a.stats for a in answers), choices)}

    def opening(self, index: int) -> dict[str, Any]:
        """A choice's first piece: in a chat who speaks, in a completion no text yet."""
        return self._piece([self._choice(index, {"role": "assistant", "content": ""} if self._chat else "", None)])

    def pieces(self, index: int, part: Part, chosen: Seq[Chosen] = ()) -> Iterator[dict[str, Any]]:
        """More of one choice: thoughts, text and calls, each in a piece of its own."""
        said: list[Any] = [{"reasoning_content": part.reasoning}] if part.reasoning else []
        # tokens of what is no text yet still have their logprobs
        if part.content or (chosen and not said):
            said.append({"content": part.content} if self._chat else part.content)
        for call in part.calls:
            place = {"index": self._calls[index]}
            self._calls[index] += 1
            kind, key, given = self._given(call)
            head = {**self._call(call), kind: {"name": call.name, key: ""}}
            said.append({"tool_calls": [{**place, **head}]})
            said.append({"tool_calls": [{**place, kind: {key: given}}]})
        for i, each in enumerate(said):
            choice = self._choice(index, each, None)
            yield self._piece([{**choice, "logprobs": self._logprobs(chosen)} if i == 0 else choice])

    def end(self, index: int, finish: Finish) -> dict[str, Any]:
        """The end of one choice."""
        reason = _reason(finish, self._calls[index] > 0)
        return self._piece([self._choice(index, {} if self._chat else "", reason)])

    def counts(self, stats: Iterable[Stats], choices: int) -> dict[str, Any]:
        """The last piece, where it was asked for: no choices, and the usage of all."""
        return {**self._piece([]), "usage": usage(stats, choices)}

    def _message(self, answer: Answer) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": answer.content}
        if answer.reasoning:
            message["reasoning_content"] = answer.reasoning
        if answer.calls:
            message["content"] = answer.content or None
            message["tool_calls"] = [self._call(call) for call in answer.calls]
        return message

    def _call(self, call: Call) -> dict[str, Any]:
        kind, key, given = self._given(call)
        return {"id": call_id(self._prompt.dialect, call), "type": kind, kind: {"name": call.name, key: given}}

    def _given(self, call: Call) -> tuple[str, str, str]:
        """(kind of the tool, the key of what it is given, what it is given)."""
        if call.name in self._custom:
            return "custom", "input", text_of_call(call.arguments)
        return "function", "arguments", call.arguments

    def _logprobs(self, chosen: Seq[Chosen]) -> dict[str, Any] | None:
        if not chosen:
            return None
        return (chat_logprobs if self._chat else plain_logprobs)(self._prompt.tokenizer, chosen)

    def _choice(self, index: int, said: Any, reason: str | None) -> dict[str, Any]:
        return {"index": index, "delta" if self._chat else "text": said, "logprobs": None, "finish_reason": reason}

    def _piece(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self._chat else "text_completion"
        return {**self._base, "object": kind, "choices": choices, **self._uncounted}
