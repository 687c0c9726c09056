"""Rebuilds a tokenizer from GGUF metadata: byte-level BPE (``gpt2``) and SentencePiece BPE (``llama``)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ktcore.errors import TokenizerError
from ktcore.text.chat_template import DEFAULT
from ktcore.text.pre_tokenizers import PRE_TOKENIZERS, PreTokenizer, byte_level_splits
from ktcore.text.special import (
    CONTROL,
    NORMAL,
    UNKNOWN,
    USER_DEFINED,
    mend_kinds,
    special_from_metadata,
)
from ktcore.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

_SPACE = "▁"


def tokenizer_from_metadata(config: Mapping[str, Any], where: str) -> Tokenizer | None:
    """The tokenizer that GGUF metadata describes, or None when it describes none.

    Raises:
        TokenizerError: an unknown model or pre-tokenizer, or metadata that does not fit together.
    """
    model = config.get("tokenizer.ggml.model")
    if model is None or model in ("none", "no_vocab"):
        return None
    tokens = _tokens(config, where)
    kinds = _kinds(config, len(tokens), where)
    pre, merges = PreTokenizer(()), []
    if isinstance(whole := config.get("tokenizer.huggingface.json"), str):
        backend = _whole(whole, where)
    elif model == "gpt2":
        pre, merges = _pre_tokenizer(config, where), _merges(config, where)
        backend = _byte_level(tokens, merges, pre, where)
    elif model == "llama":
        pre = PreTokenizer((), add_bos=True)
        merges = _merges_from_scores(config, tokens, kinds, where)
        backend = _sentencepiece(config, tokens, merges, where)
    else:
        raise TokenizerError(
            f"{where}: tokenizer model {model!r} is not supported", "known models: gpt2 (byte-level BPE), llama"
        )
    kinds = mend_kinds(config, tokens, kinds, (left + right for left, right in merges))
    _add_special_tokens(backend, tokens, kinds)
    special = special_from_metadata(
        config, tokens, kinds, default_bos=pre.add_bos, sentencepiece=model == "llama", where=where
    )
    return Tokenizer(backend, special, _chat_templates(config), where)


def _chat_templates(config: Mapping[str, Any]) -> dict[str, str]:
    """The default template and the named ones: ``tokenizer.chat_template.NAME``."""
    key = "tokenizer.chat_template"
    found = {name.removeprefix(f"{key}."): text for name, text in config.items() if name.startswith(f"{key}.")}
    found |= {DEFAULT: config[key]} if key in config else {}
    return {name: text for name, text in found.items() if isinstance(text, str)}


def _tokens(config: Mapping[str, Any], where: str) -> list[str]:
    tokens = config.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, Sequence) or isinstance(tokens, str) or not len(tokens):
        raise TokenizerError(f"{where}: names a tokenizer model, but has no tokenizer.ggml.tokens")
    named = [token or f"[EMPTY_{i}]" for i, token in enumerate(tokens)]
    if not all(isinstance(token, str) for token in named):
        raise TokenizerError(f"{where}: tokenizer.ggml.tokens must hold strings")
    if len(set(named)) != len(named):
        seen: dict[str, int] = {}
        first, i = next((seen[t], i) for i, t in enumerate(named) if seen.setdefault(t, i) != i)
        raise TokenizerError(f"{where}: tokens {first} and {i} are both {named[i]!r}")
    return named


def _kinds(config: Mapping[str, Any], count: int, where: str) -> Sequence[int]:
    kinds = config.get("tokenizer.ggml.token_type")
    if kinds is None:
        return [NORMAL] * count
    if not _numbers(kinds, count):
        raise TokenizerError(f"{where}: tokenizer.ggml.token_type does not give a type for each of {count} tokens")
    return list(kinds)


def _numbers(values: Any, count: int) -> bool:
    """Whether these are at least `count` numbers."""
    plain = isinstance(values, Sequence) and not isinstance(values, str)
    return plain and len(values) >= count and all(isinstance(value, (int, float)) for value in values)


def _pre_tokenizer(config: Mapping[str, Any], where: str) -> PreTokenizer:
    name = config.get("tokenizer.ggml.pre", "default")
    if not isinstance(name, str) or name not in PRE_TOKENIZERS:
        raise TokenizerError(
            f"{where}: pre-tokenizer {name!r} is unknown, and a guess would give wrong token ids",
            f"known: {', '.join(PRE_TOKENIZERS)}",
        )
    return PRE_TOKENIZERS[name]


def _merges(config: Mapping[str, Any], where: str) -> list[tuple[str, str]]:
    merges = config.get("tokenizer.ggml.merges")
    if not isinstance(merges, Sequence) or isinstance(merges, str):
        raise TokenizerError(f"{where}: a BPE vocabulary without tokenizer.ggml.merges")
    pairs = []
    for merge in merges:
        # The second character on: a token may be the separator itself.
        at = merge.find(" ", 1) if isinstance(merge, str) else -1
        if at < 0:
            raise TokenizerError(f"{where}: merge {merge!r} is not two tokens with a space between")
        pairs.append((merge[:at], merge[at + 1 :]))
    return pairs


def _byte_level(tokens: list[str], merges: list[tuple[str, str]], pre: PreTokenizer, where: str) -> Backend:
    from tokenizers import decoders

    backend = _bpe(
        where, vocab=dict(zip(tokens, range(len(tokens)), strict=True)), merges=merges, ignore_merges=pre.ignore_merges
    )
    backend.pre_tokenizer = byte_level_splits(pre)
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece(config: Mapping[str, Any], tokens: list[str], merges: list[tuple[str, str]], where: str) -> Backend:
    from tokenizers import decoders, normalizers

    unknown = config.get("tokenizer.ggml.unknown_token_id", 0)
    backend = _bpe(
        where,
        vocab=dict(zip(tokens, range(len(tokens)), strict=True)),
        merges=merges,
        unk_token=tokens[unknown] if isinstance(unknown, int) and 0 <= unknown < len(tokens) else None,
        fuse_unk=True,
        byte_fallback=True,
    )
    # A space goes before every stretch of text between control tokens, also before one that starts with a space.
    prefix = bool(config.get("tokenizer.ggml.add_space_prefix", True))
    spaces = normalizers.Replace(" ", _SPACE)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), spaces]) if prefix else spaces
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    return backend


def _merges_from_scores(
    config: Mapping[str, Any], tokens: list[str], kinds: Sequence[int], where: str
) -> list[tuple[str, str]]:
    """SentencePiece joins the neighbours whose union has the best score: every way to build a token is a merge."""
    scores: Any = config.get("tokenizer.ggml.scores")
    if not _numbers(scores, len(tokens)):
        raise TokenizerError(f"{where}: a SentencePiece vocabulary without a score for each token")
    vocab = dict(zip(tokens, range(len(tokens)), strict=True))
    scores, ranked = list(scores), []
    for token, i in vocab.items():
        if kinds[i] not in (NORMAL, USER_DEFINED):
            continue
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in vocab and right in vocab:
                ranked.append((-scores[i], i, vocab[left], left, right))
    ranked.sort()
    return [(left, right) for *_, left, right in ranked]


def _bpe(where: str, **arguments: Any) -> Backend:
    from tokenizers import Tokenizer
    from tokenizers.models import BPE

    try:
        backend: Backend = Tokenizer(BPE(**arguments))
    except Exception as error:  # the library raises bare exceptions
        raise TokenizerError(f"{where}: the vocabulary and its merges do not fit together: {error}") from error
    return backend


def _whole(text: str, where: str) -> Backend:
    from tokenizers import Tokenizer

    try:
        backend: Backend = Tokenizer.from_str(text)
    except Exception as error:  # the library raises bare exceptions
        raise TokenizerError(f"{where}: tokenizer.huggingface.json cannot be read: {error}") from error
    return backend


def _add_special_tokens(backend: Backend, tokens: list[str], kinds: Sequence[int]) -> None:
    """Control and user-defined tokens are matched whole in any text; only control tokens are left out of decoding."""
    from tokenizers import AddedToken

    def of(*wanted: int) -> list[AddedToken]:
        return [AddedToken(t, normalized=False) for t, k in zip(tokens, kinds, strict=False) if k in wanted]

    backend.add_special_tokens(of(CONTROL, UNKNOWN))
    backend.add_tokens(of(USER_DEFINED))
