"""The bytes that each token stands for, by the kind of its decoder: text is made from them, whole or as it streams."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from ktcore.errors import TokenizerError

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
# Steps of a decoder that change no token's bytes: they say how to join tokens, or what is done here anyway.
_WITHOUT_EFFECT = frozenset(("Fuse", "ByteFallback"))


class TokenBytes:
    """Looks up what a token adds to the text, as bytes: a character may be spread over several tokens.

    Added tokens, control and user-defined, stand for their own spelling.

    Args:
        backend: gives the spelling of an id, the added tokens and the kind of decoder.
        where: the checkpoint, for error messages.

    Raises:
        TokenizerError: the decoder is of a kind whose bytes are not known.
    """

    def __init__(self, backend: Backend, where: str) -> None:
        self._backend = backend
        self._added: dict[int, str] = {i: token.content for i, token in backend.get_added_tokens_decoder().items()}
        self._known: dict[int, bytes] = {}
        steps = _steps(backend, where)
        self._alphabet = byte_alphabet() if any(step["type"] == "ByteLevel" for step in steps) else None
        self._replaced = [(step["pattern"]["String"], step["content"]) for step in steps if step["type"] == "Replace"]
        self._fallback = any(step["type"] == "ByteFallback" for step in steps)
        #: Spaces that are not part of the text where it begins: SentencePiece puts one before the first word.
        self.leading_spaces = sum(step["start"] for step in steps if step["type"] == "Strip")

    def __call__(self, token_id: int) -> bytes:
        """The bytes of a token; none for an id outside the vocabulary."""
        found = self._known.get(token_id)
        if found is None:
            found = self._known[token_id] = self._look_up(token_id)
        return found

    def _look_up(self, token_id: int) -> bytes:
        if not 0 <= token_id < 2**32:
            return b""
        if token_id in self._added:
            return self._added[token_id].encode()
        token: str | None = self._backend.id_to_token(token_id)
        if token is None:
            return b""
        if self._alphabet is not None:
            if all(letter in self._alphabet for letter in token):
                return bytes(self._alphabet[letter] for letter in token)
            return token.encode()
        if self._fallback and (byte := _BYTE.fullmatch(token)):
            return bytes((int(byte[1], 16),))
        for old, new in self._replaced:
            token = token.replace(old, new)
        return token.encode()


class Utf8Stream:
    """Turns bytes into text as they come, holding back a character until its last byte is there.

    The pieces are, put together, what decoding all the bytes at once gives: bytes that are not UTF-8 become U+FFFD.

    Args:
        leading_spaces: so many spaces are left out where the text begins.
    """

    def __init__(self, leading_spaces: int = 0) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._leading = leading_spaces

    def push(self, data: bytes, final: bool = False) -> str:
        """The characters that these bytes complete; with `final`, also U+FFFD for one left unfinished."""
        text = self._decoder.decode(data, final)
        if self._leading:
            kept = text.lstrip(" ")
            cut = min(self._leading, len(text) - len(kept))
            # Only an unbroken run of spaces at the very start counts.
            self._leading = 0 if kept or cut == self._leading else self._leading - cut
            text = text[cut:]
        return text


def join(pieces: Iterable[bytes], leading_spaces: int = 0) -> str:
    """The text of all pieces at once."""
    return Utf8Stream(leading_spaces).push(b"".join(pieces), final=True)


def _steps(backend: Backend, where: str) -> list[Mapping[str, Any]]:
    decoder = backend.decoder
    outer: dict[str, Any] = json.loads(decoder.__getstate__()) if decoder is not None else {"type": "nothing"}
    steps: list[Mapping[str, Any]] = outer["decoders"] if outer["type"] == "Sequence" else [outer]
    steps = [part for step in steps for part in _parts_of_metaspace(step)]
    for step in steps:
        known = step["type"] == "ByteLevel" or step["type"] in _WITHOUT_EFFECT
        known |= step["type"] == "Replace" and "String" in step["pattern"]
        known |= step["type"] == "Strip" and step["content"] == " " and not step["stop"]
        if not known:
            raise TokenizerError(
                f"{where}: its tokenizer decodes by {step['type']}, which is not supported",
                "known decoders: byte level, SentencePiece (Replace, ByteFallback, Fuse, Strip), Metaspace",
            )
    return steps


def _parts_of_metaspace(step: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    if step["type"] != "Metaspace":
        return [step]
    space = {"type": "Replace", "pattern": {"String": step["replacement"]}, "content": " "}
    if step.get("prepend_scheme", "always") == "never":
        return [space]
    return [space, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]


def byte_alphabet() -> dict[str, int]:
    """GPT-2's letters for bytes: printable ones stand for themselves, the others for U+0100 on, in order."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}
