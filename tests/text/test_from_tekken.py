"""Mistral's Tekken tokenizer from its file: against tiktoken's own algorithm, and mistral-common where that is."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest

from ktcore.errors import TokenizerError
from ktcore.text.from_folder import tokenizer_from_folder
from ktcore.text.tokenizer import Tokenizer

from .test_from_tiktoken import LINES, merged
from .test_from_tiktoken import RANKS as SHUFFLED

# config.pattern of mistralai/Mistral-Nemo-Instruct-2407's tekken.json, and of all since
_WORD = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
PATTERN = (
    rf"{_WORD}*{_LOWER}+|{_WORD}+{_LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# the bytes first, in their order, as mistral-common demands
RANKS = [*(bytes([i]) for i in range(256)), *(token for token in SHUFFLED if len(token) > 1)]
RESERVED = 30
TOKENS = [*RANKS, b"token beyond the vocabulary"]
NAMES = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[THINK]"]


def data(**changes: Any) -> dict[str, Any]:
    config = {
        "pattern": PATTERN,
        "default_vocab_size": len(RANKS) + RESERVED,
        "default_num_special_tokens": RESERVED,
        "version": "v13",
    }
    vocab = [
        {"rank": rank, "token_bytes": base64.b64encode(token).decode(), "token_str": None}
        for rank, token in enumerate(TOKENS)
    ]
    special = [{"rank": rank, "token_str": name, "is_control": name != "[THINK]"} for rank, name in enumerate(NAMES)]
    return {"config": config | changes.pop("config", {}), "vocab": vocab, "special_tokens": special} | changes


def load(folder: Path, content: dict[str, Any]) -> Tokenizer:
    (folder / "tekken.json").write_text(json.dumps(content))
    tokenizer = tokenizer_from_folder(folder, {})
    assert tokenizer is not None
    return tokenizer


def test_ids_are_those_of_tiktokens_algorithm_behind_the_special_tokens(tmp_path: Path) -> None:
    regex = pytest.importorskip("regex")
    ranks = {token: rank for rank, token in enumerate(RANKS)}
    tokenizer = load(tmp_path, data())
    for line in LINES:
        pieces = regex.findall(PATTERN, line)
        want = [RESERVED + i for piece in pieces for i in merged(piece.encode(), ranks)]
        assert tokenizer.encode(line, parse_special=False) == [1, *want]
        assert tokenizer.decode(want) == line


def test_ids_are_mistral_commons(tmp_path: Path) -> None:
    tekken = pytest.importorskip("mistral_common.tokens.tokenizers.tekken", reason="needs mistral-common")
    tokenizer = load(tmp_path, data())
    theirs = tekken.Tekkenizer.from_file(tmp_path / "tekken.json")
    for line in LINES:
        assert tokenizer.encode(line, parse_special=False) == theirs.encode(line, bos=True, eos=False)


def test_special_tokens(tmp_path: Path) -> None:
    tokenizer = load(tmp_path, data())
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (1, 2, RESERVED + len(RANKS))
    assert tokenizer.stop_ids == {2}
    assert tokenizer.encode("[INST]a[/INST]", add_special=False)[0] == 3
    assert [tokenizer.token_id(name) for name in ("[THINK]", "<SPECIAL_7>")] == [5, 7]
    assert tokenizer.is_control(4)
    assert not tokenizer.is_control(5)


def test_special_tokens_are_control_tokens_unless_the_file_says_otherwise(tmp_path: Path) -> None:
    content = data()
    for entry in content["special_tokens"]:
        del entry["is_control"]
    content["special_tokens"][3]["is_control"] = False
    tokenizer = load(tmp_path, content)
    assert [tokenizer.is_control(i) for i in range(8)] == [i != 3 for i in range(8)]


def test_an_early_file_need_not_name_its_special_tokens(tmp_path: Path) -> None:
    content = data(config={"version": "v3"})
    del content["special_tokens"]
    tokenizer = load(tmp_path, content)
    assert [tokenizer.token_id(name) for name in ("</s>", "[TOOL_CALLS]", "[TOOL_CONTENT]", "<SPECIAL_20>")] == [
        2,
        9,
        19,
        20,
    ]
    content["config"]["version"] = "v11"
    with pytest.raises(TokenizerError, match=r"tekken\.json: version v11 without special_tokens"):
        load(tmp_path, content)


def test_another_tokenizer_of_the_folder_and_settings_go_first(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": False}))
    assert load(tmp_path, data()).encode("a")[0] != 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"config": {"pattern": "."}}, "which is not Tekken's pattern"),
        ({"config": {"default_vocab_size": 10**6}}, f"{len(TOKENS)} tokens, where its config asks for"),
        ({"config": {"default_vocab_size": None}}, "a vocabulary of None with 30 special tokens"),
        ({"config": {"default_num_special_tokens": "30"}}, "with '30' special tokens"),
        ({"config": {"default_num_special_tokens": -1}}, "with -1 special tokens"),
        (
            {"config": {"default_vocab_size": 300, "default_num_special_tokens": 300}},
            "a vocabulary of 300 with 300 special tokens",
        ),
        ({"config": {"default_num_special_tokens": 3}}, "a special token beyond the 3"),
        ({"vocab": [{"rank": 1, "token_bytes": "YQ=="}] * 5000}, "token 0 cannot be read: its rank is 1"),
        ({"vocab": [{"rank": i, "token_bytes": "YQ=="} for i in range(5000)]}, "tokens are the same"),
        ({"vocab": [{"rank": 0, "token_bytes": "*"}] * 5000}, "token 0 cannot be read"),
        ({"special_tokens": [{"rank": 0}]}, "special_tokens cannot be read"),
        ({"special_tokens": [{"rank": i, "token_str": "a"} for i in (0, 1)]}, "two special tokens have the same name"),
    ],
)
def test_damaged_files_are_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=rf"tekken\.json: .*{message}"):
        load(tmp_path, data(**changes))
