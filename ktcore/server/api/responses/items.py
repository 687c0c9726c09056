"""Builds a response of the Responses API item by item, and the events that tell how it grows."""

from __future__ import annotations

import copy
import time
import uuid
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel

from ktcore.dialects.base import Call
from ktcore.dialects.dialect import Part
from ktcore.engine.schedule.sequence import Finish
from ktcore.engine.stream import Stats
from ktcore.server.api.chat import Prompt, call_id
from ktcore.server.api.custom_tools import text_of_call
from ktcore.server.api.responses.schemas import ResponsesAsk
from ktcore.server.http.errors import Problem, dumps

Event = dict[str, Any]


def event(body: Event, number: int) -> str:
    """A server-sent event under its name."""
    return f"event: {body['type']}\ndata: {dumps({**body, 'sequence_number': number})}\n\n"


class Building:
    """One response.

    Attributes:
        body: the response object as it is so far.
    """

    def __init__(self, model: str, ask: ResponsesAsk, prompt: Prompt) -> None:
        self._ask = ask
        self._dialect = prompt.dialect
        self._tokenizer = prompt.tokenizer
        given = ask.model_dump(by_alias=True, exclude_none=True)
        self.body: dict[str, Any] = {
            "id": _id("resp"),
            "object": "response",
            "created_at": int(time.time()),
            "status": "in_progress",
            "error": None,
            "incomplete_details": None,
            "instructions": ask.instructions,
            "max_output_tokens": ask.max_output_tokens,
            "metadata": ask.metadata or {},
            "model": model,
            "output": [],
            "parallel_tool_calls": ask.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {"effort": ask.reasoning.effort if ask.reasoning else None, "summary": None},
            "store": False,
            "temperature": 1.0 if ask.temperature is None else ask.temperature,
            "text": {"format": given.get("text", {}).get("format") or {"type": "text"}},
            "tool_choice": given.get("tool_choice", "auto"),
            "tools": [_told(tool) for tool in ask.offered],
            "top_p": 1.0 if ask.top_p is None else ask.top_p,
            "truncation": "disabled",
            "usage": None,
        }
        self._open: dict[str, Any] | None = None

    def opening(self) -> Iterator[Event]:
        """The first events."""
        yield {"type": "response.created", "response": copy.deepcopy(self.body)}
        yield {"type": "response.in_progress", "response": copy.deepcopy(self.body)}

    def add(self, part: Part) -> Iterator[Event]:
        """More of the answer."""
        if part.reasoning:
            yield from self._text("reasoning", part.reasoning)
        if part.content:
            yield from self._text("message", part.content)
        for call in part.calls:
            yield from self._close()
            yield from self._call(call)

    def end(self, finish: Finish, stats: Stats) -> Iterator[Event]:
        """The last events."""
        whole, cancelled = finish is Finish.STOP, finish is Finish.CANCELLED
        yield from self._close("completed" if whole else "incomplete")
        self.body["status"] = "completed" if whole else "cancelled" if cancelled else "incomplete"
        self.body["incomplete_details"] = None if whole or cancelled else {"reason": "max_output_tokens"}
        self.body["usage"] = {
            "input_tokens": stats.prompt_tokens,
            # what a hosted service bills as written to its cache; clients with types want the field
            "input_tokens_details": {"cached_tokens": stats.cached_tokens, "cache_write_tokens": 0},
            "output_tokens": stats.new_tokens,
            "output_tokens_details": {"reasoning_tokens": min(self._thought_tokens(), stats.new_tokens)},
            "total_tokens": stats.prompt_tokens + stats.new_tokens,
        }
        # the API has no event of its own for what was cancelled
        yield {"type": f"response.{'completed' if whole else 'incomplete'}", "response": copy.deepcopy(self.body)}

    def fail(self, problem: Problem) -> Iterator[Event]:
        """The last events of a stream whose status is sent already: the error, and the response as far as it came."""
        yield {"type": "error", "code": problem.code, "message": problem.message, "param": problem.param}
        if self._open is not None:
            self._open["status"] = "incomplete"
        self.body["status"] = "failed"
        # the API has a closed list of codes here; these two say whose fault it is
        code = "server_error" if problem.status >= 500 else "invalid_prompt"
        self.body["error"] = {"code": code, "message": problem.message}
        yield {"type": "response.failed", "response": copy.deepcopy(self.body)}

    def _thought_tokens(self) -> int:
        """Tokens of the thoughts' text, without the marks around it."""
        thoughts = [item["content"][0]["text"] for item in self.body["output"] if item["type"] == "reasoning"]
        return sum(len(self._tokenizer.encode(text, add_special=False)) for text in thoughts)

    def _text(self, kind: str, text: str) -> Iterator[Event]:
        if self._open is None or self._open["type"] != kind:
            yield from self._close()
            yield from self._begin(kind)
        assert self._open is not None
        self._open["content"][0]["text"] += text
        name = "output_text" if kind == "message" else "reasoning_text"
        more: dict[str, Any] = {"logprobs": []} if kind == "message" else {}
        yield {"type": f"response.{name}.delta", **self._place(), "content_index": 0, "delta": text, **more}

    def _begin(self, kind: str) -> Iterator[Event]:
        if kind == "message":
            item: dict[str, Any] = {"id": _id("msg"), "type": "message", "status": "in_progress", "role": "assistant"}
            piece: dict[str, Any] = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        else:
            item = {"id": _id("rs"), "type": "reasoning", "status": "in_progress", "summary": []}
            piece = {"type": "reasoning_text", "text": ""}
        item["content"] = []
        yield self._added(item)
        item["content"] = [piece]
        self._open = item
        yield {"type": "response.content_part.added", **self._place(), "content_index": 0, "part": dict(piece)}

    def _close(self, status: str = "completed") -> Iterator[Event]:
        item, place = self._open, self._place()
        if item is None:
            return
        (piece,) = item["content"]
        name = "output_text" if item["type"] == "message" else "reasoning_text"
        more: dict[str, Any] = {"logprobs": []} if item["type"] == "message" else {}
        item["status"] = status
        yield {"type": f"response.{name}.done", **place, "content_index": 0, "text": piece["text"], **more}
        yield {"type": "response.content_part.done", **place, "content_index": 0, "part": dict(piece)}
        yield self._done(item)
        self._open = None

    def _call(self, call: Call) -> Iterator[Event]:
        namespace, name, custom = self._ask.called(call.name)
        if custom:
            yield from self._custom_call(call)
            return
        item = {
            "id": _id("fc"),
            "type": "function_call",
            "status": "in_progress",
            "call_id": call_id(self._dialect, call),
            "name": name,
            "arguments": "",
            **({"namespace": namespace} if namespace else {}),
        }
        yield self._added(item)
        place = {"item_id": item["id"], "output_index": len(self.body["output"]) - 1}
        item["arguments"], item["status"] = call.arguments, "completed"
        yield {"type": "response.function_call_arguments.delta", **place, "delta": call.arguments}
        yield {
            "type": "response.function_call_arguments.done",
            **place,
            "name": name,
            "arguments": call.arguments,
        }
        yield self._done(item)

    def _custom_call(self, call: Call) -> Iterator[Event]:
        """A call of a tool that takes text; arguments that hold none are its text as they are."""
        item = {
            "id": _id("ctc"),
            "type": "custom_tool_call",
            "status": "in_progress",
            "call_id": call_id(self._dialect, call),
            "name": call.name,
            "input": "",
        }
        yield self._added(item)
        place = {"item_id": item["id"], "output_index": len(self.body["output"]) - 1}
        item["input"], item["status"] = text_of_call(call.arguments), "completed"
        yield {"type": "response.custom_tool_call_input.delta", **place, "delta": item["input"]}
        yield {"type": "response.custom_tool_call_input.done", **place, "input": item["input"]}
        yield self._done(item)

    def _place(self) -> dict[str, Any]:
        return (
            {}
            if self._open is None
            else {
                "item_id": self._open["id"],
                "output_index": len(self.body["output"]) - 1,
            }
        )

    def _added(self, item: dict[str, Any]) -> Event:
        self.body["output"].append(item)
        return self._item("response.output_item.added", item)

    def _done(self, item: dict[str, Any]) -> Event:
        return self._item("response.output_item.done", item)

    def _item(self, kind: str, item: dict[str, Any]) -> Event:
        return {"type": kind, "output_index": len(self.body["output"]) - 1, "item": copy.deepcopy(item)}


def _told(tool: BaseModel) -> dict[str, Any]:
    """A tool as the answer lists it."""
    given = tool.model_dump(exclude_none=True)
    return {"parameters": {}, "strict": False, **given} if given["type"] == "function" else given


def _id(kind: str) -> str:
    return f"{kind}_{uuid.uuid4().hex}"
