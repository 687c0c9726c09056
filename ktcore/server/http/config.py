"""`serve.yaml`: what a server with several models is told, checked before anything is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator

from ktcore.engine.draft.asked import read_draft
from ktcore.engine.prefix.cache import DISK_BYTES, MEMORY_BYTES, PrefixOptions
from ktcore.engine.schedule.pace import STRETCH
from ktcore.errors import RequestError
from ktcore.placement.memory import parse_bytes
from ktcore.server.api.complaints import complaint
from ktcore.server.http.settings import MAX_BODY


def _size(given: object) -> object:
    return parse_bytes(given) if isinstance(given, str) else given


Size = Annotated[int, BeforeValidator(_size), Field(gt=0)]
Name = Annotated[str, Field(pattern=r"^[\w.-]+([/:][\w.-]+)*$", max_length=200)]


class ModelConfig(BaseModel):
    """One model: where it is, and the options that `ktcore serve MODEL` has for it.

    Attributes:
        keep: load it when the server starts, and never unload it.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    path: Annotated[Path, Field(strict=False)]
    backend: str = "auto"
    rules: str | None = None
    experts_from: Annotated[Path, Field(strict=False)] | None = None
    threads: int | None = Field(None, ge=1)
    context: int | None = Field(None, ge=1)
    memory: Size | dict[str, Size] | None = None
    packed_cache: Annotated[Path, Field(strict=False)] | None = None
    graphs: bool = True
    draft: str | None = None
    packing: Literal["compact", "fast"] | None = None
    prefix_cache: Annotated[Path, Field(strict=False)] | None = None
    prefix_cache_memory: Size = MEMORY_BYTES
    prefix_cache_disk: Size = DISK_BYTES
    prompt_lookup: int = Field(0, ge=0, le=64)
    max_new_tokens: int = Field(1024, ge=1)
    keep: bool = False

    def loading(self, folder: Path) -> dict[str, Any]:
        """The options of `ktcore.load`; paths are relative to `folder`."""
        rules = self.rules
        if rules is not None and (folder / rules).is_file():
            rules = str(folder / rules)
        return {
            "backend": self.backend,
            "rules": rules,
            "experts_from": None if self.experts_from is None else folder / self.experts_from.expanduser(),
            "threads": self.threads,
            "context": self.context,
            "memory": self.memory,
            "packed_cache": None if self.packed_cache is None else folder / self.packed_cache.expanduser(),
            "graphs": self.graphs,
            "draft": None if self.draft is None else _draft(self.draft, folder),
            "packing": self.packing,
            "prefix": PrefixOptions(
                self.prefix_cache_memory,
                None if self.prefix_cache is None else folder / self.prefix_cache.expanduser(),
                self.prefix_cache_disk,
            ),
        }


def _draft(given: str, folder: Path) -> str:
    """The same with a model's path relative to `folder`."""
    asked = read_draft(given)
    assert asked is not None
    return given if asked.path is None else f"{folder / asked.path.expanduser()}:{asked.most}"


class ServeConfig(BaseModel):
    """A server: the options of `ktcore serve`, its models, and how many of them may be loaded.

    Attributes:
        memory: bytes that all loaded models may take in main memory; or by device ("cpu:0", "sim:0").
        max_loaded: most models that are loaded at once.
        idle_unload: seconds without a request after which a model is unloaded.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    models: dict[Name, ModelConfig] = Field(min_length=1)
    host: str = "127.0.0.1"
    port: int = Field(8000, ge=1, le=65535)
    api_key_file: Annotated[Path, Field(strict=False)] | None = None
    max_body: Size = MAX_BODY
    queue: int = Field(64, ge=1)
    stretch: float = Field(STRETCH, ge=0, strict=False)
    timeout: float | None = Field(None, gt=0, strict=False)
    drain: int = Field(30, ge=0)
    cors_origins: list[str] = Field(default_factory=list)
    tls_cert: Annotated[Path, Field(strict=False)] | None = None
    tls_key: Annotated[Path, Field(strict=False)] | None = None
    log: str = "text"
    memory: Size | dict[str, Size] | None = None
    max_loaded: int | None = Field(None, ge=1)
    idle_unload: float | None = Field(None, gt=0, strict=False)

    @field_validator("models")
    @classmethod
    def _no_latest(cls, given: dict[str, ModelConfig]) -> dict[str, ModelConfig]:
        bad = next((name for name in given if name.endswith(":latest")), None)
        if bad is not None:
            raise ValueError(f"{bad!r}: Ollama's clients add ':latest' themselves, leave it out")
        return given


def read_config(path: Path) -> ServeConfig:
    """The checked file.

    Raises:
        RequestError: it cannot be read, is no YAML, or holds what is not known; with the place.
    """
    try:
        given = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"{path} cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise RequestError(f"{path} is no YAML: {error}") from error
    if not isinstance(given, dict):
        raise RequestError(f"{path}: a mapping is expected", "begin with 'models:'; docs/serving.md has an example")
    try:
        return ServeConfig.model_validate(given)
    except ValidationError as error:
        raise _told(path, error, given) from error


def _told(path: Path, error: ValidationError, given: Any) -> RequestError:
    told = error.errors(include_url=False)
    place, message = complaint(told, given)
    where = [str(part) for part in told[0]["loc"]]
    if told[0]["type"] == "extra_forbidden":
        kind: type[BaseModel] = ModelConfig if len(where) > 1 and where[0] == "models" else ServeConfig
        known = ", ".join(sorted(kind.model_fields))
        return RequestError(f"{path}: {'.'.join(where)} is not known", f"known there: {known}")
    return RequestError(f"{path}: {place}: {message}", "docs/serving.md lists what may stand there")
