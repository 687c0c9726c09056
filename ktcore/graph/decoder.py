"""The skeleton of every decoder: embedding, layers of two residual branches, norm, head, sampler."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from ktcore.graph.further import further_layer
from ktcore.graph.maker import NodeMaker
from ktcore.graph.node import FurtherLayer, Graph, Layer, Node
from ktcore.graph.settings import Settings
from ktcore.graph.streams import Streams
from ktcore.ops.embedding import EmbeddingSpec
from ktcore.ops.linear import LinearSpec
from ktcore.ops.ngram import PrecededSpec
from ktcore.ops.sampling import SamplingSpec

Branch = Callable[[str, int], Node]
"""Makes the node of that name for that layer."""


def decoder_graph(
    make: NodeMaker,
    family: str,
    attention: Branch,
    ffn: Branch,
    streams: Streams | None = None,
    *,
    before: Callable[[int], Node | None] = lambda layer: None,
    context: str = "max_position_embeddings",
    further: tuple[Branch, Branch] | None = None,
    embed_scale: float = 1.0,
    softcap: float = 0.0,
) -> Graph:
    """The graph of a decoder whose layers are `attention` and `ffn`, between residual streams where it has such.

    Layers beyond the configured number, which predict further tokens, are left out unless the settings want them.

    Args:
        before: makes what stands in front of a layer, if anything does.
        context: key of config.json that says how many tokens the model was made for.
        embed_scale: multiplies the embeddings.
        softcap: that no logit grows beyond; 0 for none.
        further: the branches of the first of those layers, of families that are known to have it.

    Raises:
        ArchitectureError: such a layer is wanted, and the family or the checkpoint has none.
    """
    settings = make.settings
    hidden = settings.integer("hidden_size", "embedding_length")
    layers = settings.layers() - settings.integer("", "nextn_predict_layers", least=0, without=0)
    vocab = _vocab(make)
    table = make.ref("embed", (vocab, hidden))
    embed = make.node("embed", EmbeddingSpec(vocab, hidden, table.format, embed_scale), {"weight": table})

    def layer(i: int) -> Layer:
        branches = attention(f"layers.{i}.attn", i), ffn(f"layers.{i}.ffn", i)
        attn, mlp = (streams.around(branch) if streams else branch for branch in branches)
        first = before(i)
        if first is not None:
            attn = make.composite(f"layers.{i}.begin", PrecededSpec, {"before": first, "branch": attn})
        return Layer(attn, mlp)

    made = tuple(layer(i) for i in range(layers))
    norm = streams.end() if streams else make.norm("norm", hidden, rms_eps(make))
    drafts = further_layer(make, hidden, layers, norm, rms_eps(make), further) if settings.further else None
    return Graph(
        architecture=settings.architecture,
        family=family,
        hidden=hidden,
        vocab=vocab,
        context_length=settings.integer(context, "context_length"),
        embed=embed,
        layers=made,
        norm=norm,
        head=_head(make, vocab, hidden, embed, softcap),
        sampler=make.node("sampler", SamplingSpec(vocab)),
        streams=streams.count if streams else 1,
        read=tuple(make.read),
        left_out=_left_out(settings, drafts),
        further=drafts,
    )


def _left_out(settings: Settings, further: FurtherLayer | None) -> dict[str, str]:
    parts = {**settings.defaults.left_out, **(settings.wrapper.left_out if settings.wrapper else {})}
    refs = [ref for root in further.roots() for ref in root.all_weights().values()] if further else []
    run = [source for ref in refs for source in ref.sources]
    return {start: part for start, part in parts.items() if not any(source.startswith(start) for source in run)}


def rms_eps(make: NodeMaker) -> float:
    """The model's RMSNorm epsilon."""
    return make.settings.number("rms_norm_eps", "attention.layer_norm_rms_epsilon")


def _vocab(make: NodeMaker) -> int:
    # GGUF files need not say; the table's height is what counts
    tensor = make.settings.checkpoint.tensors.get(make.names.of("embed") + ".weight")
    rows = tensor.shape[0] if tensor is not None else 0
    return rows if make.settings.gguf else make.settings.integer("vocab_size", "")


def _head(make: NodeMaker, vocab: int, hidden: int, embed: Node, softcap: float) -> Node:
    # a head of its own counts whatever is said of tying, as in transformers 5 and llama.cpp: fine-tunes come so
    tied = make.settings.flag("tie_word_embeddings", "", without=True)
    if make.has("head") or not tied:
        own = make.linear("head", hidden, vocab)
        return replace(own, spec=replace(own.spec, softcap=softcap)) if softcap else own  # type: ignore[call-arg]
    table = embed.weights["weight"]
    return make.node("head", LinearSpec(hidden, vocab, table.format, softcap=softcap), {"weight": table})
