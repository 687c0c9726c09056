"""Routes that turn text into token ids and back, as the model's tokenizer does."""

from __future__ import annotations

import asyncio
from typing import Annotated

from fastapi import APIRouter
from pydantic import BaseModel, Field
from starlette.responses import Response

from ktcore.server.errors import json_response
from ktcore.server.served import Served

Id = Annotated[int, Field(ge=0, lt=2**31)]


class TokenizeAsk(BaseModel):
    """POST /tokenize."""

    prompt: str
    add_special_tokens: bool = True


class DetokenizeAsk(BaseModel):
    """POST /detokenize."""

    tokens: list[Id]


def token_routes(served: Served) -> APIRouter:
    """The routes over one served model."""
    routes = APIRouter(tags=["Tokens"])

    @routes.post("/tokenize")
    async def tokenize(ask: TokenizeAsk) -> Response:
        ids = await asyncio.to_thread(served.model.tokenizer.encode, ask.prompt, ask.add_special_tokens)
        return json_response({"tokens": ids, "count": len(ids), "max_model_len": served.model.context})

    @routes.post("/detokenize")
    async def detokenize(ask: DetokenizeAsk) -> Response:
        text = await asyncio.to_thread(served.model.tokenizer.decode, ask.tokens, False)
        return json_response({"prompt": text})

    return routes
