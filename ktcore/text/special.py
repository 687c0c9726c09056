"""Tokens with a meaning beyond text: what begins and ends a text, ends a generation, or structures an answer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ktcore.errors import TokenizerError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4

# Names of control tokens that end a turn. Files made before the eot and eom keys existed tell by name alone; the list
# is llama.cpp's (src/llama-vocab.cpp, special_eog_ids) without those of fill-in-the-middle.
_END_NAMES = frozenset(
    (
        *("<|eot_id|>", "<|eom_id|>", "<|eot|>", "<|eom|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "</s>", "<eos>"),
        *("<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|calls|>", "<|flush|>", "[e~[", "<|endoftext|>"),
        *("<|end_of_text|>", "<end_of_turn>", "<end_of_utterance>", "<｜end▁of▁sentence｜>"),
    )
)
# In Harmony, gpt-oss' format, and its like <|end|> ends a message, and the next one of the same answer follows.
_GOES_ON = (frozenset(("<|return|>", "<|call|>")), frozenset(("<|calls|>", "<|flush|>")))
# GLM's assistant hands over by opening the next turn.
_GLM_END_NAMES = frozenset(("<|user|>", "<|observation|>"))
# Harmony names the channel of each message by them: without, thoughts and answer run together.
_HARMONY = frozenset(("<|channel|>", "<|message|>", "<|start|>", "<|end|>", "<|constrain|>"))


@dataclass(frozen=True)
class SpecialTokens:
    """Tokens with a meaning beyond text.

    Args:
        bos, eos: ids of the first and last token of a text, where the model has them.
        prefix, suffix: ids put around a text that is encoded with `add_special`; None leaves it to the backend.
        stop: ids that end a generation.
        names: strings a chat template may use: ``bos_token``, ``eos_token`` and so on.
        shown: ids of control tokens that structure an answer, and so belong to its text.
    """

    bos: int | None = None
    eos: int | None = None
    prefix: tuple[int, ...] | None = ()
    suffix: tuple[int, ...] | None = ()
    stop: frozenset[int] = frozenset()
    names: Mapping[str, str] = field(default_factory=dict)
    shown: frozenset[int] = frozenset()


def shown_tokens(control: Mapping[str, int]) -> frozenset[int]:
    """Ids of the control tokens that belong to an answer's text, from the ids of all control tokens by name."""
    harmony = _GOES_ON[0] | {"<|channel|>", "<|message|>"} <= set(control)
    return frozenset(control[name] for name in _HARMONY & set(control)) if harmony else frozenset()


def mend_kinds(
    config: Mapping[str, Any], tokens: Sequence[str], kinds: Sequence[int], merged: Iterable[str]
) -> list[int]:
    """Token types with those corrected that a converter lost: a token that ends a turn is control, not text.

    A vocabulary may well have learnt ``</s>`` as a piece of text, so a name alone does not tell: the token must be out
    of reach of the merges, or be declared by its id. llama.cpp overrules both alike (src/llama-vocab.cpp).

    Args:
        merged: tokens that merging can build.
    """
    ends = _END_NAMES - set(merged)
    declared = [config.get(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot", "eom")]
    return [
        CONTROL
        if kind in (NORMAL, USER_DEFINED) and (token in ends or (token in _END_NAMES and i in declared))
        else kind
        for i, (token, kind) in enumerate(zip(tokens, kinds, strict=False))
    ]


def special_from_metadata(
    config: Mapping[str, Any],
    tokens: Sequence[str],
    kinds: Sequence[int],
    *,
    default_bos: bool,
    sentencepiece: bool,
    where: str,
) -> SpecialTokens:
    """The special tokens that GGUF metadata declares, and those known by name.

    Args:
        default_bos: whether a text starts with the bos token when the file does not say.
        sentencepiece: take SentencePiece's usual ids 1 and 2 for bos and eos when the file does not say.

    Raises:
        TokenizerError: the file asks for a bos or eos token that it does not declare.
    """

    def id_of(key: str, default: int | None = None) -> int | None:
        value = config.get(f"tokenizer.ggml.{key}_token_id", default)
        # Some converters write -1, as 2^32 - 1, for "none".
        return value if isinstance(value, int) and 0 <= value < len(tokens) else None

    bos, eos = (id_of("bos", 1), id_of("eos", 2)) if sentencepiece else (id_of("bos"), id_of("eos"))
    named = {"bos_token": bos, "eos_token": eos, "unk_token": id_of("unknown"), "pad_token": id_of("padding")}
    control = {token: i for i, token in enumerate(tokens) if kinds[i] == CONTROL}
    ends = _END_NAMES
    if config.get("tokenizer.ggml.pre") in ("glm4", "chatglm-bpe"):
        ends = ends | _GLM_END_NAMES
    if any(both <= set(control) for both in _GOES_ON):
        ends = ends - {"<|end|>"}
    stop = {i for token, i in control.items() if token in ends}
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
        shown=shown_tokens(control),
    )
