"""Asks whose answers are known: each holds a number of its own, and was answered alone before the load begins."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import httpx

_TEXT = "river stone lamp winter paper glass train music salt cloud garden letter bridge copper silence market"
WORDS = _TEXT.split()
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}, "kind": {"enum": ["a", "b"]}},
    "required": ["ok", "kind"],
    "additionalProperties": False,
}


@dataclass(frozen=True)
class Known:
    """A request, and what the server said when nothing else ran.

    Attributes:
        texts: of all choices.
        embedding: of the message's own text.
    """

    body: dict[str, Any]
    texts: tuple[str, ...]
    prompt_tokens: int
    new_tokens: int
    embedding: tuple[float, ...]

    @property
    def said(self) -> str:
        """The user's message."""
        return str(self.body["messages"][-1]["content"])

    def stop(self) -> tuple[str, str] | None:
        """(a text in the middle of the answer, what stands before it); None where there is none to be cut."""
        text = self.texts[0]
        word = text[len(text) // 2 : len(text) // 2 + 3]
        if len(word) < 3 or "\ufffd" in text:
            return None
        return word, text[: text.index(word)]


async def learn(client: httpx.AsyncClient, model: str, count: int, longest: int, seed: int) -> list[Known]:
    """Ask `count` different things, one after the other: greedy ones, seeded ones with two choices, and forms."""
    rng = random.Random(seed)
    found = []
    for number in range(count):
        filler = " ".join(rng.choice(WORDS) for _ in range(rng.choice((2, 20, longest // 2, longest))))
        text = f"Ticket {number * 7919 % 9973}: {filler}. What is it about?"
        body: dict[str, Any] = {"model": model, "messages": [{"role": "user", "content": text}], "temperature": 0}
        body["max_tokens"] = rng.choice((8, 24, 48))
        if number % 4 == 1:
            body |= {"temperature": 0.9, "seed": number, "n": 2, "top_p": 0.95, "presence_penalty": 0.5}
        if number % 4 == 2:
            form = {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}
            body |= {"temperature": 0.8, "seed": number, "response_format": form, "max_tokens": 120}
        answer = await client.post("/v1/chat/completions", json=body)
        answer.raise_for_status()
        told = answer.json()
        vector = await client.post("/v1/embeddings", json={"model": model, "input": text})
        vector.raise_for_status()
        found.append(
            Known(
                body,
                tuple(choice["message"]["content"] for choice in told["choices"]),
                told["usage"]["prompt_tokens"],
                told["usage"]["completion_tokens"],
                tuple(vector.json()["data"][0]["embedding"]),
            )
        )
    return found
