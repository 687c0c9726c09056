"""Options that several commands share, so that they read and behave alike."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from ktcore.engine.prefix.cache import PrefixOptions


@dataclass
class State:
    """What the program as a whole was told; the root context carries it.

    Attributes:
        verbose: how often --verbose was given.
    """

    debug: bool = False
    verbose: int = 0


def parse_size(text: str) -> int:
    """Bytes of "24GiB" (powers of 1024), "2GB" or "512M" (powers of 1000), "1000".

    Raises:
        typer.BadParameter: it is not a size.
    """
    from ktcore.placement.memory import parse_bytes

    try:
        return parse_bytes(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


def parse_memory(text: str) -> int:
    """Bytes of a memory's size, as `parse_size`; a number alone that can only lack its unit is refused.

    Raises:
        typer.BadParameter: it is not a size, or has no unit.
    """
    size = parse_size(text)
    if size < _LEAST_MEMORY and text.strip()[-1].isdigit():
        raise typer.BadParameter(f"{text} alone is a number of bytes; say {text}GiB, or {text}MiB")
    return size


def prefix(folder: Path | None, memory: Any, disk: Any) -> PrefixOptions:
    """The options of the prefix cache, as `ktcore.load` takes them."""
    from ktcore.engine.prefix.cache import DISK_BYTES, MEMORY_BYTES, PrefixOptions

    return PrefixOptions(MEMORY_BYTES if memory is None else memory, folder, disk or DISK_BYTES)


def note_verbose(context: typer.Context, given: int) -> int:
    from ktcore.cli.logs import show_records

    state = context.find_root().obj
    if given and isinstance(state, State):
        state.verbose += given
        show_records(state.verbose)
    return given


def note_debug(context: typer.Context, given: bool) -> bool:
    state = context.find_root().obj
    if given and isinstance(state, State):
        state.debug = True
    return given


BACKENDS = "ktcore.backends"
"""`ENTRY_POINT_GROUP`, whose module takes seconds to import."""
_LEAST_MEMORY = 2**20


def _backend_names(incomplete: str) -> list[str]:
    """For the shell's completion: what is installed, by metadata, so that nothing is imported."""
    from importlib.metadata import entry_points

    names = {"auto", *(entry.name for entry in entry_points(group=BACKENDS))}
    return sorted(name for name in names if name.startswith(incomplete))


# Panels of the help text.
_LOADING = "Loading"
_SAMPLING = "Sampling"

