"""Gated delta net nodes as checkpoints of Qwen3-Next and 3.5 hold them: projections grouped by key head, or split."""

from __future__ import annotations

from ktcore.graph.decoder import rms_eps
from ktcore.graph.maker import NodeMaker
from ktcore.graph.names import NameTable
from ktcore.graph.node import Node
from ktcore.ops.linear_attention import GatedDeltaNetSpec, StateCacheSpec
from ktcore.weights.ref import RowSlice

DELTA_NET: NameTable = {
    "attn.qkvz": ("linear_attn.in_proj_qkvz", "ssm_in"),
    "attn.qkv": ("", "attn_qkv"),
    "attn.z": ("", "attn_gate"),
    "attn.ba": ("linear_attn.in_proj_ba", "ssm_ba"),
    "attn.conv": ("linear_attn.conv1d", "ssm_conv1d"),
    "attn.decay": ("linear_attn.A_log", "ssm_a"),
    "attn.dt_bias": ("linear_attn.dt_bias", "ssm_dt.bias"),
    "attn.out_norm": ("linear_attn.norm", "ssm_norm"),
    "attn.out": ("linear_attn.out_proj", "ssm_out"),
}
SPLIT_DELTA_NET: NameTable = {
    **{name: tensors for name, tensors in DELTA_NET.items() if name not in ("attn.qkvz", "attn.ba")},
    "attn.qkv": ("linear_attn.in_proj_qkv", "attn_qkv"),
    "attn.z": ("linear_attn.in_proj_z", "attn_gate"),
    "attn.b": ("linear_attn.in_proj_b", "ssm_beta"),
    "attn.a": ("linear_attn.in_proj_a", "ssm_alpha"),
}
"""Qwen3.5's."""

KEY_HEADS = ("linear_num_key_heads", "ssm.group_count")


def delta_net_node(
    make: NodeMaker, name: str, *, tiled: bool = False, sigmoid_gate: bool = False, bare: bool = False
) -> Node:
    """One layer's branch.

    Args:
        tiled: value heads are stored in the order of `GatedDeltaNetSpec.tiled`.
        sigmoid_gate: as in `GatedDeltaNetSpec`.
        bare: what stands around the branch norms its input and adds its result.
    """
    s = make.settings
    hidden = s.integer("hidden_size", "embedding_length")
    key_heads = s.integer(*KEY_HEADS)
    value_heads = s.integer("linear_num_value_heads", "ssm.time_step_rank")
    key = s.integer("linear_key_head_dim", "ssm.state_size")
    inner = s.integer("", "ssm.inner_size", without=value_heads * s.integer("linear_value_head_dim", "", without=key))
    width = s.integer("linear_conv_kernel_dim", "ssm.conv_kernel", least=2)
    if value_heads % key_heads or inner % value_heads:
        raise s.error(
            f"{value_heads} value heads of {inner} values cannot share {key_heads} key heads", s.about(KEY_HEADS)
        )
    value = inner // value_heads
    channels = 2 * key_heads * key + inner
    qkv, z = _qkv_z(make, name, hidden, (key_heads, key, inner // key_heads))
    b, a = _b_a(make, name, hidden, key_heads, value_heads)
    conv = make.ref(f"{name}.conv", (channels, width), fold=True)  # hub folders have an axis of 1 between
    decay = make.ref(f"{name}.decay", (value_heads,), "")
    dt_bias = make.ref(f"{name}.dt_bias", (value_heads,), "")
    state = StateCacheSpec(((width - 1, channels), (value_heads, key, value)))
    return make.composite(
        name,
        GatedDeltaNetSpec,
        {
            "qkv": qkv,
            "z": z,
            "b": b,
            "a": a,
            "o": make.linear(f"{name}.out", inner, hidden),
            "out_norm": make.norm(f"{name}.out_norm", value, rms_eps(make), offset=0.0),
            "state": make.node(f"{name}.state", state),
            "norm": None if bare else make.norm(f"{name}.norm", hidden, rms_eps(make)),
        },
        {"conv": conv, "decay": decay, "dt_bias": dt_bias},
        hidden=hidden,
        key_heads=key_heads,
        value_heads=value_heads,
        key_dim=key,
        value_dim=value,
        conv_width=width,
        conv_format=conv.format,
        decay_format=decay.format,
        dt_bias_format=dt_bias.format,
        # converters to GGUF store the rates themselves
        decay_log=not s.gguf,
        tiled=tiled and value_heads > key_heads > 1,
        sigmoid_gate=sigmoid_gate,
        residual=not bare,
    )


def _qkv_z(make: NodeMaker, name: str, hidden: int, sizes: tuple[int, int, int]) -> tuple[Node, Node]:
    """The rows of q, k and v of all heads, and of z; `sizes` are key heads, their width, values of a key head."""
    heads, key, values = sizes
    if make.names.knows(f"{name}.qkv") and not make.has(f"{name}.qkvz"):
        channels = heads * (2 * key + values)
        return make.linear(f"{name}.qkv", hidden, channels), make.linear(f"{name}.z", hidden, heads * values)
    group = 2 * key + 2 * values

    def part(start: int, count: int) -> list[RowSlice]:
        return [(h * group + start, h * group + start + count, 1) for h in range(heads)]

    whole, rows = f"{name}.qkvz", heads * group
    order = part(0, key) + part(key, key) + part(2 * key, values)
    qkv = make.picked(f"{name}.qkv", whole, hidden, order, rows)
    return qkv, make.picked(f"{name}.z", whole, hidden, part(2 * key + values, values), rows)


def _b_a(make: NodeMaker, name: str, hidden: int, key_heads: int, value_heads: int) -> tuple[Node, Node]:
    """b and a of all value heads; stored one by one, or together, key head by key head."""
    if not make.names.knows(f"{name}.ba"):
        return make.linear(f"{name}.b", hidden, value_heads), make.linear(f"{name}.a", hidden, value_heads)
    group, rows = value_heads // key_heads, 2 * value_heads
    starts = range(0, rows, 2 * group)
    b = make.picked(f"{name}.b", f"{name}.ba", hidden, [(at, at + group, 1) for at in starts], rows)
    return b, make.picked(f"{name}.a", f"{name}.ba", hidden, [(at + group, at + 2 * group, 1) for at in starts], rows)
