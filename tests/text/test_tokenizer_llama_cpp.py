"""Thousands of lines against llama.cpp itself, on vocabulary-only GGUF files; needs llama-cpp-python."""

from __future__ import annotations

import re
import unicodedata
from pathlib import Path

import pytest

from ktcore.text.tokenizer import Tokenizer

from .test_tokenizer import PRE, SPM, build, metadata, spm_metadata
from .tokenizer_corpus import corpus
from .tokenizer_oracle import WHY_NOT, ask_llama_cpp, interpreter, write_vocabulary

pytestmark = pytest.mark.skipif(interpreter() is None, reason=WHY_NOT)

LINES = corpus(2000, seed=1)
# One name for each way of splitting that a supported family uses.
NAMES = (
    *("default", "gpt-2", "smollm", "llama-bpe", "llama4", "gpt-4o", "tekken", "qwen2", "qwen35"),
    *("glm4", "chatglm-bpe", "deepseek-llm", "deepseek-coder", "deepseek-v3", "kimi-k2"),
)
_WITH_CASE_OR_MARKS = frozenset(("gpt-4o", "llama4", "tekken", "kimi-k2"))


def may_depart(name: str, line: str) -> bool:
    """Whether llama.cpp is known to split such a line otherwise than the tokenizer that the model was trained with.

    Its GPT-4o pattern knows case in ASCII only and marks not at all, its Kimi pattern no case; its CJK class of
    DeepSeek's first patterns leaves out spaces that lie in its range.
    """
    beyond_ascii = {unicodedata.category(letter) for letter in line if ord(letter) > 127}
    if name in _WITH_CASE_OR_MARKS and beyond_ascii & {"Lu", "Ll", "Lt", "Mn", "Mc", "Me"}:
        return True
    if name == "kimi-k2":
        return re.search("[a-z][A-Z]", line) is not None
    return name in ("deepseek-llm", "deepseek-coder") and bool(beyond_ascii & {"Zs", "Zl", "Zp"})


def differing(tokenizer: Tokenizer, lines: list[str], ids: list[list[int]], parse_special: bool = True) -> list[str]:
    return [
        line
        for line, expected in zip(lines, ids, strict=True)
        if tokenizer.encode(line, add_special=False, parse_special=parse_special) != expected
    ]


@pytest.mark.parametrize("name", NAMES)
def test_ids_of_every_familys_pre(name: str, tmp_path: Path) -> None:
    entries = metadata(pre=name)
    ids = ask_llama_cpp(write_vocabulary(tmp_path / "v.gguf", entries), LINES)["ids"]
    unexplained = [line for line in differing(build(entries), LINES, ids) if not may_depart(name, line)]
    assert unexplained == []
    assert sum(not may_depart(name, line) for line in LINES) > len(LINES) / 3


@pytest.mark.parametrize("prefix", [True, False])
def test_ids_of_sentencepiece(prefix: bool, tmp_path: Path) -> None:
    entries = spm_metadata(add_space_prefix=prefix)
    ids = ask_llama_cpp(write_vocabulary(tmp_path / "v.gguf", entries), LINES)["ids"]
    assert differing(build(entries), LINES, ids) == []


@pytest.mark.parametrize("kind", ["byte level", "sentencepiece"])
def test_control_tokens_as_text_and_bos(kind: str, tmp_path: Path) -> None:
    entries = metadata(pre="llama-bpe") if kind == "byte level" else spm_metadata()
    path, tokenizer = write_vocabulary(tmp_path / "v.gguf", entries), build(entries)
    lines = [f"{a}{token}{b}" for token in ("<s>", "</s>", "<think>", "<unk>") for a in LINES[:8] for b in LINES[8:16]]
    assert differing(tokenizer, lines, ask_llama_cpp(path, lines, special=False)["ids"], parse_special=False) == []
    assert differing(tokenizer, lines, ask_llama_cpp(path, lines)["ids"]) == []
    with_bos = ask_llama_cpp(path, lines, special=False, bos=True)["ids"]
    assert [tokenizer.encode(line, parse_special=False) for line in lines] == with_bos


@pytest.mark.parametrize("kind", ["byte level", "sentencepiece"])
def test_bytes_of_every_token_and_ends_of_generation(kind: str, tmp_path: Path) -> None:
    entries = metadata() if kind == "byte level" else spm_metadata()
    everything = range(len((PRE if kind == "byte level" else SPM)["tokens"]))
    told = ask_llama_cpp(write_vocabulary(tmp_path / "v.gguf", entries), pieces=everything)
    tokenizer = build(entries)
    assert [tokenizer.token_bytes(i).hex() for i in everything] == told["pieces"]
    assert tokenizer.stop_ids == set(told["ends"])


def test_a_real_vocabulary(smollm2_path: Path, tmp_path: Path) -> None:
    from ktcore.text.open import load_tokenizer
    from ktcore.weights import open_checkpoint

    (link := tmp_path / "v.gguf").symlink_to(smollm2_path)
    with open_checkpoint(smollm2_path) as checkpoint:
        tokenizer = load_tokenizer(checkpoint)
    assert tokenizer is not None
    told = ask_llama_cpp(link, LINES, pieces=range(tokenizer.vocab_size))
    assert differing(tokenizer, LINES, told["ids"]) == []
    assert [tokenizer.token_bytes(i).hex() for i in range(tokenizer.vocab_size)] == told["pieces"]
