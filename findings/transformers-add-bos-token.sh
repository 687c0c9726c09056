#!/usr/bin/env bash
# transformers 5.24.0 ignores add_bos_token of tokenizer_config.json where the folder has a tokenizer.json: its
# post-processor alone decides, for every tokenizer class tried, though the flag is shown as an attribute of the
# tokenizer. llama.cpp's converter goes by the flag, so that a model gets other ids from its folder than from its GGUF.
# Seen: 6 lines, one a class and flag, each with the ids of tokenizer.json. Exits 0 while this is so.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q transformers==5.24.0
cat > "$work/try.py" <<'PY'
import json, sys
from pathlib import Path
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer
folder, as_expected = Path(sys.argv[1]), True
for name in ("PreTrainedTokenizerFast", "LlamaTokenizerFast", "Qwen2TokenizerFast"):
    for stored, flag in ((True, False), (False, True)):
        made = Tokenizer(models.BPE(vocab={"a": 0, "b": 1, "<s>": 2, "</s>": 3}, merges=[]))
        made.add_special_tokens(["<s>", "</s>"])
        made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        if stored:
            made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 2)])
        made.save(str(folder / "tokenizer.json"))
        settings = {"tokenizer_class": name, "bos_token": "<s>", "eos_token": "</s>", "add_bos_token": flag}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        ids = AutoTokenizer.from_pretrained(folder)("ab").input_ids
        print(f"{name}: tokenizer.json {'adds' if stored else 'does not add'} <s>, add_bos_token {flag}: {ids}")
        as_expected &= ids == ([2, 0, 1] if stored else [0, 1])
sys.exit(not as_expected)
PY
mkdir "$work/m"
"$work/venv/bin/python" "$work/try.py" "$work/m" 2>"$work/log" || { cat "$work/log"; exit 1; }
