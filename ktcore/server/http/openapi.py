"""The OpenAPI description: FastAPI's own, and the bodies, which are JSON whatever type they claim to have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel

from ktcore.server.api.embeddings import EmbeddingAsk, OllamaEmbedAsk
from ktcore.server.api.ollama.schemas import GenerateAsk, OllamaChatAsk, ShowAsk
from ktcore.server.api.openai.schemas import ChatAsk, CompletionAsk
from ktcore.server.api.responses.schemas import ResponsesAsk
from ktcore.server.api.tokens import DetokenizeAsk, TokenizeAsk

BODIES: Mapping[str, type[BaseModel]] = {
    "/v1/chat/completions": ChatAsk,
    "/v1/completions": CompletionAsk,
    "/v1/responses": ResponsesAsk,
    "/v1/embeddings": EmbeddingAsk,
    "/api/generate": GenerateAsk,
    "/api/chat": OllamaChatAsk,
    "/api/show": ShowAsk,
    "/api/embed": OllamaEmbedAsk,
    "/api/embeddings": OllamaEmbedAsk,
    "/tokenize": TokenizeAsk,
    "/detokenize": DetokenizeAsk,
}
"""What each route that takes a body takes."""


def describe_bodies(app: FastAPI) -> None:
    """Let the application's description tell of those bodies too."""
    plain = app.openapi

    def described() -> dict[str, Any]:
        made = plain()
        schemas = made.setdefault("components", {}).setdefault("schemas", {})
        for path, kind in BODIES.items():
            schema = kind.model_json_schema(ref_template="#/components/schemas/{model}")
            schemas |= schema.pop("$defs", {})
            schemas[kind.__name__] = schema
            content = {"application/json": {"schema": {"$ref": f"#/components/schemas/{kind.__name__}"}}}
            made["paths"][path]["post"]["requestBody"] = {"required": True, "content": content}
        return made

    app.openapi = described  # type: ignore[method-assign]
