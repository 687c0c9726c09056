"""N-gram tables of Qwen3.8-Flash-Next: the constants of their hashes, the stored table, and what mixes rows in."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ktcore.graph.decoder import rms_eps
from ktcore.graph.maker import NodeMaker
from ktcore.graph.names import NameTable
from ktcore.graph.node import Node
from ktcore.graph.settings import Settings
from ktcore.ops.linear_attention import StateCacheSpec
from ktcore.ops.ngram import NGramSpec, NGramTableSpec
from ktcore.weights.ref import WeightRef

NGRAM: NameTable = {
    "ngram.table": ("ple.ple_embedding.ngram_embedding.shard_{}", ""),
    # as transformers has it in memory
    "ngram.whole": ("ple.ple_embedding.ngram_embedding", ""),
    "ngram.multipliers": ("ple.ple_embedding.layer_multipliers", ""),
    "ngram.sizes": ("ple.ple_embedding.ngram_heads_vocab_sizes", ""),
    "ngram.offsets": ("ple.ple_embedding.ngram_heads_offsets", ""),
    "ngram.key": ("ple.key_proj", "ple_key"),
    "ngram.value": ("ple.value_proj", "ple_value"),
    "ngram.norm_key": ("ple.norm_key", "ple_norm_key"),
    "ngram.norm_query": ("ple.norm_query", "ple_norm_query"),
    "ngram.norm_conv": ("ple.norm_conv", "ple_norm_conv"),
    "ngram.conv": ("ple.conv1d", "ple_conv1d"),
}
TABLE = "per_layer_token_embd.weight"
"""In GGUF the table is outside of layers: there is one."""
MOST_TOKENS = 1 << 24
"""Ids are kept as float32 between steps, which is exact up to here."""
MOST_HEADS, MOST_ROWS = 1024, 1 << 31
"""Beyond any model's."""
_WORD = (1 << 64) - 1
_GAMMA = 0x9E3779B97F4A7C15
_LAYERS_APART = 10007


@dataclass(frozen=True)
class Hashes:
    """The constants of one layer's hashes, as in `NGramTableSpec`; `rows`: of its table."""

    multipliers: tuple[int, ...]
    sizes: tuple[int, ...]
    offsets: tuple[int, ...]
    rows: int


def ngram_layers(s: Settings) -> list[int]:
    """Indices of the layers with such a table, from 0; config.json counts from 1."""
    found = s.get("ple_layer_ids", "ple.layers")
    layers = s.layers()
    found = (
        [] if found is None else list(found) if isinstance(found, Sequence) and not isinstance(found, str) else [None]
    )
    first = 0 if s.gguf else 1
    if any(type(i) is not int or not first <= i < layers + first for i in found):
        raise s.error(f"{'ple.layers' if s.gguf else 'ple_layer_ids'} is {found!r}, indices of layers are needed")
    return sorted({i - first for i in found})


def ngram_node(make: NodeMaker, layer: int, layers: Sequence[int], streams: int) -> Node:
    """What stands in front of the attention of a layer, which is one of `layers`."""
    s, name = make.settings, f"layers.{layer}.ngram"
    hidden, width = s.integer("hidden_size", "embedding_length"), streams * s.integer("hidden_size", "embedding_length")
    size = s.integer("ngram_size", "ple.ngram_size", least=2)
    kernel = s.integer("ple_conv_kernel_size", "ple.conv_kernel", least=1)
    table = _table_node(make, name, layers.index(layer), size)
    embedded = table.spec.width  # type: ignore[attr-defined]
    weights = {role: make.ref(f"{name}.{role}", (width,)) for role in ("norm_key", "norm_query", "norm_conv")}
    weights["conv"] = make.ref(f"{name}.conv", (width, kernel), fold=True)  # hub folders have an axis of 1 between
    return make.composite(
        name,
        NGramSpec,
        {
            "table": table,
            "key": make.linear(f"{name}.key", embedded, width),
            "value": make.linear(f"{name}.value", embedded, hidden),
            "state": make.node(f"{name}.state", StateCacheSpec((((kernel - 1) * size, width),))),
        },
        weights,
        hidden=hidden,
        streams=streams,
        eps=rms_eps(make),
        conv_width=kernel,
        dilation=size,
        norm_offset=make.norm_offset,
        norm_format=weights["norm_key"].format,
        conv_format=weights["conv"].format,
    )


