"""Tensor names: a node's place in the graph -> its tensor in Hugging Face and in GGUF checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

NameTable = Mapping[str, tuple[str, str]]
"""Node name (within its layer, if it is in one) -> (Hugging Face name, GGUF name), both without suffix.

Rows of `embed`, `norm`, `head` and `end` are outside of layers, in front of those that all families have."""

OUTSIDE: NameTable = {
    "embed": ("model.embed_tokens", "token_embd"),
    "norm": ("model.norm", "output_norm"),
    "head": ("lm_head", "output"),
}

ATTENTION: NameTable = {
    "attn.norm": ("input_layernorm", "attn_norm"),
    "attn.q": ("self_attn.q_proj", "attn_q"),
    "attn.k": ("self_attn.k_proj", "attn_k"),
    "attn.v": ("self_attn.v_proj", "attn_v"),
    "attn.qkv": ("self_attn.qkv_proj", "attn_qkv"),
    "attn.o": ("self_attn.o_proj", "attn_output"),
    "attn.q_norm": ("self_attn.q_norm", "attn_q_norm"),
    "attn.k_norm": ("self_attn.k_norm", "attn_k_norm"),
}

MLA: NameTable = {
    **ATTENTION,
    "attn.q_a": ("self_attn.q_a_proj", "attn_q_a"),
    "attn.q_a_norm": ("self_attn.q_a_layernorm", "attn_q_a_norm"),
    "attn.q_b": ("self_attn.q_b_proj", "attn_q_b"),
    "attn.kv_a": ("self_attn.kv_a_proj_with_mqa", "attn_kv_a_mqa"),
    "attn.kv_a_norm": ("self_attn.kv_a_layernorm", "attn_kv_a_norm"),
    "attn.kv_b": ("self_attn.kv_b_proj", "attn_kv_b"),
    "attn.k_b": ("", "attn_k_b"),
    "attn.v_b": ("", "attn_v_b"),
}

INDEXER: NameTable = {
    "attn.indexer.q": ("self_attn.indexer.wq_b", "indexer.attn_q_b"),
    "attn.indexer.k": ("self_attn.indexer.wk", "indexer.attn_k"),
    "attn.indexer.k_norm": ("self_attn.indexer.k_norm", "indexer.k_norm"),
    "attn.indexer.weights": ("self_attn.indexer.weights_proj", "indexer.proj"),
}

POOLS: NameTable = {
    "attn.indexer.gate": ("self_attn.indexer.index_kpool_compress_gate", "indexer_compressor_gate"),
    "attn.indexer.ape": ("self_attn.indexer.index_kpool_compress_ape", "indexer_compressor_ape"),
}
"""Of pooled index keys; behind them comes .weight in GGUF, and nothing in hub folders."""

MLP: NameTable = {
    "ffn.norm": ("post_attention_layernorm", "ffn_norm"),
    "ffn.gate": ("mlp.gate_proj", "ffn_gate"),
    "ffn.up": ("mlp.up_proj", "ffn_up"),
    "ffn.down": ("mlp.down_proj", "ffn_down"),
    # gate's rows, then up's; converters to GGUF name the fused tensor as up alone
    "ffn.gate_up": ("mlp.gate_up_proj", "ffn_up"),
}

MOE: NameTable = {
    **MLP,
    "ffn.router": ("mlp.gate", "ffn_gate_inp"),
    "ffn.router.bias": ("mlp.gate.e_score_correction_bias", "exp_probs_b.bias"),
    # {} is the expert's index; one tensor for all of them in GGUF
    "ffn.experts.gate": ("mlp.experts.{}.gate_proj", "ffn_gate_exps"),
    "ffn.experts.up": ("mlp.experts.{}.up_proj", "ffn_up_exps"),
    "ffn.experts.down": ("mlp.experts.{}.down_proj", "ffn_down_exps"),
    "ffn.experts.fused_gate_up": ("mlp.experts.gate_up_proj", "ffn_gate_up_exps.weight"),
    "ffn.experts.fused_down": ("mlp.experts.down_proj", "ffn_down_exps.weight"),
    "ffn.shared.gate": ("mlp.shared_experts.gate_proj", "ffn_gate_shexp"),
    "ffn.shared.up": ("mlp.shared_experts.up_proj", "ffn_up_shexp"),
    "ffn.shared.down": ("mlp.shared_experts.down_proj", "ffn_down_shexp"),
}

FURTHER: NameTable = {
    "further.embed_norm": ("enorm", "nextn.enorm"),
    "further.hidden_norm": ("hnorm", "nextn.hnorm"),
    "further.project": ("eh_proj", "nextn.eh_proj"),
    "further.norm": ("shared_head.norm", "nextn.shared_head_norm"),
}
"""Of a layer that predicts further tokens, as DeepSeek and GLM name its parts."""

SHARED_EXPERT: NameTable = {
    "ffn.shared.gate": ("mlp.shared_expert.gate_proj", "ffn_gate_shexp"),
    "ffn.shared.up": ("mlp.shared_expert.up_proj", "ffn_up_shexp"),
    "ffn.shared.down": ("mlp.shared_expert.down_proj", "ffn_down_shexp"),
    "ffn.shared_gate": ("mlp.shared_expert_gate", "ffn_gate_inp_shexp"),
}
"""Qwen's names of the shared experts: singular, and with a gate."""


