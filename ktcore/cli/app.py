"""The commands of the `ktcore` program, and its help."""

from __future__ import annotations

import sys
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
from ktcore.cli.options import DebugOption, VerboseOption
from ktcore.cli.words import KnowingCommand

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
