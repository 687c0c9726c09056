#!/bin/sh
# llguidance 1.9.1: under "multipleOf" it takes only numbers with no more decimals than the divisor has and without an
# exponent. 0.50 and 5e-1 under multipleOf 0.5 are refused, though JSON has them and JSON Schema (2020-12 validation,
# 6.2.1) speaks of the value, which is 0.5 each time: jsonschema 4.26.0 takes them. Without multipleOf so does llguidance.
#
# Output seen (llguidance 1.9.1, jsonschema 4.26.0, Python 3.11):
#   multipleOf 0.5: 0.5 taken, valid; 0.50 refused, valid; 1.50 refused, valid; 5e-1 refused, valid; 0.3 refused, invalid
#   multipleOf 0.01: 0.5 taken, valid; 0.50 taken, valid; 1.50 taken, valid; 5e-1 refused, valid; 0.3 taken, valid
#   number alone: 0.5 taken, valid; 0.50 taken, valid; 1.50 taken, valid; 5e-1 taken, valid; 0.3 taken, valid
# Exits 0 while it is so.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "llguidance==1.9.1" "jsonschema==4.26.0"
"$folder/venv/bin/python" - <<'END'
import json
import sys

import jsonschema
import llguidance


class Bytes:
    eos_token_id, bos_token_id, special_token_ids = 256, None, [256]
    tokens = [bytes([i]) for i in range(256)] + [b"<end>"]

    def __call__(self, text):
        return list(text if isinstance(text, bytes) else text.encode())


vocabulary = llguidance.LLTokenizer(llguidance.TokenizerWrapper(Bytes()), n_vocab=257)
found = {}
schemas = {f"multipleOf {by}": {"type": "number", "multipleOf": by} for by in (0.5, 0.01)}
for name, schema in {**schemas, "number alone": {"type": "number"}}.items():
    told = []
    for text in ("0.5", "0.50", "1.50", "5e-1", "0.3"):
        matcher = llguidance.LLMatcher(vocabulary, llguidance.LLMatcher.grammar_from_json_schema(json.dumps(schema)))
        taken = matcher.try_consume_tokens([*text.encode()]) == len(text) and matcher.is_accepting()
        valid = jsonschema.Draft202012Validator(schema).is_valid(json.loads(text))
        found[name, text] = taken
        told.append(f"{text} {'taken' if taken else 'refused'}, {'valid' if valid else 'invalid'}")
    print(f"{name}: {'; '.join(told)}")
refused = [(name, text) for (name, text), taken in found.items() if not taken and text != "0.3"]
half, cent = "multipleOf 0.5", "multipleOf 0.01"
sys.exit(refused != [(half, "0.50"), (half, "1.50"), (half, "5e-1"), (cent, "5e-1")])
END
