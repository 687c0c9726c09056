"""`ktcore run`: answers one prompt, streaming."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ktcore.cli import groups as g
from ktcore.cli import options as o
from ktcore.cli import templating as t
from ktcore.errors import RequestError

if TYPE_CHECKING:
    from ktcore.engine.model import Model
    from ktcore.engine.stream import TextStream


@g.grouped
def run(
    *,
    model: o.ModelArgument,
    prompt: Annotated[
        str, typer.Argument(metavar="PROMPT", show_default=False, help="The prompt; [bold]-[/] reads it from stdin.")
    ],
    max_new_tokens: o.NewTokensOption = 512,
    sampling: g.Sampling,
    system: o.SystemOption = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue the prompt as it is, without the chat template.")
    ] = False,
    templating: t.Templating,
    as_json: o.JsonOption = False,
    loading: g.LoadingOnce,
) -> None:
    """Answer a prompt; the text streams to stdout, speeds go to stderr.

    A model with a chat template sees the prompt as a user's message; --raw continues it as plain text.

    \b
      ktcore run model.gguf "Why is the sky blue?" --temperature 0
      ktcore run model.gguf - --system "Answer in French." < question.txt
      ktcore run model.gguf "Once upon a time" --raw -n 100 --seed 7
    """
    from ktcore.cli.measure import speeds
    from ktcore.cli.terminal import RENDERING, fetched, note, opened, write, write_json

    text = sys.stdin.read() if prompt == "-" else prompt
    if not text.strip():
        raise RequestError("the prompt is empty", 'give some text: ktcore run MODEL "Why is the sky blue?"')
    if raw and system is not None:
        raise RequestError("--system needs the chat template, which --raw leaves out", "drop one of the two")
    shape = templating.given()
    if raw and shape:
        raise RequestError("a chat template's options need the chat template, which --raw leaves out", "drop --raw")
    draw = sampling.given()
    if not raw and model.exists():
        fetched(RENDERING)
    with opened(model, **loading.given()) as (loaded, load_s):
        stream = _answer(loaded, text, system, raw, max_new_tokens, draw, shape)
        stream.check()  # what is wrong with the prompt is said alone
        if not as_json:
            note(str(loaded.taken))
        pieces = []
        for piece in stream:
            pieces.append(piece)
            if not as_json:
                write(piece)
        stats = stream.stats
        if as_json:
            write_json(
                {
                    "text": "".join(pieces),
                    "prompt_tokens": stats.prompt_tokens,
                    "new_tokens": stats.new_tokens,
                    "prefill_tok_s": stats.prefill_tok_s,
                    "decode_tok_s": stats.decode_tok_s or None,  # one token has no speed of decode
                    "guessed_tokens": stats.guessed_tokens,
                    "right_tokens": stats.right_tokens,
                    "load_s": load_s,
                    "finish": stream.finish.value if stream.finish else None,
                }
            )
            return
        write("\n")
        note(f"{speeds(stats)}, loaded in {load_s:.1f} s")


def _answer(
    model: Model,
    text: str,
    system: str | None,
    raw: bool,
    max_new_tokens: int,
    draw: dict[str, Any],
    shape: dict[str, Any],
) -> TextStream:
    if raw or (model.tokenizer.chat_template is None and system is None and not shape):
        return model.stream(text, max_new_tokens, **draw)
    messages = [{"role": "system", "content": system}] if system is not None else []
    return model.stream_chat([*messages, {"role": "user", "content": text}], max_new_tokens, **shape, **draw)
