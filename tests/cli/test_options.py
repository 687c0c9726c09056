"""The command line's words: every option with default, bounds, panel and help, as `options.txt` has them."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import typer

from ktcore.cli import groups as g
from ktcore.cli.app import build_app
from ktcore.cli.commands import conformance
from ktcore.engine.prefix.cache import DISK_BYTES, MEMORY_BYTES, PrefixOptions

WORDS = Path(__file__).parent / "options.txt"
PLAIN = {"min": None, "max": None, "count": False, "is_eager": False, "show_default": True, "rich_help_panel": None}


def commands() -> Iterator[tuple[str, Any]]:
    """Every command with what it calls, the program itself first."""
    app = build_app()
    assert app.registered_callback is not None
    yield "ktcore", app.registered_callback.callback
    for made in (*app.registered_commands, *conformance.app.registered_commands):
        assert made.callback is not None
        yield made.name or made.callback.__name__, made.callback


def described(name: str, parameter: inspect.Parameter) -> str:
    """One option or argument in a line."""
    infos = [item for item in get_args(parameter.annotation)[1:] if hasattr(item, "param_decls")]
    info = infos[0] if infos else typer.Argument()
    decls = [word for word in (info.default, *(info.param_decls or ())) if isinstance(word, str)]
    default = "needed" if parameter.default is inspect.Parameter.empty else repr(parameter.default)
    facts = [f"{fact}={getattr(info, fact)}" for fact in PLAIN if getattr(info, fact, PLAIN[fact]) != PLAIN[fact]]
    parser = f" by {info.parser.__name__}" if info.parser else ""
    words = [name, *(decls or [parameter.name]), info.metavar or "", default + parser, *facts, "|", info.help or ""]
    return " ".join(words)


def all_words() -> str:
    """What `options.txt` should hold: `python -m tests.cli.test_options` prints it."""
    lines = []
    for name, command in commands():
        signature = inspect.signature(command, eval_str=True)
        shown = [p for p in signature.parameters.values() if p.name != "context_"]
        lines += [described(name, parameter) for parameter in shown]
    return "\n".join(lines) + "\n"


def test_words_defaults_bounds_and_help_are_those_that_people_know() -> None:
    assert all_words().splitlines() == WORDS.read_text().splitlines()


def test_help_is_what_no_words_and_h_give(ktcore: Any) -> None:
    for words in ([], ["-h"], ["--help"], ["run"], ["run", "-h"], ["conformance"]):
        done = ktcore(*words)
        assert "Usage: ktcore" in done.out + done.err, words
    assert "auto takes the accelerator" in ktcore("run", "--help").out.replace("│", "").replace("\n", "")
    assert "Draw among" not in ktcore().out
    assert "draw the matrix" in ktcore("conformance").out
    assert "[bold]" not in ktcore("run", "--help").out
    assert "Usage" not in ktcore("doctor", "--json").out


def test_what_is_kept_of_prompts_depends_on_how_many_there_will_be(tmp_path: Path) -> None:
    assert g.Loading().prefix() is None
    assert g.LoadingOnce().prefix() == PrefixOptions(0, None, DISK_BYTES)
    assert g.LoadingOnce(prefix_cache=tmp_path, prefix_cache_disk=5).prefix() == PrefixOptions(0, tmp_path, 5)
    assert g.LoadingForMany().prefix() == PrefixOptions(MEMORY_BYTES, None, DISK_BYTES)
    assert g.LoadingForMany(prefix_cache_memory=7).prefix() == PrefixOptions(7, None, DISK_BYTES)


def test_loading_has_every_option_of_load() -> None:
    from ktcore import load

    taken = set(inspect.signature(load).parameters) - {"path", "progress"}
    given = g.LoadingForMany("far", "r.yaml", Path("e"), "fast", 3, 99, 7, Path("p"), False, "mtp").given()
    assert set(given) == taken
    prefix = given.pop("prefix")
    assert isinstance(prefix, PrefixOptions)
    assert list(given.values()) == ["far", "r.yaml", Path("e"), "fast", 3, 99, 7, Path("p"), False, "mtp"]


def test_sampling_reaches_generate_checked() -> None:
    given = g.Sampling(0.5, 3, 0.25, 0.125, 1.5, 7, ["x"], 9).given()
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed", "stop", "prompt_lookup")
    assert tuple(given[name] for name in names) == (0.5, 3, 0.25, 0.125, 1.5, 7, ["x"], 9)
    with pytest.raises(Exception, match="temperature"):
        g.Sampling(temperature=-1).given()


@pytest.mark.parametrize(("size", "refused"), [("1048575", True), ("1048576", False), ("1KiB", False), ("1.5", True)])
def test_a_memory_without_its_unit_is_refused(size: str, refused: bool) -> None:
    from ktcore.cli.options import parse_memory

    if refused:
        with pytest.raises(typer.BadParameter, match="GiB"):
            parse_memory(size)
    else:
        assert parse_memory(size) >= 1024


if __name__ == "__main__":
    print(all_words(), end="")
