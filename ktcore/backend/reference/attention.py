"""References of the attention branches, composed of parts that may come from other backends."""

from __future__ import annotations

from typing import Any, cast

import torch

from ktcore.backend.implementation import LoadRequest, Module
from ktcore.backend.reference.base import FLOAT_BYTES, ReferenceImplementation, loaded
from ktcore.errors import BackendError
from ktcore.ops.attention import AttentionSpec, tempered
from ktcore.ops.batch import StepBatch
from ktcore.ops.kv_cache import attend
from ktcore.ops.mla import MLASpec, absorb_query, expand_output, split_up_projection


class ReferenceAttention(ReferenceImplementation):
    """Grouped-query attention."""

    id = "reference.attention"
    spec_type = AttentionSpec

    def load(self, request: LoadRequest) -> Module:
        spec = cast(AttentionSpec, request.spec)
        parts = request.children
        sinks = (loaded(request, "sinks"),) if spec.sinks else ()

        def normed(q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return parts["q_norm"](q) if spec.q_norm else q, parts["k_norm"](k) if spec.k_norm else k

        def run(x: torch.Tensor, step: StepBatch) -> Any:
            n = parts["norm"](x) if spec.norm else x
            q = parts["q"](n).view(-1, spec.heads, spec.head_dim)
            k = parts["k"](n).view(-1, spec.kv_heads, spec.head_dim)
            v = parts["v"](n).view(-1, spec.kv_heads, spec.head_dim)
            if not spec.norm_after_rope:
                q, k = normed(q, k)
            positions = positions_on(x.device, step)
            if spec.rope:
                q, k = parts["rope"](q, positions), parts["rope"](k, positions)
            if spec.norm_after_rope:
                q, k = normed(q, k)
            if spec.temperature:
                q = tempered(q, positions, spec.temperature)
            parts["cache"].append(step, k, v)
            seen = parts["cache"].attend(step, q, spec.scale, *sinks).reshape(x.shape[0], -1)
            y = parts["o"](seen * parts["gate"](n).sigmoid() if spec.gate else seen)
            y = parts["post_norm"](y) if spec.post_norm else y
            return x + y if spec.residual else y

        return run

    def packed_bytes(self, spec: AttentionSpec, stored_bytes: int) -> int:
        return FLOAT_BYTES * spec.heads * spec.sinks


class ReferenceMLA(ReferenceImplementation):
    """Multi-head latent attention. Option `absorbed` (default true): attend over latents instead of expanded keys.

    The plain form needs to read the cache back, so it works with the reference cache only.
    """

    id = "reference.mla"
    spec_type = MLASpec
    options = frozenset({"absorbed"})

    def load(self, request: LoadRequest) -> Module:
        absorbed = bool(request.options.get("absorbed", True))
        if not absorbed and not hasattr(request.children["cache"], "gather"):
            raise BackendError(
                f"{request.name}: absorbed: false reads cached latents back, which this node's KV cache cannot do",
                "use reference.kv_cache for it, or leave absorbed at true",
            )
        return _LatentAttention(request, absorbed)

    def packed_bytes(self, spec: MLASpec, stored_bytes: int) -> int:
        return FLOAT_BYTES * spec.heads * (spec.nope_dim + spec.value_dim) * spec.latent


class _LatentAttention:
    def __init__(self, request: LoadRequest, absorbed: bool) -> None:
        spec = cast(MLASpec, request.spec)
        self.spec = spec
        self.parts = request.children
        self.k_up, self.v_up = up_projections(request)
        self.attend = self._absorbed if absorbed else self._plain

    def __call__(self, x: torch.Tensor, step: StepBatch) -> Any:
        spec, parts = self.spec, self.parts
        n = parts["norm"](x) if spec.norm else x
        low = parts["q_a_norm"](parts["q_a"](n)) if spec.q_a else n
        q = parts["q_b" if spec.q_a else "q"](low).view(-1, spec.heads, spec.nope_dim + spec.rope_dim)
        q_nope, q_rope = q.split((spec.nope_dim, spec.rope_dim), -1)
        latent, k_rope = parts["kv_a"](n).split((spec.latent, spec.rope_dim), -1)
        positions = positions_on(x.device, step)
        q_rope = parts["rope"](q_rope.contiguous(), positions)
        k_rope = parts["rope"](k_rope[:, None, :].contiguous(), positions)[:, 0]
        parts["cache"].append(step, parts["kv_a_norm"](latent.contiguous()), k_rope)
        y = parts["o"](self.attend(step, q_nope, q_rope).reshape(x.shape[0], -1))
        return x + y if spec.residual else y

    def _absorbed(self, step: StepBatch, q_nope: torch.Tensor, q_rope: torch.Tensor) -> torch.Tensor:
        q = torch.cat((absorb_query(q_nope, self.k_up), q_rope), -1)
        return expand_output(self.parts["cache"].attend(step, q, self.spec.scale), self.v_up)

    def _plain(self, step: StepBatch, q_nope: torch.Tensor, q_rope: torch.Tensor) -> torch.Tensor:
        q = torch.cat((q_nope, q_rope), -1)
        out = []
        for span, rows in self.parts["cache"].gather(step):
            latent, k_rope = rows.split((self.spec.latent, self.spec.rope_dim), -1)
            k_nope = torch.einsum("tl,hnl->thn", latent, self.k_up)
            v = torch.einsum("tl,hvl->thv", latent, self.v_up)
            k = torch.cat((k_nope, k_rope[:, None, :].expand(-1, self.spec.heads, -1)), -1)
            out.append(attend(q[span], k, v, self.spec.scale))
        return torch.cat(out)


def up_projections(request: LoadRequest) -> tuple[torch.Tensor, torch.Tensor]:
    """K [heads, nope, latent] and V [heads, value, latent] from either stored form."""
    spec = cast(MLASpec, request.spec)
    if spec.split_kv_b:
        return loaded(request, "k_b").transpose(1, 2).contiguous(), loaded(request, "v_b")
    return split_up_projection(loaded(request, "kv_b"), spec.heads, spec.nope_dim, spec.value_dim)


def positions_on(device: torch.device, step: StepBatch) -> Any:
    """The step's positions on a device, moved once a step."""
    return step.derived(f"positions@{device}", lambda s: s.positions.to(device))
