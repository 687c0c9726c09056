"""Text to token ids and back, as the checkpoint's own tokenizer does it, with its chat templates and stop tokens."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from threading import Lock
from typing import TYPE_CHECKING, Any

from ktcore.text.bytes import TokenBytes, Utf8Stream, join
from ktcore.text.chat_template import DEFAULT, ChatTemplates, ControlTokens, render
from ktcore.text.special import SpecialTokens

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend


class Tokenizer:
    """Encodes with a `tokenizers` backend, and decodes by the bytes of its tokens.

    Args:
        backend: splits, merges and looks up; knows the added tokens.
        special: special tokens of the model.
        templates: Jinja sources of chat templates by name; one alone is the default.
        where: the checkpoint, for error messages.

    Raises:
        TokenizerError: the backend decodes in a way that is not known.
    """

    def __init__(
        self, backend: Backend, special: SpecialTokens, templates: Mapping[str, str] | str | None, where: str
    ) -> None:
        self._backend = backend
        self._special = special
        self._where = where
        self._templates = ChatTemplates({DEFAULT: templates} if isinstance(templates, str) else templates or {}, where)
        self._control = {i: token.content for i, token in backend.get_added_tokens_decoder().items() if token.special}
        self._hidden = frozenset(self._control) - special.shown
        self._bytes = TokenBytes(backend, where)
        # The backend's switch for control tokens holds for all callers.
        self._lock = Lock()

    @property
    def chat_template(self) -> str | None:
        """Jinja source of the template that a chat takes, or None: there is none, or none is the default."""
        return self._templates.default

    @property
    def chat_templates(self) -> Mapping[str, str]:
        """Jinja sources of all templates by name."""
        return self._templates.named

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
    def special_names(self) -> Mapping[str, str]:
        """What a chat template knows as ``bos_token``, ``eos_token`` and so on."""
        return self._special.names

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included; the model's logits may be padded beyond it."""
        return int(self._backend.get_vocab_size())

    def token_id(self, token: str) -> int | None:
        """The id of a token by its spelling in the vocabulary, or None."""
        found: int | None = self._backend.token_to_id(token)
        return found

    def vocabulary(self) -> dict[str, int]:
        """Ids of all tokens by their spelling, added ones included."""
        return dict(self._backend.get_vocab(with_added_tokens=True))

    def is_control(self, token_id: int) -> bool:
        """Whether the token is control, not text: left out of decoding unless asked for."""
        return token_id in self._hidden

    def encode(self, text: str, add_special: bool = True, parse_special: bool = True) -> list[int]:
        """Token ids of a text.

        Args:
            add_special: put the bos (and eos) token around it if the model was trained that way.
            parse_special: take control tokens that the text spells out as such; without, they are text like any
                other, which is the thing for text from outside. User-defined tokens are matched either way.
        """
        by_backend = add_special and self._special.prefix is None
        with self._lock:
            self._backend.encode_special_tokens = not parse_special
            ids: list[int] = self._backend.encode(_valid(text), add_special_tokens=by_backend).ids
        if not add_special or by_backend:
            return ids
        return [*(self._special.prefix or ()), *ids, *(self._special.suffix or ())]

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """Text of token ids; bytes that are not UTF-8 become U+FFFD, ids outside the vocabulary nothing."""
        return join((self.token_bytes(i, skip_special) for i in ids), self._bytes.leading_spaces)

    def token_bytes(self, token_id: int, skip_special: bool = False) -> bytes:
        """The bytes a token adds to the text: perhaps a part of a character, none for an id outside the vocabulary."""
        return b"" if skip_special and token_id in self._hidden else self._bytes(token_id)

    def stream_decoder(self, skip_special: bool = True, shown: frozenset[int] = frozenset()) -> StreamDecoder:
        """A decoder that takes ids one at a time.

        Args:
            shown: control tokens that are not skipped.
        """
        return StreamDecoder(self, skip_special, self._bytes.leading_spaces, shown)

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        template: str | None = None,
        **variables: Any,
    ) -> str:
        """The conversation as the text that the model expects.

        Args:
            messages: each with `role` and `content`.
            add_generation_prompt: end with the opening of the assistant's turn.
            tools: JSON schemas of callable tools, for templates that know them.
            documents: texts to answer from, for templates that know them.
            template: name of one of :attr:`chat_templates`, or a Jinja source; otherwise the one for tools where
                there are tools and the checkpoint has one, or the default.
            variables: further variables for the template, such as `enable_thinking`.

        Raises:
            TokenizerError: the checkpoint has no such chat template, or a broken one.
            RequestError: the template refuses these messages.
        """
        source = self._templates.choose(template, with_tools=bool(tools))
        everything = {
            **self._special.names,
            "add_generation_prompt": add_generation_prompt,
            "tools": None if tools is None else [dict(tool) for tool in tools],
            "documents": None if documents is None else [dict(document) for document in documents],
            **variables,
        }
        return render(source, messages, everything, self._where)

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        template: str | None = None,
        **variables: Any,
    ) -> list[int]:
        """Token ids of a conversation, with the arguments of :meth:`apply_chat_template`.

        The template writes control tokens, the bos token among them. In messages, tools and documents their
        spellings are mere text, so nobody can end a turn from within one; only the assistant's messages may hold any.
        """
        said = {"messages": messages, "tools": tools, "documents": documents}
        said, mark = self._control_tokens.disarm(said)
        text = self.apply_chat_template(
            said["messages"], add_generation_prompt, said["tools"], said["documents"], template, **variables
        )
        if mark is None:
            return self.encode(text, add_special=False)
        stretches = self._control_tokens.split(text, mark)
        return [i for part, counts in stretches for i in self.encode(part, add_special=False, parse_special=counts)]

    @cached_property
    def _control_tokens(self) -> ControlTokens:
        return ControlTokens(self._control.values())


class StreamDecoder:
    """Turns ids into text as they come, holding back a character until its last byte is there.

    The pieces of all :meth:`push` calls and one :meth:`flush` make up what :meth:`Tokenizer.decode` gives at once.
    """

    def __init__(
        self, tokenizer: Tokenizer, skip_special: bool, leading_spaces: int, shown: frozenset[int] = frozenset()
    ) -> None:
        self._tokenizer, self._skip, self._leading = tokenizer, skip_special, leading_spaces
        self._shown = shown
        self._text = Utf8Stream(leading_spaces)

    def push(self, token_id: int) -> str:
        """The text that this id completes; empty while a character is unfinished."""
        skip = self._skip and token_id not in self._shown
        return self._text.push(self._tokenizer.token_bytes(token_id, skip))

    def flush(self) -> str:
        """What is still held back, as U+FFFD if it never became a character. The decoder is as new afterwards."""
        text = self._text.push(b"", final=True)
        self._text = Utf8Stream(self._leading)
        return text


def _valid(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        # Lone surrogates come in through JSON escapes; a pair of them is a character cut in two.
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
