"""Writes llama.cpp's token ids into tests/text/data anew: `python -m tests.text.record_tokenizers [SmolLM2.gguf]`.

Texts and vocabularies are those already in the files; so a changed id shows as a difference in version control. Needs
llama-cpp-python, in this interpreter or in the one that KTCORE_LLAMA_CPP_PYTHON names. A new name of
``tokenizer.ggml.pre`` goes into a row of its own, `{"pre": ["name"], "ids": []}`; rows with equal ids are joined.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from .tokenizer_oracle import WHY_NOT, ask_llama_cpp, interpreter, write_vocabulary

DATA = Path(__file__).parent / "data"


def main(smollm2: Path | None) -> None:
    """Records every file, SmolLM2's only where its GGUF file is given."""
    if interpreter() is None:
        raise SystemExit(WHY_NOT)
    with tempfile.TemporaryDirectory() as folder:
        vocabulary = Path(folder) / "vocabulary.gguf"
        _save("tokenizer_pre.json", _pre(_load("tokenizer_pre.json"), vocabulary))
        _save("tokenizer_spm.json", _spm(_load("tokenizer_spm.json"), vocabulary))
        if smollm2 is not None:
            (link := Path(folder) / "smollm2.gguf").symlink_to(smollm2.resolve())
            content = _load("tokenizer_smollm2.json")
            texts = [text for text, _ in content["cases"]]
            content["cases"] = [list(case) for case in zip(texts, ask_llama_cpp(link, texts)["ids"], strict=True)]
            _save("tokenizer_smollm2.json", content)


def _pre(content: dict[str, Any], path: Path) -> dict[str, Any]:
    count = len(content["tokens"])
    by_ids: dict[str, list[str]] = {}
    for name in [name for row in content["rows"] for name in row["pre"]]:
        entries = {key: content[key] for key in ("tokens", "merges", "token_type")}
        entries |= {"model": "gpt2", "pre": name, "bos_token_id": count - 3, "eos_token_id": count - 2}
        write_vocabulary(path, {f"tokenizer.ggml.{key}": value for key, value in entries.items()})
        by_ids.setdefault(json.dumps(ask_llama_cpp(path, content["texts"])["ids"]), []).append(name)
    content["rows"] = [{"pre": names, "ids": json.loads(ids)} for ids, names in by_ids.items()]
    return content


def _spm(content: dict[str, Any], path: Path) -> dict[str, Any]:
    for key, prefix in (("ids", True), ("ids_without_prefix", False)):
        entries = {key: content[key] for key in ("tokens", "scores", "token_type")}
        entries |= {"model": "llama", "add_space_prefix": prefix}
        write_vocabulary(path, {f"tokenizer.ggml.{key}": value for key, value in entries.items()})
        content[key] = ask_llama_cpp(path, content["texts"])["ids"]
    return content


def _load(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((DATA / name).read_text(encoding="utf-8"))
    return content


def _save(name: str, content: dict[str, Any]) -> None:
    lines = (f"{json.dumps(key)}: {_compact(value)}" for key, value in content.items())
    (DATA / name).write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def _compact(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else None)
