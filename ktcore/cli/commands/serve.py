"""`ktcore serve`: answers HTTP clients, many at once."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ktcore.cli import groups as g
from ktcore.cli import options as o
from ktcore.engine.schedule.pace import STRETCH
from ktcore.errors import RequestError

if TYPE_CHECKING:
    from ktcore.server.http.settings import Keys

KEYS_VARIABLE = "KTCORE_API_KEY"


@g.grouped
def serve(
    *,
    context_: typer.Context,
    model: o.OptionalModelArgument = None,
    config: Annotated[
        Path | None,
        typer.Option("--config", metavar="FILE", help="Several models, as a YAML file has them, in place of MODEL."),
    ] = None,
    host: Annotated[str, typer.Option("--host", metavar="ADDRESS", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", metavar="N", min=1, max=65535, help="Port to listen on.")] = 8000,
    api_key_file: Annotated[
        Path | None,
        typer.Option(
            "--api-key-file",
            metavar="FILE",
            help=f"API keys, one a line; or set {KEYS_VARIABLE}. Needed on other addresses than loopback.",
        ),
    ] = None,
    name: Annotated[
        str | None,
        typer.Option("--name", metavar="NAME", show_default="MODEL's file name", help="What clients call the model."),
    ] = None,
    max_new_tokens: Annotated[
        int,
        typer.Option("--max-new-tokens", "-n", metavar="N", min=1, help="Longest answer where a request names none."),
    ] = 1024,
    max_body: Annotated[
        int | None,
        typer.Option("--max-body", parser=o.parse_size, metavar="SIZE", show_default="4MiB", help="Largest request."),
    ] = None,
    queue: Annotated[
        int, typer.Option("--queue", metavar="N", min=1, help="Requests that may wait; more are told to come later.")
    ] = 64,
    stretch: Annotated[
        float,
        typer.Option(
            "--stretch",
            metavar="FACTOR",
            min=0.0,
            help="New prompts may make a step so many times as long as one without them; 0: no bound.",
        ),
    ] = STRETCH,
    timeout: Annotated[
        float | None,
        typer.Option("--timeout", metavar="SECONDS", min=0.001, show_default="none", help="Longest time of an answer."),
    ] = None,
    drain: Annotated[
        int, typer.Option("--drain", metavar="SECONDS", min=0, help="Time for answers under way when it is to stop.")
    ] = 30,
    cors_origin: Annotated[
        list[str] | None,
        typer.Option("--cors-origin", metavar="ORIGIN", help="A site whose pages may ask, like https://chat.example."),
    ] = None,
    tls_cert: Annotated[
        Path | None, typer.Option("--tls-cert", metavar="FILE", help="Certificate chain (PEM): serve HTTPS.")
    ] = None,
    tls_key: Annotated[
        Path | None, typer.Option("--tls-key", metavar="FILE", help="The certificate's private key (PEM).")
    ] = None,
    log: Annotated[
        str, typer.Option("--log", metavar="|".join(("text", "json", "off")), help="Lines a request on stderr.")
    ] = "text",
    loading: g.LoadingForMany,
    prompt_lookup: o.PromptLookupOption = 0,
) -> None:
    """Serve one model, or several by name, to clients of the OpenAI and Ollama APIs, several conversations at once.

    The context (--context) is shared: a request waits until its prompt fits into what is free, and answers that outgrow
    it make room for each other. Prompts that begin alike are computed once (--prefix-cache keeps them on disk).

    \b
      ktcore serve model.gguf
      ktcore serve model.gguf --host 0.0.0.0 --api-key-file keys.txt
      ktcore serve --config serve.yaml
    """
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise RequestError(
            f"serving needs a package that is not installed: {error.name}", "pip install 'ktcore[server]'"
        ) from error
    from ktcore.cli.listen import Door, bound, listen
    from ktcore.cli.terminal import note, opened
    from ktcore.engine.service import Service
    from ktcore.server.http.app import build_app
    from ktcore.server.http.logs import FORMATS, logging_to_stderr
    from ktcore.server.http.settings import MAX_BODY, Settings

    if config is not None:
        return _serve_several(context_, config)
    if model is None:
        raise RequestError("there is no model to serve", "ktcore serve MODEL, or ktcore serve --config FILE")
    keys = _keys(api_key_file, host)
    door = Door(host, port, bool(keys), _tls(tls_cert, tls_key), drain)
    if log not in FORMATS:
        raise RequestError(f"--log {log}: known are {', '.join(FORMATS)}")
    origins = _origins(cors_origin or [])
    settings = Settings(
        name or model.stem or str(model), keys, max_body or MAX_BODY, max_new_tokens, timeout, origins, prompt_lookup
    )
    with (
        bound(door) as sockets,
        opened(model, **loading.given()) as (loaded, load_s),
        Service(loaded, queue, stretch) as service,
        logging_to_stderr(log),
    ):
        note(f"{settings.name} loaded in {load_s:.1f} s, context of {loaded.context} tokens. {loaded.taken}")
        listen(build_app(service, settings), sockets, door)


def _serve_several(context: typer.Context, path: Path) -> None:
    from ktcore.cli.listen import Door, bound, listen
    from ktcore.cli.serve_config import bounds, configured, entries
    from ktcore.cli.terminal import note
    from ktcore.server.http.app import build_models_app
    from ktcore.server.http.logs import FORMATS, logging_to_stderr
    from ktcore.server.http.settings import Settings
    from ktcore.server.models.registry import Models

    made = configured(context, path)
    c = made.config
    keys = _keys(c.api_key_file, c.host)
    door = Door(c.host, c.port, bool(keys), _tls(c.tls_cert, c.tls_key), c.drain)
    if c.log not in FORMATS:
        raise RequestError(f"{path}: log: {c.log}: known are {', '.join(FORMATS)}")
    settings = Settings("", keys, c.max_body, timeout_s=c.timeout, origins=_origins(c.cors_origins))
    with bound(door) as sockets, logging_to_stderr(c.log):
        models = Models(entries(made, settings), bounds(c))
        try:
            models.load_pinned()
            note(f"{len(models.entries)} models: {', '.join(models.entries)}; {len(models.loaded)} loaded")
            listen(build_models_app(models, settings), sockets, door)
        finally:
            models.close()


def _keys(file: Path | None, host: str) -> Keys:
    from ktcore.server.http.settings import Keys, is_loopback, read_keys

    if file is not None:
        return read_keys(file)
    key = os.environ.get(KEYS_VARIABLE, "")
    if not key and not is_loopback(host):
        raise RequestError(
            f"{host} can be reached from other machines, and there is no API key",
            f"give --api-key-file, set {KEYS_VARIABLE}, or listen on 127.0.0.1",
        )
    return Keys((key,) if key else ())


def _tls(cert: Path | None, key: Path | None) -> dict[str, str]:
    """What uvicorn takes of them."""
    if cert is None and key is None:
        return {}
    if cert is None or key is None:
        raise RequestError("HTTPS needs both --tls-cert and --tls-key")
    import ssl

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(cert, key)
    except (OSError, ssl.SSLError) as error:
        raise RequestError(f"{cert} and {key} cannot be used for HTTPS: {error}", "both are PEM files") from error
    return {"ssl_certfile": str(cert), "ssl_keyfile": str(key)}


def _origins(given: list[str]) -> tuple[str, ...]:
    """Origins as browsers send them.

    Raises:
        RequestError: one is none; "*" would open the server to every page that anyone visits.
    """
    import re

    for origin in given:
        if not re.fullmatch(r"https?://[^/\s*]+", origin):
            raise RequestError(f"--cors-origin {origin!r} is no origin", "write it like https://chat.example:8443")
    return tuple(given)
