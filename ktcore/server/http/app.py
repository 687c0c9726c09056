"""The application: every route over the server's models, behind the gate."""

from __future__ import annotations

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response

from ktcore import __version__
from ktcore.engine.service import Service
from ktcore.server.api.embeddings import embedding_routes
from ktcore.server.api.ollama.routes import ollama_routes
from ktcore.server.api.openai.routes import openai_routes
from ktcore.server.api.responses.routes import response_routes
from ktcore.server.api.tokens import token_routes
from ktcore.server.http.errors import add_handlers, json_response
from ktcore.server.http.guard import Guard
from ktcore.server.http.logs import RequestLog
from ktcore.server.http.memory import trimming
from ktcore.server.http.metrics import text_of
from ktcore.server.http.openapi import describe_bodies
from ktcore.server.http.settings import Settings
from ktcore.server.models.registry import Leases, Models, server_figures
from ktcore.server.page.routes import page_routes


def build_app(service: Service, settings: Settings) -> FastAPI:
    """An ASGI application over a running service, which stays its caller's to close."""
    return build_models_app(Models.around(service, settings), settings)


def build_models_app(models: Models, settings: Settings) -> FastAPI:
    """An ASGI application over models, which stay their caller's to close.

    Args:
        settings: of the server; each model has its own for answers.
    """
    app = FastAPI(title="ktcore", version=__version__, docs_url=None, redoc_url=None, lifespan=lambda _: trimming())
    add_handlers(app)
    app.add_middleware(Leases)
    app.add_middleware(Guard, settings=settings)
    if settings.origins:
        # before the gate: a browser's question whether it may ask comes without a key
        app.add_middleware(
            CORSMiddleware, allow_origins=list(settings.origins), allow_methods=["GET", "POST"], allow_headers=["*"]
        )
    app.add_middleware(RequestLog)
    app.include_router(openai_routes(models))
    app.include_router(ollama_routes(models))
    app.include_router(embedding_routes(models))
    app.include_router(response_routes(models))
    app.include_router(token_routes(models))
    app.include_router(page_routes())
    describe_bodies(app)

    @app.get("/health")
    async def health() -> Response:
        return json_response({"status": "ok"})

    @app.get("/ready")
    async def ready() -> Response:
        return json_response({"status": "ok"}) if models.ready else json_response({"status": "closing"}, 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        found = {entry.name: entry.metrics for entry in models.entries.values()}
        text = text_of(found, list(server_figures(models)) if len(found) > 1 else ())
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    return app
