"""Routes that give a text's vector, of OpenAI's API and Ollama's: hidden states pooled, of unit length."""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import torch
from fastapi import APIRouter, Request
from pydantic import Field
from starlette.responses import Response

from ktcore.engine import service as engine
from ktcore.engine.output import Output
from ktcore.engine.schedule.pooling import LAST, MEAN
from ktcore.errors import FieldError
from ktcore.ops.sampling import SamplingParams
from ktcore.server.api.body import read
from ktcore.server.api.fields import IDLE, REFUSED, Body, Refusals, Refused
from ktcore.server.api.ollama.routes import served_of
from ktcore.server.api.ollama.schemas import KeptAsk
from ktcore.server.api.openai.schemas import Id
from ktcore.server.http.errors import json_response
from ktcore.server.models.registry import Models
from ktcore.server.models.served import Served
from ktcore.text.tokenizer import Tokenizer

MAX_INPUTS = 2048
# As many are under way at once: the queue is for other callers too.
_AT_ONCE = 8
# How GGUF files name the pooling that a model was trained for (llama.cpp's llama_pooling_type); -1 and 0 name none.
_GGUF_POOLING = {-1: MEAN, 0: MEAN, 1: MEAN, 3: LAST}
_GGUF_OTHERS = {2: "cls", 4: "rank"}

Text = Annotated[str, Field(min_length=1)]
Ids = Annotated[list[Id], Field(min_length=1)]


class EmbeddingAsk(Body):
    """POST /v1/embeddings; `pooling` is beyond OpenAI's API."""

    idle: ClassVar[Mapping[str, str]] = IDLE
    refused: ClassVar[Refusals] = {**REFUSED, "add_special_tokens": Refused((None, True))}

    model: str
    input: (
        Text
        | Ids
        | Annotated[list[Text], Field(min_length=1, max_length=MAX_INPUTS)]
        | Annotated[list[Ids], Field(min_length=1, max_length=MAX_INPUTS)]
    )
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = Field(None, ge=1)
    pooling: Literal["mean", "last"] | None = None


class OllamaEmbedAsk(KeptAsk):
    """POST /api/embed; `prompt` is the word of the older /api/embeddings."""

    idle: ClassVar[Mapping[str, str]] = {"options": "sampling, of which there is none"}

    input: str | Annotated[list[str], Field(max_length=MAX_INPUTS)] = Field(default_factory=list)
    prompt: str = ""
    truncate: bool = True
    dimensions: int | None = Field(None, ge=1)


def embedding_routes(models: Models) -> APIRouter:
    """The routes over a server's models."""
    routes = APIRouter()

    @routes.post("/v1/embeddings", tags=["OpenAI"])
    async def embeddings(http: Request) -> Response:
        ask = await read(http, EmbeddingAsk)
        served = await models.of(ask.model, http)
        prompts = await asyncio.to_thread(_encode, served.model.tokenizer, ask.input)
        vectors = await _vectors(served, prompts, http, ask.pooling, ask.dimensions)
        data = [
            {"object": "embedding", "index": i, "embedding": _told(vector, ask.encoding_format or "float")}
            for i, vector in enumerate(vectors)
        ]
        count = sum(map(len, prompts))
        usage = {"prompt_tokens": count, "total_tokens": count}
        return json_response({"object": "list", "data": data, "model": served.settings.name, "usage": usage})

    @routes.post("/api/embed", tags=["Ollama"])
    async def embed(http: Request) -> Response:
        began = time.perf_counter()
        ask = await read(http, OllamaEmbedAsk)
        prompts, vectors = await _ollama(models, ask, http)
        return json_response(
            {
                "model": ask.model,
                "embeddings": [vector.tolist() for vector in vectors],
                "total_duration": round((time.perf_counter() - began) * 1e9),
                "load_duration": 0,
                "prompt_eval_count": sum(map(len, prompts)),
            }
        )

    @routes.post("/api/embeddings", tags=["Ollama"])
    async def older(http: Request) -> Response:
        ask = await read(http, OllamaEmbedAsk)
        _, vectors = await _ollama(models, ask.model_copy(update={"input": [ask.prompt] if ask.prompt else []}), http)
        return json_response({"embedding": vectors[0].tolist() if vectors else []})

    return routes


async def _ollama(models: Models, ask: OllamaEmbedAsk, http: Request) -> tuple[list[list[int]], list[torch.Tensor]]:
    served = await served_of(models, ask, http)
    prompts = await asyncio.to_thread(_encode, served.model.tokenizer, ask.input)
    if ask.truncate:
        prompts = [ids[: served.model.context] for ids in prompts]
    return prompts, await _vectors(served, prompts, http, None, ask.dimensions)


async def _vectors(
    served: Served, prompts: list[list[int]], http: Request, pooling: str | None, dimensions: int | None
) -> list[torch.Tensor]:
    """A vector of unit length for each prompt."""
    output = Output(pool=pooling or _own_pooling(served.model.checkpoint.config))
    greedy, timeout = SamplingParams(temperature=0), served.settings.timeout(None)
    requests = [engine.Request(ids, greedy, 0, timeout_s=timeout, output=output) for ids in prompts]
    made: list[torch.Tensor] = []
    for at in range(0, len(requests), _AT_ONCE):
        answers = await served.answers(requests[at : at + _AT_ONCE], http).whole()
        made += [answer.pooled for answer in answers if answer.pooled is not None]
    if dimensions is None or not made:
        return made
    if dimensions > len(made[0]):
        raise FieldError("dimensions", f"the model's vectors have {len(made[0])} dimensions")
    return [torch.nn.functional.normalize(vector[:dimensions], dim=0) for vector in made]


def _own_pooling(config: Mapping[str, Any]) -> str:
    """The pooling that a model was trained for, by its header.

    Raises:
        FieldError: it is one that is not known here.
    """
    kind = config.get(f"{config.get('general.architecture')}.pooling_type", 1)
    if kind not in _GGUF_POOLING:
        told = f"the model was trained for pooling {_GGUF_OTHERS.get(kind, kind)!r}, which is not supported"
        raise FieldError("pooling", told, "say mean or last to have that")
    return _GGUF_POOLING[kind]


def _encode(tokenizer: Tokenizer, given: Any) -> list[list[int]]:
    every = [given] if isinstance(given, str) or (given and isinstance(given[0], int)) else given
    return [tokenizer.encode(one) if isinstance(one, str) else one for one in every]


def _told(vector: torch.Tensor, encoding: str) -> Any:
    """As numbers, or as the base64 of little-endian float32."""
    if encoding == "float":
        return vector.tolist()
    return base64.b64encode(vector.numpy().astype("<f4").tobytes()).decode()
