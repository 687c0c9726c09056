"""OpenAI's Responses API without a memory: one route, whole or as a stream of named events."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace

from fastapi import APIRouter, Request
from starlette.responses import Response, StreamingResponse

from ktcore.engine import service as engine
from ktcore.engine.output import PLAIN
from ktcore.server.api.body import read
from ktcore.server.api.chat import prompt_of
from ktcore.server.api.responses.items import Building, event
from ktcore.server.api.responses.schemas import ResponsesAsk
from ktcore.server.api.sampling import params_for
from ktcore.server.http.errors import json_response, problem_of
from ktcore.server.models.answers import Answers
from ktcore.server.models.registry import Models


def response_routes(models: Models) -> APIRouter:
    """The route over a server's models."""
    routes = APIRouter(prefix="/v1", tags=["OpenAI"])

    @routes.post("/responses")
    async def responses(http: Request) -> Response:
        ask = await read(http, ResponsesAsk)
        served = await models.of(ask.model, http)
        prompt = await asyncio.to_thread(prompt_of, served.model, ask.chat)
        params = params_for(
            served.model.plan.graph.vocab,
            temperature=1.0 if ask.temperature is None else ask.temperature,
            top_p=ask.top_p,
        )
        longest = ask.max_output_tokens or served.settings.default_tokens
        output = replace(PLAIN, structure=prompt.structure, shown=prompt.shown)
        request = engine.Request(
            prompt.ids, params, longest, (), served.settings.timeout(ask.timeout), output, ask.user or ""
        )
        answers = served.answers([request], http, [prompt.reader()])
        building = Building(served.settings.name, ask, prompt)
        if ask.stream:
            return StreamingResponse(_events(answers, building), media_type="text/event-stream")
        async for _, delta, part in answers:
            for _ in building.add(part):
                pass
            if delta.finish is not None:
                for _ in building.end(delta.finish, delta.stats):
                    pass
        return json_response(building.body)

    return routes


async def _events(answers: Answers, building: Building) -> AsyncIterator[str]:
    number = 0
    try:
        for made in building.opening():
            yield event(made, number)
            number += 1
        async for _, delta, part in answers:
            for made in building.add(part):
                yield event(made, number)
                number += 1
            if delta.finish is not None:
                for made in building.end(delta.finish, delta.stats):
                    yield event(made, number)
                    number += 1
    except Exception as error:  # the status is sent already, so the stream itself must tell
        for made in building.fail(problem_of(error)):
            yield event(made, number)
            number += 1
    finally:
        answers.close()
