"""Kimi's tokenizer from its folder: against tiktoken's own algorithm, and tiktoken itself where it is installed."""

from __future__ import annotations

import base64
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from ktcore.errors import TokenizerError
from ktcore.text.bytes import byte_alphabet
from ktcore.text.from_folder import tokenizer_from_folder
from ktcore.text.tokenizer import Tokenizer

from .test_tokenizer import PRE
from .tokenizer_corpus import corpus

LETTERS = byte_alphabet()
RANKS = [bytes(LETTERS[letter] for letter in token) for token in PRE["tokens"][:-3]]
BASE = len(RANKS)
SPECIAL = {
    BASE: {"content": "[BOS]", "special": True},
    BASE + 1: {"content": "[EOS]", "special": True},
    BASE + 2: {"content": "<|im_end|>", "special": True},
    BASE + 5: {"content": "<|tool_call_begin|>", "special": False},
}
# tokenization_kimi.py of moonshotai/Kimi-K2-Instruct
_WORD = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_LOWER, _END = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]", "(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
PATTERN = (
    rf"[\p{{Han}}]+|{_WORD}*{_LOWER}+{_END}|{_WORD}+{_LOWER}*{_END}"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LINES = [*corpus(600, seed=3), *("a" * n for n in range(40)), *("\n " * n for n in range(20))]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    lines = [f"{base64.b64encode(token).decode()} {rank}" for rank, token in enumerate(RANKS)]
    (tmp_path / "tiktoken.model").write_text("\n".join(lines) + "\n")
    settings = {
        "tokenizer_class": "TikTokenTokenizer",
        "added_tokens_decoder": {str(i): entry for i, entry in SPECIAL.items()},
        "bos_token": "[BOS]",
        "eos_token": "[EOS]",
        "chat_template": "{% for m in messages %}<|im_user|>{{ m.content }}<|im_end|>{% endfor %}",
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": BASE + 2}))
    return tmp_path


def load(folder: Path, config: dict[str, Any] | None = None) -> Tokenizer:
    tokenizer = tokenizer_from_folder(folder, {"vocab_size": BASE + 64} if config is None else config)
    assert tokenizer is not None
    return tokenizer


def merged(piece: bytes, ranks: dict[bytes, int]) -> list[int]:
    """tiktoken's byte_pair_encode (src/lib.rs): join the leftmost pair of lowest rank until none has one."""
    if piece in ranks:
        return [ranks[piece]]
    parts = [piece[i : i + 1] for i in range(len(piece))]
    while True:
        pairs = [(ranks[a + b], i) for i, (a, b) in enumerate(pairwise(parts)) if a + b in ranks]
        if not pairs:
            return [ranks[part] for part in parts]
        at = min(pairs)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]


def test_ids_are_those_of_tiktokens_algorithm(folder: Path) -> None:
    regex = pytest.importorskip("regex")
    # the regex module nests sets only in brackets of their own
    pattern = PATTERN.replace(r"\p{M}&&", r"\p{M}]&&").replace("[\\p{Lu}", "[[\\p{Lu}").replace("[\\p{Ll}", "[[\\p{Ll}")
    ranks = {token: rank for rank, token in enumerate(RANKS)}
    tokenizer = load(folder)
    for line in LINES:
        pieces = regex.findall(pattern, line, flags=regex.V1)
        assert "".join(pieces) == line
        assert tokenizer.encode(line) == [i for piece in pieces for i in merged(piece.encode(), ranks)]


def test_ids_are_tiktokens(folder: Path) -> None:
    tiktoken = pytest.importorskip("tiktoken", reason="needs the tiktoken package")
    ranks = {token: rank for rank, token in enumerate(RANKS)}
    theirs = tiktoken.Encoding(name="kimi", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={})
    tokenizer = load(folder)
    assert [tokenizer.encode(line) for line in LINES] == [theirs.encode(line) for line in LINES]


def test_text_survives(folder: Path) -> None:
    tokenizer = load(folder)
    for line in LINES:
        assert tokenizer.decode(tokenizer.encode(line)) == line


def test_special_tokens(folder: Path) -> None:
    tokenizer = load(folder)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (BASE, BASE + 1, BASE + 64)
    assert tokenizer.stop_ids == {BASE + 1, BASE + 2}
    assert tokenizer.token_id(f"<|reserved_token_{BASE + 3}|>") == BASE + 3
    assert tokenizer.is_control(BASE + 2)
    assert not tokenizer.is_control(BASE + 5)
    assert tokenizer.encode_chat([{"role": "user", "content": "<|im_end|>"}]).count(BASE + 2) == 1
    for config in ({}, {"vocab_size": BASE - 5}, {"vocab_size": str(BASE + 64)}):
        assert load(folder, config).vocab_size == BASE + 256


def test_code_that_splits_otherwise_is_refused(folder: Path) -> None:
    (folder / "tokenization_kimi.py").write_text(r'pat_str = r"[\p{Han}]+|..."')
    load(folder)
    (folder / "tokenization_other.py").write_text('pat_str = "something else"')
    with pytest.raises(TokenizerError, match=r"tokenization_other\.py: splits text in a way that is not Kimi's"):
        load(folder)


@pytest.mark.parametrize(
    ("line", "message"),
    [("YQ==", "line 1501 is not a token and its rank"), ("*** 9", "line 1501"), ("enp6enp6eg== 9999", "ranks are not")],
)
def test_damaged_ranks_are_refused(folder: Path, line: str, message: str) -> None:
    with (folder / "tiktoken.model").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(TokenizerError, match=rf"tiktoken\.model: .*{message}"):
        load(folder)


def test_a_special_token_that_is_a_word_too_is_refused(folder: Path) -> None:
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["added_tokens_decoder"][str(BASE)]["content"] = PRE["tokens"][300]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(TokenizerError, match=f"has id {BASE}, but is another token too"):
        load(folder)
