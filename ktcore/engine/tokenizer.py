"""Text to token ids and back, as the checkpoint's own tokenizer does it, with its chat template and stop tokens."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ktcore.errors import RequestError, TokenizerError
from ktcore.weights.checkpoint import Checkpoint

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

# A character takes at most 4 bytes, so at most 4 tokens: a longer wait for its end would be in vain.
_LONGEST_WAIT = 4
_BROKEN = "\ufffd"


def load_tokenizer(checkpoint: Checkpoint) -> Tokenizer | None:
    """The tokenizer that a checkpoint carries, or None when it carries none.

    Raises:
        TokenizerError: it has one, but of a kind that cannot be rebuilt; the message names the kind.
    """
    if checkpoint.kind == "gguf":
        from ktcore.engine.tokenizer_gguf import tokenizer_from_metadata

        return tokenizer_from_metadata(checkpoint.config, str(checkpoint.path))
    from ktcore.engine.tokenizer_hf import tokenizer_from_folder

    return tokenizer_from_folder(checkpoint.path, checkpoint.config)


@dataclass(frozen=True)
class SpecialTokens:
    """Tokens with a meaning beyond text.

    Args:
        bos, eos: ids of the first and last token of a text, where the model has them.
        prefix, suffix: ids put around a text that is encoded with `add_special`; None leaves it to the backend.
        stop: ids that end a generation.
        names: strings a chat template may use: ``bos_token``, ``eos_token`` and so on.
    """

    bos: int | None = None
    eos: int | None = None
    prefix: tuple[int, ...] | None = ()
    suffix: tuple[int, ...] | None = ()
    stop: frozenset[int] = frozenset()
    names: Mapping[str, str] = field(default_factory=dict)


class Tokenizer:
    """Encodes and decodes with a `tokenizers` backend; control tokens inside a text are taken as such.

    Args:
        backend: splits, merges and looks up; knows the added tokens.
        special: special tokens of the model.
        chat_template: Jinja source, or None.
        where: the checkpoint, for error messages.
    """

    def __init__(self, backend: Backend, special: SpecialTokens, chat_template: str | None, where: str) -> None:
        self._backend = backend
        self._special = special
        self.chat_template = chat_template
        self._where = where
        self._control = frozenset(i for i, t in backend.get_added_tokens_decoder().items() if t.special)

    @property
    def stop_ids(self) -> frozenset[int]:
        """Ids that end a generation: end of sequence, of turn, of message."""
        return self._special.stop

    @property
    def bos_id(self) -> int | None:
        """Id of the token that begins a text, if the model has one."""
        return self._special.bos

    @property
    def eos_id(self) -> int | None:
        """Id of the token that ends a text, if the model has one."""
        return self._special.eos

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included; the model's logits may be padded beyond it."""
        return int(self._backend.get_vocab_size(with_added_tokens=True))

    def token_id(self, token: str) -> int | None:
        """The id of a token by its spelling in the vocabulary, or None."""
        found: int | None = self._backend.token_to_id(token)
        return found

    def is_control(self, token_id: int) -> bool:
        """Whether the token is control, not text: left out of decoding unless asked for."""
        return token_id in self._control

    def encode(self, text: str, add_special: bool = True) -> list[int]:
        """Token ids of a text.

        Args:
            add_special: put the bos (and eos) token around it if the model was trained that way.
        """
        by_backend = add_special and self._special.prefix is None
        ids: list[int] = self._backend.encode(_valid(text), add_special_tokens=by_backend).ids
        if not add_special or by_backend:
            return ids
        return [*(self._special.prefix or ()), *ids, *(self._special.suffix or ())]

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """Text of token ids; bytes that are not UTF-8 become U+FFFD, ids outside the vocabulary nothing."""
        known = [i for i in ids if 0 <= i < 2**32]
        text: str = self._backend.decode(known, skip_special_tokens=skip_special)
        return text

    def stream_decoder(self, skip_special: bool = True) -> StreamDecoder:
        """A decoder that takes ids one at a time."""
        return StreamDecoder(self, skip_special)

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """The conversation as the text that the model expects.

        Args:
            messages: each with `role` and `content`.
            add_generation_prompt: end with the opening of the assistant's turn.
            tools: JSON schemas of callable tools, for templates that know them.
            variables: further variables for the template, such as `enable_thinking`.

        Raises:
            TokenizerError: the checkpoint has no chat template, or a broken one.
            RequestError: the template refuses these messages.
        """
        if self.chat_template is None:
            raise TokenizerError(
                f"{self._where}: has no chat template", "send a plain prompt, or use an instruction-tuned model"
            )
        # Costs a second and only chats need it. It runs templates, which are untrusted code, in Jinja's sandbox.
        from jinja2.exceptions import TemplateSyntaxError
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            texts, _ = render_jinja_template(
                conversations=[[dict(message) for message in messages]],
                tools=None if tools is None else [dict(tool) for tool in tools],
                chat_template=self.chat_template,
                add_generation_prompt=add_generation_prompt,
                **{**self._special.names, **variables},
            )
        except TemplateSyntaxError as error:
            raise TokenizerError(f"{self._where}: its chat template is broken: {error}") from error
        except Exception as error:  # a template can fail in any way that Python code can
            raise RequestError(f"the model's chat template cannot render these messages: {error}") from error
        text: str = texts[0]
        return text

    def encode_chat(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True, **variables: Any
    ) -> list[int]:
        """Token ids of a conversation. The template writes the bos token itself where the model wants one."""
        text = self.apply_chat_template(messages, add_generation_prompt, **variables)
        return self.encode(text, add_special=False)


class StreamDecoder:
    """Turns ids into text as they come, holding back a character until its last byte is there.

    The pieces of all :meth:`push` calls and one :meth:`flush` make up what :meth:`Tokenizer.decode` gives at once.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special: bool) -> None:
        self._tokenizer, self._skip = tokenizer, skip_special
        # Ids before `_done` are out as text, and stay only as context: a first token may decode differently.
        self._ids: list[int] = []
        self._done = 0

    def push(self, token_id: int) -> str:
        """The text that this id completes; empty while a character is unfinished."""
        if self._skip and self._tokenizer.is_control(token_id):
            return ""
        self._ids.append(token_id)
        text = self._pending()
        if not text or (text.endswith(_BROKEN) and len(self._ids) - self._done <= _LONGEST_WAIT):
            return ""
        # Keep what was just put out as the next piece's context.
        self._ids = self._ids[self._done :]
        self._done = len(self._ids)
        return text

    def flush(self) -> str:
        """What is still held back, as U+FFFD if it never became a character. The decoder is as new afterwards."""
        text = self._pending()
        self._ids, self._done = [], 0
        return text

    def _pending(self) -> str:
        context = self._tokenizer.decode(self._ids[: self._done], self._skip)
        return self._tokenizer.decode(self._ids, self._skip)[len(context) :]


def _valid(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        # Lone surrogates come in through JSON escapes; a pair of them is a character cut in two.
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
