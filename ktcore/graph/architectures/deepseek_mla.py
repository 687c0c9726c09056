"""Multi-head latent attention nodes as DeepSeek checkpoints hold them, GGUF's old and new layouts included."""

from __future__ import annotations

from dataclasses import dataclass

from ktcore.graph.decoder import rms_eps
from ktcore.graph.maker import NodeMaker
from ktcore.graph.node import Node
from ktcore.graph.rotary import rope_node
from ktcore.graph.settings import Settings
from ktcore.ops.attention import Temperature
from ktcore.ops.indexer import IndexCacheSpec, TokenIndexerSpec
from ktcore.ops.kv_cache import KVCacheSpec
from ktcore.ops.linear import LinearSpec
from ktcore.ops.mla import MLASpec
from ktcore.ops.rope import Pairing, RopeSpec, yarn_mscale
from ktcore.weights.ref import WeightRef

INDEX_EPS = 1e-6  # of the LayerNorm on index keys: a number in the model code
INDEX_WIDTH = (("index_head_dim", "attention.indexer.key_length"), ("qk_rope_head_dim", "rope.dimension_count"))
INNER_EPS = 1e-6  # of the norms on q and the latent, whatever rms_norm_eps says: the model code's class default


@dataclass(frozen=True)
class _Sizes:
    hidden: int
    heads: int
    nope: int
    rope: int
    value: int
    latent: int
    q_rank: int


@dataclass(frozen=True)
class Sparse:
    """How a layer's attention is sparse.

    Attributes:
        pairing: of the indexer's rotary embedding; None: without one, the layer attends to what the last indexer chose.
        pool: tokens of a pool whose keys are one; such keys do not rotate. 0: each token has its own.
    """

    pairing: Pairing | None
    pool: int = 0

    @property
    def own(self) -> bool:
        """Whether the layer has an indexer."""
        return self.pairing is not None or self.pool > 0


def mla_node(
    make: NodeMaker,
    name: str,
    *,
    temperature: Temperature | None = None,
    share: bool = False,
    sparse: Sparse | None = None,
    rotates: bool = True,
    inner_eps: float = INNER_EPS,
) -> Node:
    """One layer's attention branch.

    Args:
        temperature: of the queries.
        share: `partial_rotary_factor` is the rotated part of a whole head, not of the part that rotates.
        sparse: attention over chosen tokens.
        rotates: false: there is no position embedding, and the part that would rotate may be absent.
        inner_eps: of the norms on q and the latent.
    """
    s = make.settings
    z = _sizes(s, least_rope=int(rotates))
    turned = rotates and s.flag("rope_interleave", "", without=True)
    pairing: Pairing = "interleaved" if turned else "half"
    key = z.nope + z.rope
    whole = z.rope / key if share else 1.0
    rope = rope_node(make, f"{name}.rope", z.rope, pairing, log_multiplier=True, whole=whole) if rotates else None
    up, split = _up_projection(make, name, z)
    low_rank = z.q_rank > 0
    query = f"{name}.q_b" if low_rank else f"{name}.q"
    return make.composite(
        name,
        MLASpec,
        {
            "kv_a": make.linear(f"{name}.kv_a", z.hidden, z.latent + z.rope),
            "kv_a_norm": make.norm(f"{name}.kv_a_norm", z.latent, inner_eps),
            "o": make.linear(f"{name}.o", z.heads * z.value, z.hidden),
            "rope": rope,
            "cache": make.node(
                f"{name}.cache",
                KVCacheSpec("mla", z.heads, 1, z.latent + z.rope, z.latent, chosen=sparse is not None),
            ),
            "q_a": make.linear(f"{name}.q_a", z.hidden, z.q_rank) if low_rank else None,
            "q_a_norm": make.norm(f"{name}.q_a_norm", z.q_rank, inner_eps) if low_rank else None,
            "q_b" if low_rank else "q": make.linear(query, z.q_rank or z.hidden, z.heads * key),
            "norm": make.norm(f"{name}.norm", z.hidden, rms_eps(make)),
            "indexer": _indexer(make, f"{name}.indexer", z, sparse) if sparse and sparse.own else None,
        },
        up,
        hidden=z.hidden,
        heads=z.heads,
        nope_dim=z.nope,
        rope_dim=z.rope,
        value_dim=z.value,
        latent=z.latent,
        scale=key**-0.5 * _magnitude(rope) ** 2,
        kv_b_format=next(iter(up.values())).format,
        split_kv_b=split,
        temperature=temperature,
        shared_index=sparse is not None and not sparse.own,
    )


