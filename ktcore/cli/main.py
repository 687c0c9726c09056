"""The `ktcore` program: builds the commands, and turns errors that a user can meet into one line and an exit code."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from ktcore import __version__
from ktcore.cli.commands.bench import bench
from ktcore.cli.commands.chat import chat
from ktcore.cli.commands.conformance import app as conformance
from ktcore.cli.commands.convert import convert
from ktcore.cli.commands.doctor import doctor
from ktcore.cli.commands.new_backend import new_backend
from ktcore.cli.commands.plan import plan
from ktcore.cli.commands.run import run
from ktcore.cli.commands.serve import serve
from ktcore.cli.options import DebugOption, State, VerboseOption
from ktcore.cli.words import KnowingCommand
from ktcore.errors import KtcoreError

HELP = """Runs mixture-of-experts language models bigger than your GPU, on whatever accelerator you own.

MODEL is always a GGUF file, or a Hugging Face folder with config.json and *.safetensors.

\b
  ktcore run model.gguf "Why is the sky blue?"   answer one prompt
  ktcore chat model.gguf                         hold a conversation
  ktcore serve model.gguf                        answer clients of the OpenAI API
  ktcore plan model.gguf --backend cpu           what would run where, and why
  ktcore convert folder packed                   pack once, load quickly ever after
  ktcore doctor                                  what this machine offers
  ktcore bench model.gguf                        how fast it is here
"""


def main(args: Sequence[str] | None = None) -> None:
    """Run the program and leave with its exit code: 0, 1 for an error, 2 for wrong usage, 130 for Ctrl-C.

    Args:
        args: the words after `ktcore`; None takes the process's own.
    """
    _tolerant_streams()
    state = State()
    try:
        typer.main.get_command(build_app())(args=args, prog_name="ktcore", obj=state)
    except Exception as error:
        known = error if isinstance(error, KtcoreError) else _out_of_memory(error)
        if known is None or state.debug:
            raise
        from ktcore.cli.terminal import show_error

        show_error(known)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def build_app() -> typer.Typer:
    """The commands. Their heavy imports happen inside of them."""
    app = typer.Typer(
        name="ktcore",
        help=HELP,
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        rich_markup_mode="rich",
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_root)
    for command in (run, chat, serve, plan, convert, doctor, bench, new_backend):
        app.command(cls=KnowingCommand, no_args_is_help=command is not doctor)(command)
    app.add_typer(conformance, name="conformance")
    return app


def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=lambda given: _show_version(given), is_eager=True, help="Show it.")
    ] = False,
    verbose: VerboseOption = 0,
    debug: DebugOption = False,
) -> None:
    pass


def _show_version(given: bool) -> None:
    if given:
        sys.stdout.write(f"ktcore {__version__}\n")
        raise typer.Exit


def _out_of_memory(error: Exception) -> KtcoreError | None:
    """What allocators raise in kinds of their own, as an error for users; None when it is something else."""
    text = str(error).splitlines()[0] if str(error) else "no more memory"
    if isinstance(error, MemoryError) or "allocate memory" in text or "out of memory" in text.lower():
        return KtcoreError(f"out of memory: {text}", "`ktcore plan` tells what is needed; --context changes it most")
    return None


def _tolerant_streams() -> None:
    """A terminal that cannot show a character, or input that is not UTF-8, must not end an answer."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="replace")


if __name__ == "__main__":
    main()
