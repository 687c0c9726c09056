"""The layer that predicts further tokens (multi-token prediction), where a checkpoint has it and drafts are wanted."""

from __future__ import annotations

from collections.abc import Callable

from ktcore.errors import ArchitectureError
from ktcore.graph.maker import NodeMaker
from ktcore.graph.node import FurtherLayer, Layer, Node
from ktcore.graph.settings import Settings

Branch = Callable[[str, int], Node]


def further_layer(
    make: NodeMaker, hidden: int, layers: int, norm: Node, eps: float, branches: tuple[Branch, Branch] | None
) -> FurtherLayer:
    """The first layer behind the model's `layers`, with what leads into it and out of it.

    Embedding and head are the model's own: copies that files hold in the layer are not read.

    Args:
        norm: the model's last one, which GGUF files take where the layer has none (llama.cpp).
        branches: makes attention and FFN; None: the family is not known to have such a layer.

    Raises:
        ArchitectureError: the family has no such layer, the checkpoint does not hold it, or it holds several.
    """
    name = f"layers.{layers}"
    if branches is None or not make.has(f"{name}.further.project"):
        raise no_further(make.settings, "" if branches is None else make.names.of(f"{name}.further.project"))
    if make.has(f"layers.{layers + 1}.attn.norm"):
        raise make.settings.error(
            "holds several layers that predict further tokens, each for a distance of its own",
            "models with one of them are known: load it without --draft mtp",
        )
    attention, ffn = branches
    own = make.has(f"{name}.further.norm") or not make.settings.gguf
    return FurtherLayer(
        embed_norm=make.norm(f"{name}.further.embed_norm", hidden, eps),
        hidden_norm=make.norm(f"{name}.further.hidden_norm", hidden, eps),
        project=make.linear(f"{name}.further.project", 2 * hidden, hidden),
        layer=Layer(attention(f"{name}.attn", layers), ffn(f"{name}.ffn", layers)),
        norm=make.norm(f"{name}.further.norm", hidden, eps)
        if own
        else make.node(f"{name}.further.norm", norm.spec, norm.weights),
    )


def no_further(settings: Settings, tensor: str = "") -> ArchitectureError:
    """What to tell where such a layer is wanted and there is none.

    Args:
        tensor: what the checkpoint lacks; "": the family is not known to have such a layer.
    """
    if tensor:
        return settings.error(
            f"has no layer that predicts further tokens: tensor '{tensor}.weight' is missing",
            "take a checkpoint that keeps it (some converters drop it), or draft otherwise: --draft MODEL",
        )
    return settings.error(
        f"architecture '{settings.architecture}' is not known to have a layer that predicts further tokens",
        "draft with a smaller model of the same vocabulary: --draft MODEL",
    )
