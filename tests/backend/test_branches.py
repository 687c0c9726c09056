"""Branches composed of parts: their order, against formulas written out, and latent attention in all of its forms."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ktcore.backend.branches import AbsorbedLatents, attention_branch, mla_branch, mlp_branch, moe_branch
from ktcore.backend.reference import reference_implementations
from ktcore.backend.reference.cache import PagedCache
from ktcore.ops import (
    AttentionSpec,
    ExpertsSpec,
    KVCacheSpec,
    LinearSpec,
    MLASpec,
    MLPSpec,
    MoESpec,
    RMSNormSpec,
    RopeSpec,
    RouterSpec,
    StepBatch,
    Temperature,
)

HIDDEN, TOKENS, HEADS = 8, 3, 2
SQUARE, NORM = LinearSpec(HIDDEN, HIDDEN, "F32"), RMSNormSpec(HIDDEN, 1e-6)
GRAIN = torch.Generator().manual_seed(5)
X = torch.randn(TOKENS, HIDDEN, generator=GRAIN)
RUNTIME = SimpleNamespace(device=torch.device("cpu"))
REFERENCES = {i.id: i for i in reference_implementations()}


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=GRAIN)


def asked(spec: Any, children: dict[str, Any], weights: dict[str, torch.Tensor] | None = None, **options: Any) -> Any:
    held = {role: SimpleNamespace(tensor=lambda value=value: value) for role, value in (weights or {}).items()}
    return SimpleNamespace(
        name="layers.0", spec=spec, children=children, weights=held, runtime=RUNTIME, options=options
    )


def one_step(tokens: int = TOKENS, cached: int = 0) -> StepBatch:
    return StepBatch(
        torch.zeros(tokens, dtype=torch.int64),
        torch.arange(cached, cached + tokens),
        (0, tokens),
        (cached + tokens,),
        torch.tensor([[1, 0]], dtype=torch.int32),
        4,
    )


class Cache:
    """Takes keys and values, and gives a mix of them and the queries back."""

    def __init__(self) -> None:
        self.held: tuple[torch.Tensor, torch.Tensor] | None = None
        self.more: list[Any] = []

    def append(self, step: StepBatch, k: torch.Tensor, v: torch.Tensor) -> None:
        self.held = k, v

    def attend(self, step: StepBatch, q: torch.Tensor, scale: float, *more: Any) -> torch.Tensor:
        assert self.held is not None, "keys are stored before they are looked at"
        self.more = list(more)
        k, v = self.held
        return q * scale + 3 * k + 5 * v


ATTENTION = AttentionSpec(
    HIDDEN, HEADS, HEADS, 4, 0.25, SQUARE, SQUARE, SQUARE, SQUARE, KVCacheSpec("gqa", HEADS, HEADS, 4, 4)
)


class TestAttention:
    def parts(self) -> dict[str, Any]:
        return {
            "norm": lambda x: x + 1, "q": lambda x: x * 2, "k": lambda x: x * 3, "v": lambda x: x * 5,
            "q_norm": lambda x: x - 7, "k_norm": lambda x: x - 11, "gate": lambda x: x * 13,
            "rope": lambda x, at: x * (1 + at)[:, None, None], "o": lambda x: x * 17, "post_norm": lambda x: x + 19,
            "cache": Cache(),
        }  # fmt: skip

    def test_a_bare_branch_is_projections_and_the_cache(self) -> None:
        out = attention_branch(asked(replace(ATTENTION, residual=False), self.parts()))(X, one_step())
        torch.testing.assert_close(out, 17 * (2 * X * 0.25 + 9 * X + 25 * X))

    @pytest.mark.parametrize("after", [False, True])
    def test_norms_of_queries_and_keys_come_before_the_rotation_or_after_it(self, after: bool) -> None:
        rope = RopeSpec(4, 1e4, "half")
        spec = replace(ATTENTION, q_norm=NORM, k_norm=NORM, rope=rope, norm_after_rope=after, residual=False)
        turned = torch.tensor([1.0, 2.0, 3.0])[:, None]
        q = 2 * X * turned - 7 if after else (2 * X - 7) * turned
        k = 3 * X * turned - 11 if after else (3 * X - 11) * turned
        out = attention_branch(asked(spec, self.parts()))(X, one_step())
        torch.testing.assert_close(out, 17 * (0.25 * q + 3 * k + 25 * X))

    def test_gate_norms_and_residual_are_where_the_spec_says(self) -> None:
        spec = replace(ATTENTION, norm=NORM, gate=SQUARE, post_norm=NORM)
        n = X + 1
        seen = (0.5 + 9 + 25) * n
        out = attention_branch(asked(spec, self.parts()))(X, one_step())
        torch.testing.assert_close(out, X + 17 * seen * torch.sigmoid(13 * n) + 19)

    def test_queries_grow_by_their_temperature_and_sinks_are_handed_on(self) -> None:
        parts, sinks = self.parts(), torch.ones(HEADS)
        spec = replace(ATTENTION, temperature=Temperature(0.5, 2.0), residual=False)
        grown = torch.log1p(torch.tensor([0.0, 1.0, 1.0]))[:, None] * 0.5 + 1  # positions 0, 1, 2 in steps of two
        out = attention_branch(asked(spec, parts), sinks)(X, one_step())
        torch.testing.assert_close(out, 17 * (0.5 * X * grown + 34 * X))
        assert parts["cache"].more == [sinks]

    @pytest.mark.parametrize("sinks", [False, True])
    def test_the_reference_loads_sinks_where_there_are_some(self, sinks: bool) -> None:
        parts, weight = self.parts(), torch.ones(HEADS)
        request = asked(replace(ATTENTION, sinks=sinks), parts, {"sinks": weight} if sinks else {})
        REFERENCES["reference.attention"].load(request)(X, one_step())
        assert [torch.equal(s, weight) for s in parts["cache"].more] == [True] * sinks


def test_a_gated_mlp_with_and_without_norms() -> None:
    parts = {
        "norm": lambda x: x + 1, "gate": lambda x: x * 2, "up": lambda x: x * 3, "down": lambda x: x * 5,
        "post_norm": lambda x: x + 7,
    }  # fmt: skip
    spec = MLPSpec(HIDDEN, HIDDEN, "silu", SQUARE, SQUARE, SQUARE)
    bare = 5 * torch.nn.functional.silu(2 * X) * 3 * X
    torch.testing.assert_close(mlp_branch(asked(replace(spec, residual=False), parts))(X), bare)
    n = X + 1
    whole = X + 5 * torch.nn.functional.silu(2 * n) * 3 * n + 7
    normed = replace(spec, norm=NORM, post_norm=NORM, residual=True)
    torch.testing.assert_close(mlp_branch(asked(normed, parts))(X), whole)
    torch.testing.assert_close(REFERENCES["reference.mlp"].load(asked(normed, parts))(X), whole)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("early", [False, True])
def test_a_mixture_of_experts_adds_what_all_experts_share(shared: bool, gated: bool, early: bool) -> None:
    ids, weights = torch.zeros(TOKENS, 1, dtype=torch.int64), torch.ones(TOKENS, 1)
    routed: list[torch.Tensor] = []
    parts = {
        "norm": lambda x: x + 1,
        "router": lambda x: (routed.append(x), (ids, weights))[1],
        "experts": lambda x, got, w: x * 2 + got + w,
        "shared": lambda x: x * 3,
        "shared_gate": lambda x: x[:, :1] * 5,
    }
    spec = MoESpec(
        HIDDEN,
        RouterSpec(HIDDEN, 4, 1, "F32"),
        ExpertsSpec(HIDDEN, HIDDEN, 4, 1, "silu", "F32", "F32", "F32"),
        shared=MLPSpec(HIDDEN, HIDDEN, "silu", SQUARE, SQUARE, SQUARE, residual=False) if shared else None,
        shared_gate=LinearSpec(HIDDEN, 1, "F32") if gated else None,
        norm=NORM,
        early_router=early,
    )
    n, before = X + 1, X * 7
    part = 3 * n * (torch.sigmoid(5 * n[:, :1]) if gated else 1) if shared else 0
    out = moe_branch(asked(spec, parts))(X, before) if early else moe_branch(asked(spec, parts))(X)
    torch.testing.assert_close(out, X + 2 * n + 1 + part)
    torch.testing.assert_close(routed[0], before if early else n)
    bare = moe_branch(asked(replace(spec, residual=False), parts))(X, before)
    torch.testing.assert_close(bare, 2 * n + 1 + part)


NOPE, ROPE, VALUE, LATENT = 4, 2, 3, 5
Q, KV_A, OUT = random(HEADS * (NOPE + ROPE), HIDDEN), random(LATENT + ROPE, HIDDEN), random(HIDDEN, HEADS * VALUE)
KV_B = random(HEADS, NOPE + VALUE, LATENT)
STORED = {
    False: {"kv_b": KV_B.reshape(-1, LATENT)},
    True: {"k_b": KV_B[:, :NOPE].transpose(1, 2).contiguous(), "v_b": KV_B[:, NOPE:].contiguous()},
}


class TestLatentAttention:
    def spec(self, split: bool) -> MLASpec:
        cache = KVCacheSpec("mla", HEADS, 1, LATENT + ROPE, LATENT)
        rope = RopeSpec(ROPE, 1e4, "half")
        return MLASpec(
            HIDDEN, HEADS, NOPE, ROPE, VALUE, LATENT, 0.3, LinearSpec(HIDDEN, LATENT + ROPE, "F32"),
            RMSNormSpec(LATENT, 1e-6), LinearSpec(HEADS * VALUE, HIDDEN, "F32"), cache, "F32", rope=rope,
            split_kv_b=split, q=LinearSpec(HIDDEN, HEADS * (NOPE + ROPE), "F32"), norm=NORM,
        )  # fmt: skip

    def parts(self) -> dict[str, Any]:
        cache = PagedCache("cache", self.spec(False).cache, torch.device("cpu"))
        cache.allocate_pages(2, 4)
        return {
            "norm": lambda x: x + 1, "q": lambda x: x @ Q.T, "kv_a": lambda x: x @ KV_A.T, "o": lambda x: x @ OUT.T,
            "kv_a_norm": lambda x: x * 2, "rope": lambda x, at: x * (1 + at)[:, None, None], "cache": cache,
        }  # fmt: skip

    def expected(self, x: torch.Tensor) -> torch.Tensor:
        """The plain form in float64: keys and values of every head, softmax over what came before."""
        d = x.double()
        n, at = d + 1, 1 + torch.arange(len(x)).double()
        q = (n @ Q.double().T).view(-1, HEADS, NOPE + ROPE)
        latent, k_rope = (n @ KV_A.double().T).split((LATENT, ROPE), -1)
        up = torch.einsum("tl,hnl->thn", 2 * latent, KV_B.double())
        k = torch.cat((up[..., :NOPE], (k_rope * at[:, None])[:, None].expand(-1, HEADS, -1)), -1)
        q = torch.cat((q[..., :NOPE], q[..., NOPE:] * at[:, None, None]), -1)
        score = torch.einsum("thd,shd->hts", q, k) * 0.3
        score = score.masked_fill(torch.ones(len(x), len(x)).triu(1).bool(), -torch.inf)
        seen = torch.einsum("hts,shv->thv", score.softmax(-1), up[..., NOPE:])
        return (d + seen.flatten(1) @ OUT.double().T).float()

    @pytest.mark.parametrize("split", [False, True])
    @pytest.mark.parametrize("form", ["absorbed", "plain", "backend's"])
    def test_every_form_is_the_plain_one(self, form: str, split: bool) -> None:
        x = random(6, HIDDEN)
        if form == "backend's":
            request = asked(self.spec(split), self.parts(), STORED[split])
            branch = mla_branch(request, AbsorbedLatents(request, torch.float32))
        else:
            request = asked(self.spec(split), self.parts(), STORED[split], absorbed=form == "absorbed")
            branch = REFERENCES["reference.mla"].load(request)
        out = torch.cat((branch(x[:5], one_step(5)), branch(x[5:], one_step(1, 5))))
        torch.testing.assert_close(out, self.expected(x), rtol=1e-4, atol=1e-4)
