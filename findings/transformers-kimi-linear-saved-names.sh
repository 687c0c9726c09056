#!/usr/bin/env bash
# transformers 5.24.0: KimiLinearForCausalLM.save_pretrained writes the dense MLP of its first layers under the name of the
# mixture of experts, `block_sparse_moe.{gate,up,down}_proj`. The class itself has `mlp` there, and the other parts of the
# same layers keep the names that they have in memory. So what it saves is not laid out as what it reads from the hub
# (`mlp.gate_proj`), and a tool that tells dense layers by `mlp.` finds none in a saved model.
# Seen, with one dense layer of two: "in memory model.layers.0.mlp.gate_proj.weight" and "saved
# model.layers.0.block_sparse_moe.gate_proj.weight". Exits 0 while this is so.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 numpy transformers==5.24.0
"$work/venv/bin/python" - "$work/saved" <<'PY'
import sys
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM

config = AutoConfig.for_model(
    "kimi_linear", vocab_size=64, pad_token_id=0, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=2,
    num_attention_heads=2, num_key_value_heads=2, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8,
    num_experts=4, num_experts_per_token=2, first_k_dense_replace=1,
    linear_attn_config={"head_dim": 8, "num_heads": 2, "short_conv_kernel_size": 4, "kda_layers": [1], "full_attn_layers": [2]},
)
model = AutoModelForCausalLM.from_config(config)
model.save_pretrained(sys.argv[1])
with safe_open(f"{sys.argv[1]}/model.safetensors", "pt") as saved:
    names = {"in memory": list(model.state_dict()), "saved": list(saved.keys())}
found = {}
for where, held in names.items():
    (found[where],) = [name for name in held if "layers.0." in name and name.endswith("gate_proj.weight")]
    print(where, found[where])
sys.exit(
    found
    != {
        "in memory": "model.layers.0.mlp.gate_proj.weight",
        "saved": "model.layers.0.block_sparse_moe.gate_proj.weight",
    }
)
PY