MODEL = typer.Argument(
    metavar="MODEL", show_default=False, help="A GGUF file, or a folder with config.json and *.safetensors."
)
ModelArgument = Annotated[Path, MODEL]
OptionalModelArgument = Annotated[Path | None, MODEL]
BackendOption = Annotated[
    str,
    typer.Option(
        "--backend",
        "-b",
        metavar="NAME",
        autocompletion=_backend_names,
        rich_help_panel=_LOADING,
        help="A backend that `ktcore doctor` lists. [bold]auto[/] takes the accelerator if exactly one is available, "
        "else the CPU.",
    ),
]
RulesOption = Annotated[
    str | None,
    typer.Option(
        "--rules",
        metavar="FILE",
        rich_help_panel=_LOADING,
        help="A rule file that goes before the shipped ones, or a shipped one's name such as [bold]reference[/].",
    ),
]
PackingOption = Annotated[
    str | None,
    typer.Option(
        "--packing",
        metavar="compact|fast",
        rich_help_panel=_LOADING,
        show_default="what the rules say, else compact",
        help="fast lets weights take more memory where that buys speed; `plan` states the sizes of both.",
    ),
]
ExpertsFromOption = Annotated[
    Path | None,
    typer.Option(
        "--experts-from",
        metavar="MODEL",
        rich_help_panel=_LOADING,
        help="Take the routed experts from another checkpoint of the same model, such as a GGUF file.",
    ),
]
ThreadsOption = Annotated[
    int | None,
    typer.Option(
        "--threads",
        "-t",
        metavar="N",
        min=1,
        show_default="physical cores",
        rich_help_panel=_LOADING,
        help="Worker threads on the CPU.",
    ),
]
ContextOption = Annotated[
    int | None,
    typer.Option(
        "--context",
        "-c",
        metavar="N",
        min=1,
        show_default="the model's own, at most 16384",
        rich_help_panel=_LOADING,
        help="Tokens that the KV cache holds: prompt and answer together.",
    ),
]
MemoryOption = Annotated[
    int | None,
    typer.Option(
        "--memory",
        parser=parse_memory,
        metavar="SIZE",
        show_default="all that the device has",
        rich_help_panel=_LOADING,
        help="Accelerator memory to stay within, like 24GiB.",
    ),
]
PackedCacheOption = Annotated[
    Path | None,
    typer.Option(
        "--packed-cache",
        metavar="DIR",
        rich_help_panel=_LOADING,
        help="Leave packed weights there, and map them from there the next time.",
    ),
]
PrefixCacheOption = Annotated[
    Path | None,
    typer.Option(
        "--prefix-cache",
        metavar="DIR",
        rich_help_panel=_LOADING,
        help="Keep what was computed for prompts there, for later prompts that begin alike, over restarts.",
    ),
]
PrefixDiskOption = Annotated[
    int | None,
    typer.Option(
        "--prefix-cache-disk",
        parser=parse_memory,
        metavar="SIZE",
        show_default="8GiB",
        rich_help_panel=_LOADING,
        help="Largest size of --prefix-cache.",
    ),
]
PrefixMemoryOption = Annotated[
    int | None,
    typer.Option(
        "--prefix-cache-memory",
        parser=parse_memory,
        metavar="SIZE",
        show_default="1GiB",
        rich_help_panel=_LOADING,
        help="Main memory for prompts that no longer fit into the context.",
    ),
]
PromptLookupOption = Annotated[
    int,
    typer.Option(
        "--prompt-lookup",
        metavar="N",
        min=0,
        max=64,
        rich_help_panel=_SAMPLING,
        help="Guess up to N next tokens from the text so far; answers stay the same.",
    ),
]
DraftOption = Annotated[
    str | None,
    typer.Option(
        "--draft",
        metavar="mtp:N|MODEL[:N]",
        show_default="none",
        rich_help_panel=_LOADING,
        help="Have the model's layer for further tokens, or a smaller model, guess the next N; answers stay the same.",
    ),
]
GraphsOption = Annotated[
    bool,
    typer.Option(
        "--graphs/--no-graphs",
        rich_help_panel=_LOADING,
        help="Run whole decode steps as captured device graphs, where device and plan allow it.",
    ),
]
NewTokensOption = Annotated[
    int,
    typer.Option(
        "--max-new-tokens", "-n", metavar="N", min=1, rich_help_panel=_SAMPLING, help="Longest answer, in tokens."
    ),
]
TemperatureOption = Annotated[
    float,
    typer.Option(
        "--temperature",
        metavar="X",
        rich_help_panel=_SAMPLING,
        help="0 always takes the likeliest token; 1 draws freely.",
    ),
]
TopKOption = Annotated[
    int,
    typer.Option("--top-k", metavar="N", rich_help_panel=_SAMPLING, help="Draw among the k likeliest tokens; 0: all."),
]
TopPOption = Annotated[
    float,
    typer.Option(
        "--top-p",
        metavar="X",
        rich_help_panel=_SAMPLING,
        help="Draw among the likeliest that make up this probability.",
    ),
]
MinPOption = Annotated[
    float,
    typer.Option(
        "--min-p", metavar="X", rich_help_panel=_SAMPLING, help="Drop tokens below this share of the likeliest one."
    ),
]
PenaltyOption = Annotated[
    float,
    typer.Option(
        "--repetition-penalty", metavar="X", rich_help_panel=_SAMPLING, help="Above 1 discourages repetition."
    ),
]
SeedOption = Annotated[
    int | None,
    typer.Option(
        "--seed",
        metavar="N",
        min=0,
        max=2**63 - 1,
        rich_help_panel=_SAMPLING,
        help="The same seed gives the same text.",
    ),
]
StopOption = Annotated[
    list[str] | None,
    typer.Option("--stop", metavar="TEXT", rich_help_panel=_SAMPLING, help="Ends the answer; may be given repeatedly."),
]
SystemOption = Annotated[
    str | None, typer.Option("--system", metavar="TEXT", help="A system message: how the model is to behave.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object, for scripts.")]


def verbose_option(about: str) -> Any:
    """`--verbose`, counted and noted; what it shows beside the log is the command's to say."""
    return typer.Option(
        "--verbose", "-v", count=True, metavar="<bool>", show_default=False, callback=note_verbose, help=about
    )


VerboseOption = Annotated[int, verbose_option("Say on stderr what is done; twice, say more.")]
DebugOption = Annotated[bool, typer.Option("--debug", callback=note_debug, help="Show the traceback of an error.")]
