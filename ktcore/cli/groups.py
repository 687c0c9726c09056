"""Groups of options that several commands have, each declared once as a dataclass and merged into their signatures."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_type_hints

from ktcore.cli import options as o

if TYPE_CHECKING:
    from ktcore.engine.prefix.cache import PrefixOptions

Command = Callable[..., None]


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn."""

    temperature: o.TemperatureOption = 0.7
    top_k: o.TopKOption = 0
    top_p: o.TopPOption = 1.0
    min_p: o.MinPOption = 0.0
    repetition_penalty: o.PenaltyOption = 1.0
    seed: o.SeedOption = None
    stop: o.StopOption = None
    prompt_lookup: o.PromptLookupOption = 0

    def given(self) -> dict[str, Any]:
        """The options as `Model.generate` takes them, checked before anything is loaded.

        Raises:
            RequestError: a value is out of range.
        """
        from ktcore.ops.sampling import SamplingParams

        params = SamplingParams(
            self.temperature, self.top_k, self.top_p, self.min_p, self.repetition_penalty, self.seed
        )
        return {**vars(params), "stop": self.stop or [], "prompt_lookup": self.prompt_lookup}


@dataclass(frozen=True)
class Source:
    """Where weights come from, and what decides where they go."""

    backend: o.BackendOption = "auto"
    rules: o.RulesOption = None
    experts_from: o.ExpertsFromOption = None
    packing: o.PackingOption = None


@dataclass(frozen=True)
class Loading(Source):
    """How a model is loaded."""

    threads: o.ThreadsOption = None
    context: o.ContextOption = None
    memory: o.MemoryOption = None
    packed_cache: o.PackedCacheOption = None
    graphs: o.GraphsOption = True
    draft: o.DraftOption = None

    def given(self) -> dict[str, Any]:
        """The options as `ktcore.load` takes them."""
        return {
            "backend": self.backend,
            "rules": self.rules,
            "experts_from": self.experts_from,
            "packing": self.packing,
            "threads": self.threads,
            "context": self.context,
            "memory": self.memory,
            "packed_cache": self.packed_cache,
            "graphs": self.graphs,
            "draft": self.draft,
            "prefix": self.prefix(),
        }

    def prefix(self) -> PrefixOptions | None:
        """What is kept of prompts for later ones: nothing."""
        return None


@dataclass(frozen=True)
class LoadingOnce(Loading):
    """How a model is loaded for one prompt: main memory keeps nothing for later ones, a folder may."""

    prefix_cache: o.PrefixCacheOption = None
    prefix_cache_disk: o.PrefixDiskOption = None

    def prefix(self) -> PrefixOptions | None:
        """What is kept of prompts for later ones."""
        return o.prefix(self.prefix_cache, 0, self.prefix_cache_disk)


@dataclass(frozen=True)
class LoadingForMany(LoadingOnce):
    """How a model is loaded for many prompts, which may begin alike."""

    prefix_cache_memory: o.PrefixMemoryOption = None

    def prefix(self) -> PrefixOptions | None:
        """What is kept of prompts for later ones."""
        return o.prefix(self.prefix_cache, self.prefix_cache_memory, self.prefix_cache_disk)


@dataclass(frozen=True)
class Common:
    """What every command has; the options' callbacks note it in the program's `State`."""

    verbose: o.VerboseOption = 0
    debug: o.DebugOption = False


def grouped(command: Command) -> Command:
    """A command whose parameters of dataclass types stand for their fields, with what every command has at the end.

    A command that declares an option of `Common` itself says what it means there.

    Returns:
        What takes the fields as keywords and calls `command` with the dataclasses made of them.
    """
    hints = get_type_hints(command, include_extras=True)
    groups = {name: kind for name, kind in hints.items() if isinstance(kind, type) and dataclasses.is_dataclass(kind)}
    parameters: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(command).parameters.items():
        parameters += _fields(groups[name]) if name in groups else [parameter.replace(annotation=hints[name])]
    own = {parameter.name for parameter in parameters}
    common = [parameter for parameter in _fields(Common) if parameter.name not in own]

    @functools.wraps(command)
    def called(**values: Any) -> None:
        for parameter in common:
            del values[parameter.name]
        for name, kind in groups.items():
            values[name] = kind(**{field.name: values.pop(field.name) for field in dataclasses.fields(kind)})
        command(**values)

    made = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in (*parameters, *common)]
    called.__signature__ = inspect.Signature(made)  # type: ignore[attr-defined]
    called.__annotations__ = {parameter.name: parameter.annotation for parameter in made}
    return called


def _fields(kind: type[Any]) -> list[inspect.Parameter]:
    hints = get_type_hints(kind, include_extras=True)
    named = [(field.name, field.default) for field in dataclasses.fields(kind)]
    kept = inspect.Parameter.KEYWORD_ONLY
    return [inspect.Parameter(name, kept, default=default, annotation=hints[name]) for name, default in named]
