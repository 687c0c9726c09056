"""Kimi's and Moonlight's tokenizer from a model folder: ranks in tiktoken.model, the rest in code that is not run."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ktcore.errors import TokenizerError
from ktcore.text.pre_tokenizers import PRE_TOKENIZERS, byte_level_splits

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

FILE = "tiktoken.model"
_CLASS = "TikTokenTokenizer"
# How many ids after the ranks are special where the configuration names no vocabulary size.
_RESERVED = 256
_HINT = "fetch a tokenizer.json for the model, or use a GGUF of it"


def kimi_from_folder(path: Path, settings: Mapping[str, Any], config: Mapping[str, Any]) -> Backend | None:
    """The tokenizer of Moonshot's models (tokenization_kimi.py beside the weights), or None for other folders.

    Args:
        settings: tokenizer_config.json, with the special tokens and their ids.
        config: config.json, for the size of the vocabulary.

    Raises:
        TokenizerError: the files are damaged, or the code beside them splits text in another way.
    """
    if settings.get("tokenizer_class") != _CLASS or not (path / FILE).is_file():
        return None
    for code in sorted(path.glob("tokenization_*.py")):
        if r"[\p{Han}]+" not in code.read_text(encoding="utf-8", errors="replace"):
            raise TokenizerError(f"{code}: splits text in a way that is not Kimi's", _HINT)
    ranks = read_ranks(path / FILE)
    size = config.get("vocab_size")
    size = size if isinstance(size, int) and size > len(ranks) else len(ranks) + _RESERVED
    backend = byte_level_from_ranks(ranks, "kimi-k2")
    _add_special(backend, settings, range(len(ranks), size), str(path))
    return backend


def read_ranks(path: Path) -> list[bytes]:
    """The tokens of a tiktoken file, in the order of their ranks: a base64 text and a rank on each line.

    Raises:
        TokenizerError: a line is malformed, or the ranks are not 0, 1, 2 and so on.
    """
    ranks: dict[int, bytes] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            ranks[int(rank)] = base64.b64decode(token, validate=True)
        except (ValueError, binascii.Error) as error:
            raise TokenizerError(
                f"{path}: line {number} is not a token and its rank: {error}", "fetch it again"
            ) from error
    if sorted(ranks) != list(range(len(ranks))) or len(set(ranks.values())) != len(ranks) or len(ranks) < 256:
        raise TokenizerError(
            f"{path}: its {len(ranks)} ranks are not those of different tokens from 0 on", "fetch it again"
        )
    return [ranks[rank] for rank in range(len(ranks))]


def byte_level_from_ranks(ranks: list[bytes], pre: str, before: Sequence[str] = ()) -> Backend:
    """A byte-level BPE that merges as tiktoken does: of all neighbours those whose union has the lowest rank.

    Args:
        before: special tokens that have the first ids.
    """
    from tokenizers import Tokenizer, decoders
    from tokenizers.models import BPE

    from ktcore.text.bytes import byte_alphabet

    letters = {byte: letter for letter, byte in byte_alphabet().items()}
    tokens = ["".join(letters[byte] for byte in token) for token in ranks]
    vocab = {token: len(before) + rank for rank, token in enumerate(tokens)}
    merges = [
        (token[:cut], token[cut:])
        for token in tokens
        for cut in range(1, len(token))
        if token[:cut] in vocab and token[cut:] in vocab
    ]
    # tiktoken looks a piece up before it merges
    vocab |= {name: i for i, name in enumerate(before)}
    backend: Backend = Tokenizer(BPE(vocab=vocab, merges=merges, ignore_merges=True))
    backend.pre_tokenizer = byte_level_splits(PRE_TOKENIZERS[pre])
    backend.decoder = decoders.ByteLevel()
    return backend


def _add_special(backend: Backend, settings: Mapping[str, Any], ids: range, where: str) -> None:
    from tokenizers import AddedToken

    named = settings.get("added_tokens_decoder", {})
    for i in ids:
        entry = named.get(str(i), {"content": f"<|reserved_token_{i}|>", "special": True})
        token = AddedToken(entry["content"], normalized=False, special=bool(entry.get("special")))
        add = backend.add_special_tokens if token.special else backend.add_tokens
        add([token])
        if backend.token_to_id(token.content) != i:
            raise TokenizerError(
                f"{where}: special token {token.content!r} has id {i}, but is another token too", _HINT
            )
