"""`ktcore chat`: a conversation in the terminal."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ktcore.cli import groups as g
from ktcore.cli import options as o
from ktcore.cli import templating as t
from ktcore.cli.conversation import Conversation, Message
from ktcore.errors import RequestError, TokenizerError

if TYPE_CHECKING:
    from ktcore.engine.model import Model

PROMPT = "> "
HELP = """/clear        forget the conversation
/system TEXT  set the system message; without TEXT remove it
/help         this list
/exit         leave; so does Ctrl-D
Ctrl-C stops an answer and keeps what was said so far."""


@g.grouped
def chat(
    *,
    model: o.ModelArgument,
    max_new_tokens: o.NewTokensOption = 1024,
    sampling: g.Sampling,
    system: o.SystemOption = None,
    templating: t.Templating,
    loading: g.LoadingForMany,
) -> None:
    """Hold a conversation; the model sees all of it, through its own chat template.

    /help lists what can be typed besides messages. Ctrl-C stops an answer, Ctrl-D leaves. When the conversation
    outgrows the context, the oldest turns are dropped, and a note says so.

    \b
      ktcore chat model.gguf --system "You are a patient teacher."
    """
    from ktcore.cli.terminal import RENDERING, fetched, note, opened

    draw = sampling.given()
    shape = templating.given()
    if model.exists():
        fetched(RENDERING)
    with opened(model, **loading.given()) as (loaded, _):
        if loaded.tokenizer.chat_template is None and templating.template is None:
            raise TokenizerError(f"{model} has no chat template", "use `ktcore run`, or an instruction-tuned model")
        note(str(loaded.taken))
        Session(loaded, Conversation(system), max_new_tokens, draw, shape).hold()


@dataclass
class Session:
    """A conversation with its model, fed line by line from stdin.

    Attributes:
        draw: sampling options.
        shape: template, its variables, tools and documents, as far as they are given.
    """

    model: Model
    conversation: Conversation
    max_new_tokens: int
    draw: dict[str, Any]
    shape: dict[str, Any]

    def hold(self) -> None:
        """Until /exit or the end of input."""
        from ktcore.cli.terminal import note

        if sys.stdin.isatty():
            note("/help lists the commands, Ctrl-D leaves.")
        while (line := _read_line()) is not None:
            text = line.strip()
            if text in ("/exit", "/quit", "/bye"):
                return
            if text.startswith("/"):
                self._command(text)
            elif text:
                self._answer(text)

    def _command(self, text: str) -> None:
        from ktcore.cli.terminal import note

        word, _, rest = text.partition(" ")
        if word == "/clear":
            self.conversation.clear()
            note("The conversation is forgotten.")
        elif word == "/system":
            self.conversation.system = rest.strip() or None
            note("The system message is set." if self.conversation.system else "There is no system message now.")
        elif word == "/help":
            note(HELP)
        else:
            note(f"{word} is no command.\n{HELP}")

    def _answer(self, text: str) -> None:
        from ktcore.cli.interrupt import noticing_interrupts
        from ktcore.cli.measure import speeds
        from ktcore.cli.terminal import note, show_error, write

        self.conversation.add("user", text)
        pieces: list[str] = []
        with noticing_interrupts() as interrupted:
            try:
                self._make_room()
                stream = self.model.stream_chat(
                    self.conversation.messages, self.max_new_tokens, **self.shape, **self.draw
                )
                for piece in stream:
                    pieces.append(piece)
                    write(piece)
                    if interrupted:
                        break
                write("\n")
            except RequestError as error:
                show_error(error)
            except KeyboardInterrupt:
                write("\n")
        if interrupted:
            note("(stopped)")
        elif pieces and sys.stderr.isatty():
            note(speeds(stream.stats))
        if pieces:
            self.conversation.add("assistant", "".join(pieces))
        else:
            self.conversation.take_back()

    def _make_room(self) -> None:
        from ktcore.cli.terminal import note

        limit = self.model.context
        alone = Conversation(self.conversation.system, self.conversation.turns[-1:])
        if self._count(alone.messages) > limit:
            return  # dropping others would not help, and the engine says what is wrong
        # an answer gets a quarter of the context at least, or what it may take
        dropped = self.conversation.shorten(self._count, limit - min(self.max_new_tokens, limit // 4))
        if dropped:
            note(
                f"(the {dropped} oldest messages were dropped: the conversation outgrew the context of {limit} tokens)"
            )

    def _count(self, messages: list[Message]) -> int:
        shape = dict(self.shape)
        variables = shape.pop("variables", {})
        return len(self.model.tokenizer.encode_chat(messages, **shape, **variables))


def _read_line() -> str | None:
    """The next line; None at the end of input. A prompt is shown to people only."""
    from ktcore.cli.terminal import note, write

    if not sys.stdin.isatty():
        return sys.stdin.readline() or None
    import readline  # noqa: F401 - gives input() its line editing and history

    while True:
        try:
            return input(PROMPT)
        except EOFError:
            write("\n")
            return None
        except KeyboardInterrupt:
            write("\n")
            note("(Ctrl-D leaves)")