def _table_node(make: NodeMaker, name: str, index: int, size: int) -> Node:
    s = make.settings
    heads = (size - 1) * s.integer("heads_per_ngram", "ple.heads_per_ngram")
    if heads > MOST_HEADS:
        raise s.error(f"heads_per_ngram and ngram_size make {heads} heads, more than any model has")
    hashes = _hashes(make, name, index, size, heads)
    if s.gguf:
        dim = s.integer("", "embedding_length_per_layer_input")
        table = WeightRef.of(s.checkpoint, TABLE)
        make.check(TABLE, table.shape, (max(hashes.rows, table.shape[0]), dim))
    else:
        whole = s.integer("ple_embed_dim", "", derived=s.integer("hidden_size", ""))
        parts = s.integer("split_ngram_parts", "")
        if whole % heads:
            raise s.error(f"ple_embed_dim is {whole}, which {heads} heads of n-grams cannot share")
        if hashes.rows % parts:
            raise s.error(f"split_ngram_parts is {parts}, into which {hashes.rows} rows do not go")
        dim = whole // heads
        if make.has(f"{name}.whole"):
            table = make.ref(f"{name}.whole", (hashes.rows, dim))
        else:
            table = make.stack(f"{name}.table", parts, (hashes.rows // parts, dim))
    rows = math.prod(table.shape[:-1])
    spec = NGramTableSpec(
        rows=rows,
        dim=dim,
        multipliers=hashes.multipliers,
        sizes=hashes.sizes,
        offsets=hashes.offsets,
        eos=_eos(s),
        table_format=table.format,
        state=StateCacheSpec(((size - 1,),)),
    )
    state = make.node(f"{name}.table.state", spec.state)
    return Node(f"{name}.table", spec, {"table": table}, {"state": state}, make.node(name, spec.state).layer)


def _hashes(make: NodeMaker, name: str, index: int, size: int, heads: int) -> Hashes:
    s = make.settings
    counts = {"multipliers": size, "sizes": heads, "offsets": heads}
    if s.gguf:
        keys = {"multipliers": "layer_multipliers", "sizes": "head_vocab_sizes", "offsets": "head_offsets"}
        found = {
            role: _whole_numbers(s, f"ple.{keys[role]}", s.get("", f"ple.{keys[role]}"), n)
            for role, n in counts.items()
        }
    elif s.checkpoint.weightless:
        found = _derived(s, index, size, heads)
    else:
        found = {role: make.constants(f"{name}.{role}", n) for role, n in counts.items()}
    rows = max(first + count for first, count in zip(found["offsets"], found["sizes"], strict=True))
    if min(found["sizes"]) < 1 or min(found["offsets"]) < 0 or min(found["multipliers"]) < 0:
        raise s.error(f"hashes of n-grams in layer {name.split('.')[1]} name rows of a table that cannot be")
    if s.gguf:
        return Hashes(**found, rows=rows)
    unit = s.integer("make_ngram_vocab_size_divisible_by", "")
    return Hashes(**found, rows=-(-rows // unit) * unit)


def _whole_numbers(s: Settings, key: str, value: object, count: int) -> tuple[int, ...]:
    numbers = tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else ()
    if len(numbers) < count or any(type(n) is not int for n in numbers):
        raise s.error(f"{key} is {value!r}, {count} whole numbers are needed")
    return numbers[:count]


def _derived(s: Settings, index: int, size: int, heads: int) -> dict[str, tuple[int, ...]]:
    """What a checkpoint without weights would hold: `_build_layer_multipliers` of transformers' modeling_qwen4_exp.py,
    and the primes from `ngram_vocab_size_base` up, counted over all layers with a table."""
    half = max(1, ((1 << 63) - 1) // s.integer("vocab_size", "") // 2)
    begin = s.integer("seed", "", least=0) + _LAYERS_APART * index
    multipliers = tuple(2 * (_mixed(begin + _GAMMA * (i + 1)) % half) + 1 for i in range(size))
    sizes, at = [], s.integer("ngram_vocab_size_base", "") - 1
    if at >= MOST_ROWS:
        raise s.error(f"ngram_vocab_size_base is {at + 1}, more rows than any table has")
    for _ in range((index + 1) * heads):
        at += 1
        while not _is_prime(at):
            at += 1
        sizes.append(at)
    own = tuple(sizes[-heads:])
    return {"multipliers": multipliers, "sizes": own, "offsets": tuple(sum(own[:j]) for j in range(heads))}


def _mixed(value: int) -> int:
    """splitmix64 (Steele et al., 2014) of a state."""
    value = (value + _GAMMA) & _WORD
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _WORD
    return value ^ (value >> 31)


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, math.isqrt(n) + 1))


def _eos(s: Settings) -> int:
    """The token that ends n-grams: of several the first, as transformers takes it."""
    found = s.get("eos_token_id", "ple.eos_token_id")
    found = found[0] if isinstance(found, list) and found else found
    if type(found) is not int or not 0 <= found < MOST_TOKENS:
        raise s.error(f"{'ple.eos_token_id' if s.gguf else 'eos_token_id'} is {found!r}, a token is needed")
    return found
