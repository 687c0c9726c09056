"""Options as people know them from other programs: what has an equivalent is taken, the rest is refused with advice."""

from __future__ import annotations

from collections.abc import Iterator
from difflib import get_close_matches
from typing import Any

import typer
from typer.core import TyperCommand

ALIASES = {
    "--temp": "--temperature",
    "--n-predict": "--max-new-tokens",
    "--predict": "--max-new-tokens",
    "--num-predict": "--max-new-tokens",
    "--max-tokens": "--max-new-tokens",
    "--ctx-size": "--context",
    "--num-ctx": "--context",
    "--system-prompt": "--system",
    "-sys": "--system",
    "--alias": "--name",
    "--served-model-name": "--name",
    "--enforce-eager": "--no-graphs",
    "--ssl-certfile": "--tls-cert",
    "--ssl-keyfile": "--tls-key",
    "--ssl-cert-file": "--tls-cert",
    "--ssl-key-file": "--tls-key",
}
"""Words of llama.cpp, Ollama and vLLM for exactly what an option here does."""

_PLACED = "the plan decides what runs where: `ktcore plan MODEL` shows it, --memory bounds the accelerator's part, "
_PLACED += "--rules FILE changes it"
_EXPERTS = "routed experts run on the CPU anyway; --rules FILE can place them elsewhere"
_ONE = "a model runs on one accelerator and the CPU; --backend says which"
_MODEL = "the model is the first word: ktcore {command} MODEL"
_PROMPT = 'the prompt is the word after the model: ktcore run MODEL "Why is the sky blue?"'
_KV = "the KV cache has the format that the plan says"
_TOGETHER = "as many requests run together as the context has room for; --queue bounds those that wait"
_NO_NEED = "it can be left out: there is nothing to switch on"

ADVICE = {
    "-m": _MODEL,
    "--model": _MODEL,
    "-hf": "download it first, `hf download`, and give the folder or file",
    "--hf-repo": "download it first, `hf download`, and give the folder or file",
    "-p": _PROMPT,
    "--prompt": _PROMPT,
    "-f": "a prompt is read from stdin: ktcore run MODEL - < FILE",
    "--file": "a prompt is read from stdin: ktcore run MODEL - < FILE",
    "-i": "use `ktcore chat MODEL`",
    "--interactive": "use `ktcore chat MODEL`",
    "-cnv": "use `ktcore chat MODEL`",
    "--conversation": "use `ktcore chat MODEL`",
    "-no-cnv": "use `ktcore run MODEL PROMPT --raw`",
    "--no-conversation": "use `ktcore run MODEL PROMPT --raw`",
    "-ngl": _PLACED,
    "--gpu-layers": _PLACED,
    "--n-gpu-layers": _PLACED,
    "--fit": _PLACED,
    "-ot": _PLACED,
    "--override-tensor": _PLACED,
    "--device-map": _PLACED,
    "--cpu-offload-gb": _PLACED,
    "-cmoe": _EXPERTS,
    "--cpu-moe": _EXPERTS,
    "-ncmoe": _EXPERTS,
    "--n-cpu-moe": _EXPERTS,
    "-dev": "name it with --backend; `ktcore doctor` lists them",
    "--device": "name it with --backend; `ktcore doctor` lists them",
    "--gpu-memory-utilization": "give the accelerator's memory as a size: --memory 20GiB",
    "-tp": _ONE,
    "--tensor-parallel-size": _ONE,
    "--pipeline-parallel-size": _ONE,
    "--data-parallel-size": _ONE,
    "-ts": _ONE,
    "--tensor-split": _ONE,
    "-sm": _ONE,
    "--split-mode": _ONE,
    "-mg": _ONE,
    "--main-gpu": _ONE,
    "--max-model-len": "--context is what all requests share; one request may use all of it",
    "--max-num-seqs": _TOGETHER,
    "-np": _TOGETHER,
    "--parallel": _TOGETHER,
    "--dtype": "weights keep the precision that the file has",
    "-q": "weights keep the file's format; `ktcore convert --experts FORMAT` quantises experts",
    "--quantization": "weights keep the file's format; `ktcore convert --experts FORMAT` quantises experts",
    "-ctk": _KV,
    "-ctv": _KV,
    "--cache-type-k": _KV,
    "--cache-type-v": _KV,
    "--kv-cache-dtype": _KV,
    "-fa": _NO_NEED,
    "--flash-attn": _NO_NEED,
    "--jinja": _NO_NEED,
    "--enable-prefix-caching": _NO_NEED,
    "--enable-auto-tool-choice": _NO_NEED,
    "--tool-call-parser": "the model's own way of writing calls is read; leave it out",
    "--reasoning-parser": "the model's own way of writing thoughts is read; leave it out",
    "--trust-remote-code": "no code of a checkpoint is ever run; leave it out",
    "--chat-template": "--template takes a template's name, or a file with its source",
    "--chat-template-file": "--template takes a template's name, or a file with its source",
    "--chat-template-kwargs": "--set NAME=VALUE gives one variable of the template",
    "--repeat-penalty": "--repetition-penalty does so over the whole text, not its last tokens alone",
    "--api-key": "other users see command lines: write it into a file for --api-key-file, or set KTCORE_API_KEY",
    "--lora": "adapters cannot be loaded; merge it into the model",
    "--lora-modules": "adapters cannot be loaded; merge them into the model",
    "--mmproj": "images cannot be given; only the text part of a model runs",
}
"""Words of llama.cpp and vLLM without an equivalent, and what to do here."""


