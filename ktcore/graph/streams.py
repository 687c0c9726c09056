"""Residual streams of a decoder: what stands around each branch, and what ends them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from ktcore.graph.maker import NodeMaker
from ktcore.graph.names import NameTable
from ktcore.graph.node import Node
from ktcore.ops.streams import GatedStreamsSpec, HyperConnectionSpec, StreamBranchSpec, StreamEndSpec

GATED_STREAMS: NameTable = {
    f"{where}.mix.{part}": (f"{hub}.{name}", f"{ggufs}_{short}")
    for where, hub, ggufs in (
        ("attn_branch", "attn_hyper_connection", "hc_attn"),
        ("ffn_branch", "mlp_hyper_connection", "hc_ffn"),
        ("end", "model.hyper_connection_mixer", "output_hc"),
    )
    for part, name, short in (
        ("norm", "hc_norm", "norm"),
        ("down", "input_mix_weight_down", "down"),
        ("up", "input_mix_weight_up", "up"),
        ("inject", "block_inject_weight", "inject"),
    )
}
"""Qwen3.8-Flash-Next's."""


@dataclass(frozen=True)
class Streams:
    """For `decoder_graph`.

    Attributes:
        count: of the streams.
        around: the node of a branch, which adds no residual, between the streams.
        end: makes the node that gives the head its input.
    """

    count: int
    around: Callable[[Node], Node]
    end: Callable[[], Node]


def hyper_connections(
    make: NodeMaker, hidden: int, count: int, *, rounds: int, eps: float, rms_eps: float, weighted_end: bool
) -> Streams:
    """Hyper-connections with names as `HYPER_CONNECTION` of `ktcore.graph.names` has them.

    Args:
        rounds, eps, rms_eps: as in `HyperConnectionSpec`.
        weighted_end: the model ends with pre-weights of its own (DeepSeek-V4), not with the streams' mean.
    """
    suffix = ".weight" if make.settings.gguf else ""

    def mix(name: str, leave: bool) -> Node:
        spec = HyperConnectionSpec(hidden, count, eps, rms_eps, rounds if leave else 0, leave="mixed" if leave else "")
        shapes = {"fn": (spec.rows, count * hidden), "base": (spec.rows,), "scale": (spec.parts,)}
        refs = {role: make.ref(name, shape, f"_{role}{suffix}") for role, shape in shapes.items()}
        formats = {f"{role}_format": ref.format for role, ref in refs.items()}
        return make.node(name, replace(spec, **formats), refs)  # type: ignore[arg-type]

    def end() -> Node:
        parts = {"mix": mix("end.mix", False) if weighted_end else None, "norm": make.norm("norm", hidden, rms_eps)}
        return make.composite("end", StreamEndSpec, parts, hidden=hidden, streams=count)

    return Streams(count, lambda branch: _around(make, branch, mix(f"{branch.name}_branch.mix", True)), end)


def gated_streams(make: NodeMaker, hidden: int, count: int, rank: int, eps: float) -> Streams:
    """Gated streams with names as in `GATED_STREAMS`; they end without a norm.

    Args:
        rank: of the two projections that make the mixture.
        eps: of the norms, whose offset is the maker's.
    """
    width = count * hidden

    def mix(name: str, leave: bool) -> Node:
        norm = make.ref(f"{name}.norm", (width,))
        return make.composite(
            name,
            GatedStreamsSpec,
            {
                "down": make.linear(f"{name}.down", width, rank),
                "up": make.linear(f"{name}.up", rank, width),
                "inject": make.linear(f"{name}.inject", width, count) if leave else None,
            },
            {"norm": norm},
            hidden=hidden,
            streams=count,
            eps=eps,
            norm_offset=make.norm_offset,
            norm_format=norm.format,
        )

    def end() -> Node:
        return make.composite("end", StreamEndSpec, {"mix": mix("end.mix", False)}, hidden=hidden, streams=count)

    return Streams(count, lambda branch: _around(make, branch, mix(f"{branch.name}_branch.mix", True)), end)


def _around(make: NodeMaker, branch: Node, mix: Node) -> Node:
    return make.composite(f"{branch.name}_branch", StreamBranchSpec, {"mix": mix, "branch": branch})
