"""Routes that turn text into token ids and back, as the model's tokenizer does."""

from __future__ import annotations

import asyncio
from typing import Annotated, ClassVar

from fastapi import APIRouter, Request
from pydantic import Field
from starlette.responses import Response

from ktcore.server.api.body import read
from ktcore.server.api.fields import Body, Refusals, Refused
from ktcore.server.http.errors import json_response
from ktcore.server.models.registry import Models

Id = Annotated[int, Field(ge=0, lt=2**31)]


class TokenizeAsk(Body):
    """POST /tokenize; without `model` the first one."""

    # vLLM's and llama.cpp's
    refused: ClassVar[Refusals] = {
        **dict.fromkeys(("return_token_strs", "with_pieces"), Refused()),
        **dict.fromkeys(("messages", "content"), Refused(instead="the text is prompt")),
        "add_special": Refused((None, True), "it is add_special_tokens"),
        "parse_special": Refused((None, True)),
    }

    prompt: str
    add_special_tokens: bool = True
    model: str | None = None


class DetokenizeAsk(Body):
    """POST /detokenize; without `model` the first one."""

    tokens: list[Id]
    model: str | None = None


def token_routes(models: Models) -> APIRouter:
    """The routes over a server's models."""
    routes = APIRouter(tags=["Tokens"])

    @routes.post("/tokenize")
    async def tokenize(http: Request) -> Response:
        ask = await read(http, TokenizeAsk)
        served = await models.of(ask.model or models.first.name, http)
        ids = await asyncio.to_thread(served.model.tokenizer.encode, ask.prompt, ask.add_special_tokens)
        return json_response({"tokens": ids, "count": len(ids), "max_model_len": served.model.context})

    @routes.post("/detokenize")
    async def detokenize(http: Request) -> Response:
        ask = await read(http, DetokenizeAsk)
        served = await models.of(ask.model or models.first.name, http)
        text = await asyncio.to_thread(served.model.tokenizer.decode, ask.tokens, False)
        return json_response({"prompt": text})

    return routes
