"""`ktcore serve --config serve.yaml`: several models by name, as the file has them; the command line goes before it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ktcore.errors import RequestError

if TYPE_CHECKING:
    from ktcore.server.http.config import ModelConfig, ServeConfig
    from ktcore.server.http.settings import Settings
    from ktcore.server.models.registry import Bounds, Entry

OVERRIDES = frozenset(
    "host port api_key_file max_body queue stretch timeout drain cors_origin tls_cert tls_key log".split()  # noqa: SIM905
)
_ALWAYS = frozenset({"config", "debug", "verbose"})


@dataclass(frozen=True)
class Configured:
    """The file with what the command line says."""

    config: ServeConfig
    folder: Path


def configured(context: typer.Context, path: Path) -> Configured:
    """Read the file.

    Raises:
        RequestError: it is wrong, or the command line has options that belong to one model.
    """
    from ktcore.server.http.config import read_config

    sources = {n: context.get_parameter_source(n) for n in context.params}
    given = {n for n, source in sources.items() if source is not None and source.name == "COMMANDLINE"}
    stray = sorted(given - OVERRIDES - _ALWAYS)
    if stray:
        options = ", ".join("MODEL" if n == "model" else f"--{n.replace('_', '-')}" for n in stray)
        raise RequestError(
            f"{options} cannot go with --config", f"write it into {path}, for the model that it concerns"
        )
    config = read_config(path)
    names = {n: "cors_origins" if n == "cors_origin" else n for n in given & OVERRIDES}
    update = {field: context.params[n] for n, field in names.items()}
    folder = path.resolve().parent
    for field in ("api_key_file", "tls_cert", "tls_key"):
        value = getattr(config, field)
        if value is not None and field not in update:
            update[field] = folder / value.expanduser()
    return Configured(config.model_copy(update=update), folder)


def entries(made: Configured, settings: Settings) -> list[Entry]:
    """The file's models, none of them loaded.

    Raises:
        KtcoreError: one of them could not be loaded as the file says.
    """
    return [_entry(name, model, made, settings) for name, model in made.config.models.items()]


def bounds(config: ServeConfig) -> Bounds:
    """What all loaded models may take; a size alone is that of main memory."""
    from ktcore.backend.registry import Registry
    from ktcore.server.models.registry import Bounds

    memory = config.memory
    if isinstance(memory, int):
        memory = {f"{Registry.discover().host().name}:0": memory}
    return Bounds(memory or {}, config.max_loaded, config.idle_unload)


def _entry(name: str, model: ModelConfig, made: Configured, settings: Settings) -> Entry:
    from ktcore.server.models.facts import planned_facts
    from ktcore.server.models.registry import entry_of

    path = made.folder / model.path.expanduser()
    loading: dict[str, Any] = model.loading(made.folder)
    own = replace(settings, name=name, default_tokens=model.max_new_tokens, prompt_lookup=model.prompt_lookup)
    facts = planned_facts(path, loading)
    return entry_of(path, own, facts, model.keep, loading, made.config.queue, made.config.stretch)
