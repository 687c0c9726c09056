"""Rebuilds a tokenizer from GGUF metadata: byte-level BPE (``gpt2``) and SentencePiece BPE (``llama``)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ktcore.engine.tokenizer import SpecialTokens, Tokenizer
from ktcore.engine.tokenizer_pre import PRE_TOKENIZERS, PreTokenizer
from ktcore.errors import TokenizerError

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4

# Names of control tokens that end a turn. Files made before the eot and eom keys existed tell by name alone.
_END_NAMES = frozenset(
    (
        *("<|eot_id|>", "<|eom_id|>", "<|eot|>", "<|eom|>", "<EOT>", "[EOT]", "[EOS]"),
        *("<|im_end|>", "<|endoftext|>", "<|end_of_text|>", "<end_of_turn>", "<｜end▁of▁sentence｜>"),
    )
)
# GLM's assistant hands over by opening the next turn.
_GLM_END_NAMES = frozenset(("<|user|>", "<|observation|>"))
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
    pre = PreTokenizer(())
    if isinstance(whole := config.get("tokenizer.huggingface.json"), str):
        backend = _whole(whole, where)
    elif model == "gpt2":
        pre = _pre_tokenizer(config, where)
        backend = _byte_level(tokens, _merges(config, where), pre, where)
    elif model == "llama":
        pre = PreTokenizer((), add_bos=True)
        backend = _sentencepiece(config, tokens, kinds, where)
    else:
        raise TokenizerError(
            f"{where}: tokenizer model {model!r} is not supported", "known models: gpt2 (byte-level BPE), llama"
        )
    _add_special_tokens(backend, tokens, kinds)
    special = _special(config, tokens, kinds, default_bos=pre.add_bos, sentencepiece=model == "llama", where=where)
    template = config.get("tokenizer.chat_template")
    return Tokenizer(backend, special, template if isinstance(template, str) else None, where)


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
        return [_NORMAL] * count
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
    from tokenizers import Regex, decoders, pre_tokenizers

    backend = _bpe(
        where, vocab=dict(zip(tokens, range(len(tokens)), strict=True)), merges=merges, ignore_merges=pre.ignore_merges
    )
    splits = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in pre.patterns]
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece(config: Mapping[str, Any], tokens: list[str], kinds: Sequence[int], where: str) -> Backend:
    from tokenizers import decoders, normalizers

    vocab = dict(zip(tokens, range(len(tokens)), strict=True))
    unknown = config.get("tokenizer.ggml.unknown_token_id", 0)
    backend = _bpe(
        where,
        vocab=vocab,
        merges=_merges_from_scores(config, vocab, kinds, where),
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
    config: Mapping[str, Any], vocab: Mapping[str, int], kinds: Sequence[int], where: str
) -> list[tuple[str, str]]:
    """SentencePiece joins the neighbours whose union has the best score: every way to build a token is a merge."""
    scores: Any = config.get("tokenizer.ggml.scores")
    if not _numbers(scores, len(vocab)):
        raise TokenizerError(f"{where}: a SentencePiece vocabulary without a score for each token")
    scores, ranked = list(scores), []
    for token, i in vocab.items():
        if kinds[i] not in (_NORMAL, _USER_DEFINED):
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

    backend.add_special_tokens(of(_CONTROL, _UNKNOWN))
    backend.add_tokens(of(_USER_DEFINED))


def _special(
    config: Mapping[str, Any],
    tokens: list[str],
    kinds: Sequence[int],
    *,
    default_bos: bool,
    sentencepiece: bool,
    where: str,
) -> SpecialTokens:
    def id_of(key: str, default: int | None = None) -> int | None:
        value = config.get(f"tokenizer.ggml.{key}_token_id", default)
        # Some converters write -1, as 2^32 - 1, for "none".
        return value if isinstance(value, int) and 0 <= value < len(tokens) else None

    bos, eos = (id_of("bos", 1), id_of("eos", 2)) if sentencepiece else (id_of("bos"), id_of("eos"))
    named = {"bos_token": bos, "eos_token": eos, "unk_token": id_of("unknown"), "pad_token": id_of("padding")}
    ends = _END_NAMES
    if config.get("tokenizer.ggml.pre") in ("glm4", "chatglm-bpe"):
        ends = ends | _GLM_END_NAMES
    stop = {i for i, token in enumerate(tokens) if kinds[i] == _CONTROL and token in ends}
    stop |= {i for i in (eos, id_of("eot"), id_of("eom")) if i is not None}

    add_bos = bool(config.get("tokenizer.ggml.add_bos_token", default_bos and bos is not None))
    add_eos = bool(config.get("tokenizer.ggml.add_eos_token", False))
    for wanted, token, key in ((add_bos, bos, "bos"), (add_eos, eos, "eos")):
        if wanted and token is None:
            raise TokenizerError(f"{where}: add_{key}_token is set, but there is no {key}_token_id")
    return SpecialTokens(
        bos=bos,
        eos=eos,
        prefix=(bos,) if add_bos and bos is not None else (),
        suffix=(eos,) if add_eos and eos is not None else (),
        stop=frozenset(stop),
        names={name: tokens[i] for name, i in named.items() if i is not None},
    )
