"""Mistral's Tekken tokenizer from a folder's tekken.json: ranks, special tokens before them, and one pattern.

Ids are the special tokens' first, then the ranks (mistral_common, tokens/tokenizers/tekken.py). A text begins with the
bos token, as mistral-common and transformers have it.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ktcore.errors import CheckpointError, TokenizerError
from ktcore.text.from_tiktoken import byte_level_from_ranks
from ktcore.text.pre_tokenizers import PRE_TOKENIZERS
from ktcore.weights.safetensors import read_json

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

FILE = "tekken.json"
_HINT = "fetch a tokenizer.json for the model, or use a GGUF of it"
# Files of versions up to v7 may leave them out (Tekkenizer.DEPRECATED_SPECIAL_TOKENS).
_SPECIAL = (
    *("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]"),
    *("[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]", "[PREFIX]", "[MIDDLE]"),
    *("[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]"),
)
_EARLY = frozenset(("v1", "v2", "v3", "v7"))
SETTINGS: Mapping[str, Any] = {
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "pad_token": "<pad>",
    "add_bos_token": True,
}
"""What tokenizer_config.json would say."""


def tekken_from_folder(path: Path) -> Backend | None:
    """The tokenizer of a folder with a tekken.json, or None for other folders.

    Raises:
        TokenizerError: the file is damaged, or splits text in another way.
    """
    file = path / FILE
    if not file.is_file():
        return None
    try:
        data = read_json(file)
    except CheckpointError as error:
        raise TokenizerError(error.message, error.hint) from error
    config = data.get("config")
    if not isinstance(config, Mapping):
        raise TokenizerError(f"{file}: has no config", "fetch it again")
    if config.get("pattern") not in PRE_TOKENIZERS["tekken"].patterns:
        raise TokenizerError(
            f"{file}: splits text by {config.get('pattern')!r:.80}, which is not Tekken's pattern", _HINT
        )
    size, reserved = (config.get(key) for key in ("default_vocab_size", "default_num_special_tokens"))
    if type(size) is not int or type(reserved) is not int or not 0 <= reserved < size:
        raise TokenizerError(f"{file}: a vocabulary of {size!r} with {reserved!r} special tokens", "fetch it again")
    special = _special(file, data.get("special_tokens"), str(config.get("version")), reserved)
    backend = byte_level_from_ranks(_ranks(file, data.get("vocab"), size - reserved), "tekken", special)
    _add(backend, special, data.get("special_tokens"))
    return backend


def _ranks(file: Path, vocab: Any, count: int) -> list[bytes]:
    """Tokens in the order of their ranks; the file may hold more than the model has."""
    if not isinstance(vocab, list) or len(vocab) < count or count < 256:
        found = len(vocab) if isinstance(vocab, list) else "no"
        raise TokenizerError(f"{file}: {found} tokens, where its config asks for {count}", "fetch it again")
    tokens = []
    for rank, entry in enumerate(vocab[:count]):
        try:
            if entry["rank"] != rank:
                raise ValueError(f"its rank is {entry['rank']!r}")
            tokens.append(base64.b64decode(entry["token_bytes"], validate=True))
        except (KeyError, TypeError, ValueError, binascii.Error) as error:
            raise TokenizerError(f"{file}: token {rank} cannot be read: {error}", "fetch it again") from error
    if len(set(tokens)) != len(tokens):
        raise TokenizerError(f"{file}: some of its {count} tokens are the same", "fetch it again")
    return tokens


def _special(file: Path, entries: Any, version: str, reserved: int) -> list[str]:
    """Names of the special tokens by id; what the file does not name is `<SPECIAL_n>`."""
    if entries is None:
        if version not in _EARLY:
            raise TokenizerError(f"{file}: version {version} without special_tokens", "fetch it again")
        named = dict(enumerate(_SPECIAL))
    else:
        try:
            named = {int(entry["rank"]): str(entry["token_str"]) for entry in entries}
        except (KeyError, TypeError, ValueError) as error:
            raise TokenizerError(f"{file}: special_tokens cannot be read: {error}", "fetch it again") from error
    if any(not 0 <= rank < reserved for rank in named):
        raise TokenizerError(
            f"{file}: a special token beyond the {reserved} that its config reserves", "fetch it again"
        )
    names = [named.get(rank, f"<SPECIAL_{rank}>") for rank in range(reserved)]
    if len(set(names)) != reserved:
        raise TokenizerError(f"{file}: two special tokens have the same name", "fetch it again")
    return names


def _add(backend: Backend, names: list[str], entries: Any) -> None:
    from tokenizers import AddedToken

    control = {entry["token_str"]: bool(entry.get("is_control", True)) for entry in entries or ()}
    for name in names:
        special = control.get(name, True)
        add = backend.add_special_tokens if special else backend.add_tokens
        add([AddedToken(name, normalized=False, special=special)])
