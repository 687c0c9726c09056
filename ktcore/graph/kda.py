"""Kimi delta attention nodes as checkpoints of Kimi Linear and GLM-5.3-Flash hold them."""

from __future__ import annotations

from dataclasses import dataclass

from ktcore.graph.decoder import rms_eps
from ktcore.graph.maker import NodeMaker
from ktcore.graph.names import NameTable
from ktcore.graph.node import Node
from ktcore.ops.kda import KimiDeltaSpec
from ktcore.ops.linear_attention import StateCacheSpec

KDA: NameTable = {
    "attn.conv_q": ("self_attn.q_conv1d", "ssm_conv1d_q"),
    "attn.conv_k": ("self_attn.k_conv1d", "ssm_conv1d_k"),
    "attn.conv_v": ("self_attn.v_conv1d", "ssm_conv1d_v"),
    "attn.f_a": ("self_attn.f_a_proj", "ssm_f_a"),
    "attn.f_b": ("self_attn.f_b_proj", "ssm_f_b"),
    "attn.decay": ("self_attn.A_log", "ssm_a"),
    "attn.dt_bias": ("self_attn.dt_bias", "ssm_dt.bias"),
    "attn.b": ("self_attn.b_proj", "ssm_beta"),
    "attn.g_a": ("self_attn.g_a_proj", "ssm_g_a"),
    "attn.g_b": ("self_attn.g_b_proj", "ssm_g_b"),
    "attn.out_norm": ("self_attn.o_norm", "ssm_norm"),
    # not attn.o, which has a bias where a key asks for one
    "attn.out": ("self_attn.o_proj", "attn_output"),
}
"""Beside the names of q, k, v and the norm that all attention has."""


@dataclass(frozen=True)
class Sizes:
    """Of a model's delta attention: heads, their width, tokens of the convolution, the bound of the decay."""

    heads: int
    width: int
    conv: int
    lower_bound: float | None


def kda_node(make: NodeMaker, name: str, z: Sizes) -> Node:
    """One layer's branch."""
    s = make.settings
    hidden = s.integer("hidden_size", "embedding_length")
    inner = z.heads * z.width
    # hub folders have an axis of 1 between, converters to GGUF another one before
    convs = {f"conv_{role}": make.ref(f"{name}.conv_{role}", (inner, z.conv), fold=True) for role in "qkv"}
    decay = make.ref(f"{name}.decay", (z.heads,), "", fold=True)
    dt_bias = make.ref(f"{name}.dt_bias", (inner,), "")
    state = StateCacheSpec(((z.conv - 1, 3 * inner), (z.heads, z.width, z.width)))
    return make.composite(
        name,
        KimiDeltaSpec,
        {
            **{role: make.linear(f"{name}.{role}", hidden, inner) for role in "qkv"},
            "f_a": make.linear(f"{name}.f_a", hidden, z.width),
            "f_b": make.linear(f"{name}.f_b", z.width, inner),
            "b": make.linear(f"{name}.b", hidden, z.heads),
            "g_a": make.linear(f"{name}.g_a", hidden, z.width),
            "g_b": make.linear(f"{name}.g_b", z.width, inner),
            "o": make.linear(f"{name}.out", inner, hidden),
            "out_norm": make.norm(f"{name}.out_norm", z.width, rms_eps(make)),
            "state": make.node(f"{name}.state", state),
            "norm": make.norm(f"{name}.norm", hidden, rms_eps(make)),
        },
        {**convs, "decay": decay, "dt_bias": dt_bias},
        hidden=hidden,
        heads=z.heads,
        head_dim=z.width,
        conv_width=z.conv,
        conv_format=convs["conv_q"].format,
        decay_format=decay.format,
        dt_bias_format=dt_bias.format,
        # converters to GGUF store the rates themselves
        decay_log=not s.gguf,
        lower_bound=z.lower_bound,
    )
