"""Memory figures of a plan, device by device, and the words for "it does not fit"."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ktcore.errors import RequestError
from ktcore.ops.attention import AttentionSpec
from ktcore.ops.base import Spec
from ktcore.ops.linear import LinearSpec
from ktcore.ops.linear_attention import GatedDeltaNetSpec
from ktcore.ops.mla import MLASpec
from ktcore.ops.mlp import MLPSpec
from ktcore.ops.moe import ExpertsSpec
from ktcore.ops.streams import GatedStreamsSpec, HyperConnectionSpec

DEFAULT_CONTEXT = 16384
"""Longest context that is planned for unasked, in tokens."""
STEP_TOKENS = 512
"""Tokens of the largest step, for the workspace."""
LONG_SHARE = 4
"""A step that grows with a long prompt (`Implementation.long_step`) has at most one in so many of those behind it."""
STATE_SLOTS = 16
"""Sequences that may run at once in a model with recurrent states: each takes a slot in all of them."""

_FLOAT = 4
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_BINARY = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(I?)B?\s*", re.IGNORECASE)


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes on one device.

    Attributes:
        kv: the KV cache, and recurrent states.
        workspace: an estimate of what the widest operator holds in the plan's largest step.
        limit: what may be used; None when unknown.
    """

    weights: int
    kv: int
    workspace: int
    limit: int | None = None

    @property
    def total(self) -> int:
        """Weights, KV cache and workspace together."""
        return self.weights + self.kv + self.workspace

    @property
    def excess(self) -> int:
        """Bytes above the limit; 0 when it fits or no limit is known."""
        return 0 if self.limit is None else max(0, self.total - self.limit)


def workspace_bytes(spec: Spec, tokens: int = STEP_TOKENS) -> int:
    """Estimated bytes of activations that one operator, parts included, holds at once for `tokens` tokens."""
    return tokens * _FLOAT * _width(spec)


def fit_hint(memory: DeviceMemory, context: int) -> str:
    """What to change when a plan does not fit at `context` tokens."""
    room = 0 if memory.limit is None else memory.limit - memory.weights - memory.workspace
    if room > 0 and memory.kv:
        tokens = room * context // memory.kv
        if tokens >= 256:
            return f"a context of {tokens // 256 * 256} tokens fits; or put nodes on the host with a rule"
    return "put more nodes on the host (a rule with 'device: host'), or take a checkpoint with smaller weights"


def parse_bytes(text: str) -> int:
    """Bytes of "24GiB" (powers of 1024), "2GB" or "512M" (powers of 1000), "1000".

    Raises:
        ValueError: it is not a size, or 0.
    """
    found = _SIZE.fullmatch(text)
    if found is None or (found[3] and not found[2]):
        raise ValueError(f"'{text}' is not a size; write it like 24GiB, 2GB or 512M")
    unit = found[2].upper()
    size = int(float(found[1]) * (_BINARY[unit] if found[3] else _UNITS[unit]))
    if size == 0:
        raise ValueError("a size must be above 0")
    return size


def byte_count(name: str, given: object) -> int:
    """Bytes of a number, or of words as `parse_bytes` reads them.

    Raises:
        RequestError: it is no size; `name` says what was to be one.
    """
    wanted = "give bytes as a number, or words like 24GiB, 2GB or 512M"
    if isinstance(given, str):
        try:
            return parse_bytes(given)
        except ValueError as error:
            raise RequestError(f"{name}: {error}", wanted) from None
    if isinstance(given, int) and not isinstance(given, bool) and given > 0:
        return given
    raise RequestError(f"{name} cannot be {given!r}", wanted)


def human_bytes(count: int) -> str:
    """A byte count in binary units: "1.5 GiB"."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def human_count(count: int) -> str:
    """A number of parameters: "135 M", "671.0 B"."""
    return f"{count / 1e9:.1f} B" if count >= 1e9 else f"{count / 1e6:.0f} M" if count >= 1e6 else str(count)


def _width(spec: Spec) -> int:
    """Float values a token that are alive at once: inputs, outputs and what lies between."""
    if isinstance(spec, LinearSpec):
        return spec.in_features + spec.out_features
    if isinstance(spec, MLPSpec):
        return 2 * spec.hidden + 3 * spec.intermediate
    if isinstance(spec, ExpertsSpec):
        return spec.top_k * (spec.hidden + 3 * spec.intermediate)
    if isinstance(spec, AttentionSpec):
        return 2 * spec.hidden + 2 * (spec.heads + spec.kv_heads) * spec.head_dim
    if isinstance(spec, GatedDeltaNetSpec):
        return 2 * spec.hidden + 3 * spec.qkv.out_features + 3 * spec.z.out_features
    if isinstance(spec, MLASpec):
        indexer = spec.indexer.heads * spec.indexer.head_dim + spec.indexer.top_k if spec.indexer else 0
        heads = spec.heads * (2 * (spec.latent + spec.rope_dim) + spec.nope_dim + spec.value_dim)
        return 2 * spec.hidden + heads + indexer
    if isinstance(spec, (HyperConnectionSpec, GatedStreamsSpec)):
        return 4 * spec.streams * spec.hidden
    parts = [_width(part) for part in spec.children().values()]
    return max(parts, default=0) + 2 * int(getattr(spec, "hidden", getattr(spec, "dim", 0)))