def _indexer(make: NodeMaker, name: str, z: _Sizes, sparse: Sparse) -> Node:
    s = make.settings
    if not z.q_rank:
        raise s.error("q_lora_rank is 0 or null, but the token indexer reads the low-rank query")
    heads = s.integer("index_n_heads", "attention.indexer.head_count")
    width = s.integer("index_head_dim", "attention.indexer.key_length")
    top_k = s.integer("index_topk", "attention.indexer.top_k")
    if width < z.rope:
        raise s.error(f"index heads have {width} values, less than the {z.rope} that rotate", s.about(*INDEX_WIDTH))
    if sparse.pool and top_k % sparse.pool:
        raise s.error(f"index_topk is {top_k}, no multiple of the {sparse.pool} tokens of index_kpool")
    norm = make.ref(f"{name}.k_norm", (width,))
    weights = {"k_norm": norm, "k_norm_bias": make.ref(f"{name}.k_norm", (width,), ".bias")}
    rope = rope_node(make, f"{name}.rope", z.rope, sparse.pairing, log_multiplier=True) if sparse.pairing else None
    if sparse.pool:
        suffix = ".weight" if s.gguf else ""
        weights["ape"] = make.ref(f"{name}.ape", (sparse.pool, width), suffix)
    return make.composite(
        name,
        TokenIndexerSpec,
        {
            "q": make.linear(f"{name}.q", z.q_rank, heads * width),
            "k": make.linear(f"{name}.k", z.hidden, width),
            "weights": make.linear(f"{name}.weights", z.hidden, heads),
            "rope": rope,
            "cache": make.node(f"{name}.cache", IndexCacheSpec(heads, width, top_k, sparse.pool)),
            "gate": _gate(make, f"{name}.gate", z.hidden, width) if sparse.pool else None,
        },
        weights,
        hidden=z.hidden,
        rank=z.q_rank,
        heads=heads,
        head_dim=width,
        top_k=top_k,
        eps=INDEX_EPS,
        k_norm_format=norm.format,
        **({"ape_format": weights["ape"].format} if sparse.pool else {}),
    )


def _gate(make: NodeMaker, name: str, hidden: int, width: int) -> Node:
    weight = make.ref(name, (width, hidden), ".weight" if make.settings.gguf else "")
    return make.node(name, LinearSpec(hidden, width, weight.format), {"weight": weight})


def _sizes(s: Settings, least_rope: int) -> _Sizes:
    # newer GGUF files describe the absorbed form in key_length and value_length, and the plain one under _mla
    hidden = s.integer("hidden_size", "embedding_length")
    heads = s.integer("num_attention_heads", "attention.head_count")
    key, value = (_plain_width(s, role, hidden // heads) for role in ("key", "value"))
    rope = s.integer("qk_rope_head_dim", "rope.dimension_count", derived=key, least=least_rope)
    return _Sizes(
        hidden=hidden,
        heads=heads,
        nope=key - rope if s.gguf else s.integer("qk_nope_head_dim", ""),
        rope=rope,
        value=value if s.gguf else s.integer("v_head_dim", ""),
        latent=s.integer("kv_lora_rank", "attention.kv_lora_rank"),
        q_rank=s.integer("q_lora_rank", "attention.q_lora_rank", least=0),
    )


def _plain_width(s: Settings, role: str, even: int) -> int:
    """GGUF's width of a head's keys or values; 0 for hub folders, which have it under other names."""
    absorbed = s.integer("", f"attention.{role}_length", without=0, derived=even, least=0)
    return s.integer("", f"attention.{role}_length_mla", without=0, derived=absorbed, least=0)


def _up_projection(make: NodeMaker, name: str, z: _Sizes) -> tuple[dict[str, WeightRef], bool]:
    """The latent's up-projection(s), and whether they come split; some files hold both, then the split ones count."""
    if make.settings.gguf and make.has(f"{name}.k_b"):
        return {
            "k_b": make.ref(f"{name}.k_b", (z.heads, z.latent, z.nope), fold=True),
            "v_b": make.ref(f"{name}.v_b", (z.heads, z.value, z.latent), fold=True),
        }, True
    return {"kv_b": make.ref(f"{name}.kv_b", (z.heads * (z.nope + z.value), z.latent))}, False


def _magnitude(rope: Node | None) -> float:
    """YaRN's factor on the softmax scale, here applied to scores instead of cos and sin."""
    spec = rope.spec if rope else None
    if not isinstance(spec, RopeSpec) or spec.scaling is None or not spec.scaling.mscale_all_dim:
        return 1.0
    return yarn_mscale(spec.scaling.factor, spec.scaling.mscale_all_dim)
