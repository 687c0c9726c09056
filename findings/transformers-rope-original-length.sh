#!/bin/sh
# transformers 5.24.0: a config.json of Llama that gives original_max_position_embeddings twice, within rope_parameters
# and beside it, says one thing when it is read and another once a model was built from it: reading leaves the section
# alone, building the model writes the outer value over the section's, and yarn's frequencies follow the outer one. What
# reads the configuration alone (a converter, another engine) sees 64 here and computes other positions than the class.
#
# Output seen (transformers 5.24.0, torch 2.13.0, Python 3.11):
#   as read 64, after building 32
#   frequencies equal those of 32 alone: True, of 64 alone: False
# Exits 0 while it is so.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "transformers==5.24.0" "torch==2.13.0"
"$folder/venv/bin/python" - "$folder" <<'END'
import json
import sys
from pathlib import Path

import torch
from transformers import AutoConfig, LlamaForCausalLM

NAME = "original_max_position_embeddings"
SIZES = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 99,
    "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 128,
}  # fmt: skip


def built(inside, outside):
    yarn = {"rope_type": "yarn", "factor": 2.0, "rope_theta": 10000.0, NAME: inside}
    beside = {} if outside is None else {NAME: outside}
    Path(sys.argv[1], "config.json").write_text(json.dumps({**SIZES, **beside, "rope_parameters": yarn}))
    config = AutoConfig.from_pretrained(sys.argv[1])
    read = config.rope_parameters[NAME]
    model = LlamaForCausalLM(config)
    return read, model.config.rope_parameters[NAME], model.model.rotary_emb.inv_freq


read, after, frequencies = built(64, 32)
print(f"as read {read}, after building {after}")
small, large = (torch.equal(frequencies, built(n, None)[2]) for n in (32, 64))
print(f"frequencies equal those of 32 alone: {small}, of 64 alone: {large}")
sys.exit((read, after, small, large) != (64, 32, True, False))
END