HYPER_CONNECTION: NameTable = {
    "attn_branch.mix": ("hc_attn", "hc_attn"),
    "ffn_branch.mix": ("hc_ffn", "hc_ffn"),
    "end.mix": ("model.hc_head", "output_hc"),
}
"""DeepSeek-V4's; behind each comes _fn, _base or _scale, and in GGUF .weight."""


@dataclass(frozen=True)
class ApartLayers:
    """Layers behind the model's own that hub folders hold under names of their own.

    Attributes:
        first: number of the first of them.
        prefix: stands before the names of a layer's tensors, with "{}" for its number among them.
        outside: node name within the layer -> whole name, of those that are not under `prefix`.
    """

    first: int
    prefix: str
    outside: Mapping[str, str]


class TensorNames:
    """Looks names up for one kind of checkpoint.

    Attributes:
        apart: of hub folders alone; None where further layers are numbered on.

    Args:
        model, head: what stands for "model." and "lm_head" in hub folders whose language model is a part.
    """

    def __init__(
        self, gguf: bool, layer_table: NameTable, model: str = "model.", head: str = OUTSIDE["head"][0]
    ) -> None:
        self._column = 1 if gguf else 0
        self._prefix = "blk.{}." if gguf else f"{model}layers.{{}}."
        own = outside(layer_table)
        self._outside = {
            node: ggufs if gguf else model + hf.removeprefix("model.")
            for node, (hf, ggufs) in {**OUTSIDE, **own}.items()
        }
        if not gguf and "head" not in own:
            self._outside["head"] = head
        self._layer_table = layer_table
        self.apart: ApartLayers | None = None

    def knows(self, node: str) -> bool:
        """Whether this kind of checkpoint has a name for it."""
        if layer_of(node) is None:
            return node in self._outside
        return bool(self._layer_table.get(node.split(".", 2)[2], ("", ""))[self._column])

    def of(self, node: str) -> str:
        """The tensor of a node such as "layers.3.attn.q" or "head", without its ".weight" or ".bias"."""
        layer = layer_of(node)
        if layer is None:
            return self._outside[node]
        within = node.split(".", 2)[2]
        name = self._layer_table[within][self._column]
        if self.apart is not None and layer >= self.apart.first:
            return self.apart.outside.get(within) or self.apart.prefix.format(layer - self.apart.first) + name
        return self._prefix.format(layer) + name if name else ""


def outside(table: NameTable) -> NameTable:
    """The rows of a family's table that are in no layer."""
    return {node: names for node, names in table.items() if node.split(".", 1)[0] in ("embed", "norm", "head", "end")}


def layer_of(node: str) -> int | None:
    """Layer index in a node's name; None outside of layers."""
    return int(node.split(".")[1]) if node.startswith("layers.") else None
