"""Loads the tokenizer of a Hugging Face folder: tokenizer.json, its configuration, and the chat template beside it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ktcore.errors import CheckpointError, TokenizerError
from ktcore.text.chat_template import DEFAULT
from ktcore.text.from_tekken import SETTINGS, tekken_from_folder
from ktcore.text.from_tiktoken import kimi_from_folder
from ktcore.text.special import SpecialTokens, shown_tokens
from ktcore.text.tokenizer import Tokenizer
from ktcore.weights.safetensors import read_json

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

# Any of these means that there is a tokenizer, though perhaps one that needs converting.
_SLOW_FILES = ("tokenizer.model", "vocab.json", "tiktoken.model")


def tokenizer_from_folder(path: Path, config: Mapping[str, Any]) -> Tokenizer | None:
    """The tokenizer of a model folder, or None when the folder has none.

    Raises:
        TokenizerError: its files are damaged, or of a kind that cannot be converted.
    """
    settings = _optional_json(path / "tokenizer_config.json")
    if (path / "tokenizer.json").is_file():
        backend = _from_json(path / "tokenizer.json")
    elif (kimi := kimi_from_folder(path, settings, config)) is not None:
        backend = kimi
    elif any((path / name).is_file() for name in _SLOW_FILES):
        backend = _converted(path)
    elif (tekken := tekken_from_folder(path)) is not None:
        backend, settings = tekken, {**SETTINGS, **settings}
    else:
        return None
    generation = _optional_json(path / "generation_config.json")
    return Tokenizer(
        backend, _special(backend, settings, generation, config), _chat_templates(path, settings), str(path)
    )


def _from_json(path: Path) -> Backend:
    from tokenizers import Tokenizer

    try:
        backend: Backend = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare exceptions
        raise TokenizerError(f"{path}: cannot be read: {error}", "fetch it again") from error
    return backend


def _converted(path: Path) -> Backend:
    from transformers import AutoTokenizer

    try:
        # Never code from the folder: a model that needs it must bring a tokenizer.json.
        slow = AutoTokenizer.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
        backend: Backend = slow.backend_tokenizer
    except Exception as error:  # conversion fails in many ways, all of them meaning "not this tokenizer"
        raise TokenizerError(
            f"{path}: has no tokenizer.json, and its tokenizer cannot be converted: {error}",
            "fetch tokenizer.json too, or use a GGUF of the model",
        ) from error
    return backend


def _optional_json(path: Path) -> dict[str, Any]:
    try:
        return read_json(path) if path.is_file() else {}
    except CheckpointError as error:
        raise TokenizerError(error.message, error.hint) from error


def _special(
    backend: Backend, settings: Mapping[str, Any], generation: Mapping[str, Any], config: Mapping[str, Any]
) -> SpecialTokens:
    names = {}
    for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
        value = settings.get(name)
        if isinstance(value, dict):  # a serialised AddedToken
            value = value.get("content")
        if isinstance(value, str):
            names[name] = value
    bos, eos = (backend.token_to_id(names[n]) if n in names else None for n in ("bos_token", "eos_token"))

    stop = {eos} if eos is not None else set()
    for source in (generation, config):
        ids = source.get("eos_token_id")
        stop |= {i for i in (ids if isinstance(ids, list) else [ids]) if isinstance(i, int)}

    added = {token.content: i for i, token in backend.get_added_tokens_decoder().items() if token.special}
    shown = shown_tokens(added)
    # Each flag, where given, overrules what tokenizer.json would add, as llama.cpp has it; DeepSeek's bos token comes
    # only from it. transformers 5 goes by tokenizer.json alone (docs/formats.md).
    if "add_bos_token" not in settings and "add_eos_token" not in settings:
        return SpecialTokens(bos, eos, None, None, frozenset(stop), names, shown)
    around = backend.encode("", add_special_tokens=True).ids
    add_bos = settings.get("add_bos_token", bos in around[:1])
    add_eos = settings.get("add_eos_token", eos in around[-1:])
    prefix = (bos,) if add_bos and bos is not None else ()
    suffix = (eos,) if add_eos and eos is not None else ()
    return SpecialTokens(bos, eos, prefix, suffix, frozenset(stop), names, shown)


def _chat_templates(path: Path, settings: Mapping[str, Any]) -> dict[str, str]:
    """Templates by name; a file of its own beats the configuration, as transformers has it."""
    found = _named(settings.get("chat_template"))
    found |= _named(_optional_json(path / "chat_template.json").get("chat_template"))
    files = {DEFAULT: path / "chat_template.jinja"}
    files |= {file.stem: file for file in sorted(path.glob("additional_chat_templates/*.jinja"))}
    for name, file in files.items():
        if file.is_file():
            try:
                found[name] = file.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise TokenizerError(f"{file}: cannot be read: {error}", "fetch it again") from error
    return found


def _named(template: Any) -> dict[str, str]:
    if isinstance(template, str):
        return {DEFAULT: template}
    if isinstance(template, dict):
        return {name: text for name, text in template.items() if isinstance(text, str)}
    if isinstance(template, list):
        pairs = [(entry.get("name"), entry.get("template")) for entry in template if isinstance(entry, dict)]
        return {name: text for name, text in pairs if isinstance(name, str) and isinstance(text, str)}
    return {}
