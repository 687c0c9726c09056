"""Workers that ask at random what is known, what is wrong, and what they will not wait for."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import httpx

from .known import Known

CHAT = "/v1/chat/completions"


@dataclass
class Tally:
    """What the clients saw.

    Attributes:
        kinds: requests by what they were.
        choices: answers that came to their end.
        left: answers that were hung up on.
        unheard: answers that nobody waited for; the server need not have begun with them.
        left_tokens: the most tokens that both can have drawn.
        failures: what was not as it should be.
    """

    kinds: Counter[str] = field(default_factory=Counter)
    choices: int = 0
    prompt_tokens: int = 0
    new_tokens: int = 0
    left: int = 0
    unheard: int = 0
    left_tokens: int = 0
    failures: list[str] = field(default_factory=list)

    def ended(self, usage: dict[str, int], choices: int = 1) -> None:
        """Count whole answers."""
        self.choices += choices
        self.prompt_tokens += usage["prompt_tokens"] * choices
        self.new_tokens += usage.get("completion_tokens", 0)

    def expect(self, found: Any, wanted: Any, what: str) -> None:
        """Note a difference."""
        if found != wanted:
            self.failures.append(f"{what}: {str(found)[:300]!r} instead of {str(wanted)[:300]!r}")


class Worker:
    """Asks one thing after the other until it is told to end."""

    def __init__(
        self, client: httpx.AsyncClient, model: str, known: list[Known], context: int, tally: Tally, seed: int
    ) -> None:
        self._client, self._model, self._known, self._context, self._tally = client, model, known, context, tally
        self._rng = random.Random(seed)
        kinds: dict[Callable[[Known], Awaitable[None]], int] = {
            **{self.whole: 4, self.stream: 6, self.hang_up: 4, self.leave_early: 2, self.slowly: 1, self.stopped: 2},
            **{self.embed: 1, self.ollama: 2, self.ollama_stream: 2, self.response: 1, self.tokens: 1},
            **{self.too_long: 1, self.too_large: 1, self.no_json: 1, self.bad_field: 2, self.other_model: 1},
        }
        self._kinds, self._weights = list(kinds), list(kinds.values())

    async def run(self, until: float) -> None:
        """Until that time of `time.monotonic`."""
        while time.monotonic() < until:
            (kind,) = self._rng.choices(self._kinds, self._weights)
            self._tally.kinds[kind.__name__] += 1
            try:
                await kind(self._rng.choice(self._known))
            except Exception as error:
                self._tally.failures.append(f"{kind.__name__}: {type(error).__name__}: {error}")

    async def whole(self, known: Known) -> None:
        told = (await self._post(CHAT, known.body)).json()
        self._tally.ended(told["usage"], len(known.texts))
        self._tally.expect(tuple(c["message"]["content"] for c in told["choices"]), known.texts, "a whole answer")
        self._tally.expect(told["usage"]["completion_tokens"], known.new_tokens, "its tokens")

    async def stream(self, known: Known) -> None:
        await self._streamed(known, {})

    async def slowly(self, known: Known) -> None:
        """Much text, read in small pieces with pauses: the server must keep what is not read."""
        await self._streamed(known, {"logprobs": True, "top_logprobs": 20}, pause=0.05)

    async def hang_up(self, known: Known) -> None:
        body = {**known.body, "max_tokens": 400, "stream": True, "ignore_eos": True}
        texts = [""] * len(known.texts)
        stays = self._rng.randrange(1, 30)
        self._tally.left += len(known.texts)
        self._tally.left_tokens += 400 * len(known.texts)
        async with self._client.stream("POST", CHAT, json=body) as response:
            self._tally.expect(response.status_code, 200, "a stream's status")
            async for event in _events(response):
                for choice in event.get("choices", ()):
                    texts[choice["index"]] += choice["delta"].get("content") or ""
                stays -= 1
                if not stays:
                    break
        for said, whole in zip(texts, known.texts, strict=True):
            short = min(len(said), len(whole.rstrip("\ufffd")))
            self._tally.expect(said[:short], whole[:short], "an answer that was hung up on")

    async def leave_early(self, known: Known) -> None:
        body = {**known.body, "max_tokens": 400}
        self._tally.unheard += len(known.texts)
        self._tally.left_tokens += 400 * len(known.texts)
        with contextlib.suppress(httpx.ReadTimeout):
            await self._client.post(CHAT, json=body, timeout=httpx.Timeout(60, read=self._rng.uniform(0.05, 0.6)))

    async def stopped(self, known: Known) -> None:
        stop = known.stop()
        if stop is None or "n" in known.body or "response_format" in known.body:
            return
        told = (await self._post(CHAT, {**known.body, "stop": ["\0never", stop[0]]})).json()
        self._tally.ended(told["usage"])
        choice = told["choices"][0]
        self._tally.expect(
            (choice["message"]["content"], choice["finish_reason"]), (stop[1], "stop"), "a stopped answer"
        )

    async def embed(self, known: Known) -> None:
        told = (await self._post("/v1/embeddings", {"model": self._model, "input": known.said})).json()
        self._tally.ended({"prompt_tokens": told["usage"]["prompt_tokens"]})
        vector = told["data"][0]["embedding"]
        like = sum(a * b for a, b in zip(vector, known.embedding, strict=True))
        self._tally.expect(like > 0.999, True, f"an embedding, alike by {like:.6f}")

    async def ollama(self, known: Known) -> None:
        if known.body["temperature"]:
            return
        told = (await self._post("/api/chat", self._for_ollama(known, False))).json()
        self._tally.ended({"prompt_tokens": told["prompt_eval_count"], "completion_tokens": told["eval_count"]})
        self._tally.expect(told["message"]["content"], known.texts[0], "an answer of Ollama's API")

    async def ollama_stream(self, known: Known) -> None:
        if known.body["temperature"]:
            return
        text, last = "", {}
        async with self._client.stream("POST", "/api/chat", json=self._for_ollama(known, True)) as response:
            async for line in response.aiter_lines():
                last = json.loads(line)
                text += last["message"]["content"]
        self._tally.ended({"prompt_tokens": last["prompt_eval_count"], "completion_tokens": last["eval_count"]})
        self._tally.expect(text, known.texts[0], "a stream of Ollama's API")

    async def response(self, known: Known) -> None:
        if known.body["temperature"]:
            return
        body = {"model": self._model, "input": known.said, "temperature": 0}
        told = (await self._post("/v1/responses", {**body, "max_output_tokens": known.body["max_tokens"]})).json()
        used = told["usage"]
        self._tally.ended({"prompt_tokens": used["input_tokens"], "completion_tokens": used["output_tokens"]})
        self._tally.expect(told["output"][-1]["content"][0]["text"], known.texts[0], "a response")

    async def tokens(self, known: Known) -> None:
        ids = (await self._post("/tokenize", {"prompt": known.said})).json()["tokens"]
        self._tally.expect((await self._post("/detokenize", {"tokens": ids})).json()["prompt"], known.said, "a text")

    async def too_long(self, known: Known) -> None:
        await self._refused(400, json={**known.body, "messages": [{"role": "user", "content": "x y " * self._context}]})

    async def too_large(self, known: Known) -> None:
        await self._refused(413, content=b" " * (4 * 2**20 + 1))

    async def no_json(self, known: Known) -> None:
        broken = (b"{", b"", b"[" * 5000, b"\xff\xfe{}", json.dumps(known.body).encode()[:-3], b'"\\ud800"', b"null")
        await self._refused(400, content=self._rng.choice(broken))

    async def bad_field(self, known: Known) -> None:
        fields = ({"n": 10**9}, {"max_tokens": -1}, {"temperature": "hot"}, {"logit_bias": {"-1": 0}}, {"stop": [""]})
        await self._refused(400, json={**known.body, **self._rng.choice(fields)})

    async def other_model(self, known: Known) -> None:
        await self._refused(404, json={**known.body, "model": "../../etc/passwd"})

    async def _streamed(self, known: Known, more: dict[str, Any], pause: float = 0.0) -> None:
        body = {**known.body, **more, "stream": True, "stream_options": {"include_usage": True}}
        texts, usage = [""] * len(known.texts), None
        async with self._client.stream("POST", CHAT, json=body) as response:
            self._tally.expect(response.status_code, 200, "a stream's status")
            async for event in _events(response, pause):
                usage = event.get("usage") or usage
                for choice in event.get("choices", ()):
                    texts[choice["index"]] += choice["delta"].get("content") or ""
        self._tally.ended(usage or {"prompt_tokens": 0}, len(texts))
        self._tally.expect(tuple(texts), known.texts, "a streamed answer")

    async def _post(self, path: str, body: dict[str, Any]) -> httpx.Response:
        response = await self._client.post(path, json=body)
        response.raise_for_status()
        return response

    async def _refused(self, status: int, **body: Any) -> None:
        headers = {"Content-Type": "application/json"}
        response = await self._client.post(CHAT, headers=headers, **body)
        self._tally.expect((response.status_code, "error" in response.json()), (status, True), "a refusal")

    def _for_ollama(self, known: Known, stream: bool) -> dict[str, Any]:
        options = {"temperature": 0, "num_predict": known.body["max_tokens"]}
        return {"model": self._model, "messages": known.body["messages"], "options": options, "stream": stream}


async def _events(response: httpx.Response, pause: float = 0.0) -> AsyncIterator[dict[str, Any]]:
    pending = ""
    async for piece in response.aiter_text(2048 if pause else None):
        await asyncio.sleep(pause)
        *events, pending = (pending + piece).split("\n\n")
        for event in events:
            if event != "data: [DONE]":
                yield json.loads(event.removeprefix("data: "))