class KnowingCommand(TyperCommand):
    """A command that knows such words, wherever it has not an option of that name itself."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:  # type: ignore[override]
        """Parse the command line.

        Raises:
            typer.BadParameter: a word belongs to another program, or one dash stands for two.
        """
        return super().parse_args(ctx, list(self._translated(ctx, args)))

    def _translated(self, ctx: typer.Context, args: list[str]) -> Iterator[str]:
        own = {word: option for option in self.get_params(ctx) for word in (*option.opts, *option.secondary_opts)}
        words = iter(args)
        for word in words:
            if word == "--":
                yield word
                break
            name, equals, value = word.partition("=")
            if len(name) > 1 and name[0] == "-" and name not in own and not ctx.resilient_parsing:
                name = self._known(ctx, name, own)
            yield name + equals + value
            if name in own and not equals and _takes_value(own[name]):
                yield from _next(words)
        yield from words

    def _known(self, ctx: typer.Context, name: str, own: dict[str, Any]) -> str:
        """The option that a word stands for; the word itself where it is left to the parser."""
        dashed = name.replace("_", "-")
        for word in (dashed, ALIASES.get(name), ALIASES.get(dashed)):
            if word in own:
                return word
        advice = ADVICE.get(name, ADVICE.get(dashed))
        if advice is not None:
            raise _refused(ctx, name, advice.format(command=ctx.info_name))
        if name.startswith("--"):
            near = get_close_matches(dashed, [*own, *ALIASES], n=3, cutoff=0.7)
            near = list(dict.fromkeys(ALIASES.get(word, word) for word in near))
            known = [word for word in near if word in own]
            raise _refused(ctx, name, f"did you mean {' or '.join(known)}?" if known else "--help lists what there is")
        long = f"-{dashed}"
        if len(name) > 2 and (long in own or ALIASES.get(long) in own):
            raise _refused(ctx, name, f"write it with two dashes: {long}")
        return name


class UnknownWord(typer.BadParameter):
    """An option that is none here."""

    def format_message(self) -> str:
        """As it was given, without words about values."""
        return self.message


def _refused(ctx: typer.Context, name: str, advice: str) -> UnknownWord:
    return UnknownWord(f"No such option: {name}; {advice}", ctx=ctx)


def _takes_value(option: Any) -> bool:
    return not (getattr(option, "is_flag", False) or getattr(option, "count", False))


def _next(words: Iterator[str]) -> Iterator[str]:
    for word in words:
        yield word
        return
