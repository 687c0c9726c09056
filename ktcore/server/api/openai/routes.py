"""Routes of the OpenAI API: models, chat completions, completions."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response, StreamingResponse

from ktcore.engine import service as engine
from ktcore.engine.model import Model
from ktcore.engine.stream import Stats
from ktcore.server.api.body import read
from ktcore.server.api.chat import Prompt, prompt_of, structure_of
from ktcore.server.api.openai.replies import DONE, Reply, event
from ktcore.server.api.openai.schemas import Ask, ChatAsk, CompletionAsk
from ktcore.server.api.sampling import for_choice, params_for
from ktcore.server.http.errors import json_response, problem_of
from ktcore.server.models.answers import Answers
from ktcore.server.models.registry import Entry, Models
from ktcore.server.models.served import Served


def openai_routes(models: Models) -> APIRouter:
    """The routes over a server's models."""
    routes = APIRouter(prefix="/v1", tags=["OpenAI"])

    @routes.get("/models")
    async def every() -> Response:
        return json_response({"object": "list", "data": [_card(entry) for entry in models.entries.values()]})

    @routes.get("/models/{name:path}")
    async def model(name: str) -> Response:
        return json_response(_card(models.entry(name)))

    @routes.post("/chat/completions")
    async def chat(http: Request) -> Response:
        ask = await read(http, ChatAsk)
        served = await models.of(ask.model, http)
        # a template is the checkpoint's code, and long texts take their time: neither may hold up other answers
        prompt = await asyncio.to_thread(prompt_of, served.model, ask.chat)
        longest = ask.max_completion_tokens or ask.max_tokens
        return await _answer(served, ask, [prompt], longest, http, chat=True)

    @routes.post("/completions")
    async def completions(http: Request) -> Response:
        ask = await read(http, CompletionAsk)
        served = await models.of(ask.model, http)
        prompts = await asyncio.to_thread(_prompts, served.model, ask)
        return await _answer(served, ask, prompts, ask.max_tokens, http, chat=False)

    return routes


def _card(entry: Entry) -> dict[str, Any]:
    return {"id": entry.name, "object": "model", "created": int(entry.since.timestamp()), "owned_by": "ktcore"}


async def _answer(
    served: Served, ask: Ask, prompts: list[Prompt], longest: int | None, http: Request, chat: bool
) -> Response:
    choices = ask.n or 1
    readers = [prompt.reader() if chat else None for prompt in prompts for _ in range(choices)]
    answers = served.answers(_requests(served, ask, prompts, longest), http, readers)
    custom = ask.custom if isinstance(ask, ChatAsk) else frozenset()
    reply = Reply(served.settings.name, chat, prompts[0], bool(ask.stream) and ask.usage_in_stream, custom)
    if ask.stream:
        return StreamingResponse(
            _events(answers, reply, ask, choices, chat, len(readers)), media_type="text/event-stream"
        )
    return json_response(reply.whole(await answers.whole(), choices))


def _requests(served: Served, ask: Ask, prompts: list[Prompt], longest: int | None) -> list[engine.Request]:
    params = params_for(
        served.model.plan.graph.vocab,
        temperature=1.0 if ask.temperature is None else ask.temperature,
        top_p=ask.top_p,
        top_k=ask.top_k,
        min_p=ask.min_p,
        typical_p=ask.typical_p,
        repetition_penalty=ask.repetition_penalty,
        presence_penalty=ask.presence_penalty,
        frequency_penalty=ask.frequency_penalty,
        logit_bias=ask.logit_bias,
        seed=ask.seed,
    )
    new, timeout = longest or served.settings.default_tokens, served.settings.timeout(ask.timeout)
    outputs = [replace(ask.output, structure=prompt.structure, shown=prompt.shown) for prompt in prompts]
    return [
        engine.Request(prompt.ids, for_choice(params, choice), new, ask.stops, timeout, output, ask.user or "")
        for prompt, output in zip(prompts, outputs, strict=True)
        for choice in range(ask.n or 1)
    ]


async def _events(answers: Answers, reply: Reply, ask: Ask, choices: int, chat: bool, count: int) -> AsyncIterator[str]:
    opened = False
    stats: dict[int, Stats] = {}
    try:
        async for index, delta, part in answers:
            if not opened:
                # all in order: OpenAI's stream helper fails on a choice whose forerunners it has not seen
                opened = True
                for each in range(count if chat or count > 1 else 0):
                    yield event(reply.opening(each))
            for piece in reply.pieces(index, part, delta.chosen):
                yield event(piece)
            if delta.finish is not None:
                stats[index] = delta.stats
                yield event(reply.end(index, delta.finish))
        if ask.usage_in_stream:
            yield event(reply.counts([stats[i] for i in sorted(stats)], choices))
    except Exception as error:  # the status is sent already, so the stream itself must tell
        yield event(problem_of(error).openai)
    finally:
        answers.close()
    yield DONE


def _prompts(model: Model, ask: CompletionAsk) -> list[Prompt]:
    structure = structure_of(model, ask.form)
    return [Prompt(ids, model.tokenizer, structure=structure) for ids in _encode(model.tokenizer, ask.prompt)]


def _encode(tokenizer: Any, prompt: str | list[int] | list[str] | list[list[int]]) -> list[list[int]]:
    if isinstance(prompt, str):
        return [tokenizer.encode(prompt)]
    if isinstance(prompt[0], int):
        return [prompt]
    return [tokenizer.encode(one) if isinstance(one, str) else one for one in prompt]
