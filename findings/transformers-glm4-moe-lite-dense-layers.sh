#!/usr/bin/env bash
# transformers 5.24.0: Glm4MoeLiteForCausalLM (GLM-4.7-Flash) keeps `first_k_dense_replace` in its configuration and does not
# read it: without `mlp_layer_types` only the first layer is dense, whatever the key says. Its neighbours Glm4MoeForCausalLM
# and DeepseekV3ForCausalLM follow the key.
# Seen, with first_k_dense_replace 3 in five layers: "glm4_moe_lite: 1 dense", "glm4_moe: 3 dense", "deepseek_v3: 3 dense".
# Exits 0 while this is so.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 numpy transformers==5.24.0
"$work/venv/bin/python" - <<'PY'
import sys
from transformers import AutoConfig, AutoModelForCausalLM

SIZES = dict(
    vocab_size=64, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=5,
    num_attention_heads=4, num_key_value_heads=4, n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1,
    q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8, first_k_dense_replace=3,
)
found = {}
for family in ("glm4_moe_lite", "glm4_moe", "deepseek_v3"):
    config = AutoConfig.for_model(family, **SIZES)
    layers = AutoModelForCausalLM.from_config(config).model.layers
    found[family] = sum(not hasattr(layer.mlp, "experts") for layer in layers)
    print(f"{family}: {found[family]} dense, first_k_dense_replace {config.first_k_dense_replace}")
sys.exit(found != {"glm4_moe_lite": 1, "glm4_moe": 3, "deepseek_v3": 3})
PY
