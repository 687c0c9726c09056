"""What a backend says of its implementations: ids, kinds, and `supports` as a pure and truthful authority."""

from __future__ import annotations

from ktcore.backend.handles import answer, known_names
from ktcore.backend.implementation import Supported, Unsupported
from ktcore.conformance.case import Case, Check, Context
from ktcore.conformance.levels.specs import attention, experts, linear, mla, mlp, moe, norm, router_v3
from ktcore.ops import EmbeddingSpec, KVCacheSpec, RopeSpec, SamplingSpec, Spec

NO_FORMAT = "NO_SUCH_FORMAT"


def cases() -> list[Case]:
    """All without a device."""
    return [
        _case("ids", "ids begin with the backend's name and name an operator's spec", _ids),
        _case("handles", "what it says to handle are fields of its operator's spec", _handles),
        _case("supports-is-pure", "supports answers every spec, twice the same, without a device", _pure),
        _case("supports-refuses-unknown-formats", "a format that does not exist is refused", _unknown),
        _case("memory-figures", "packed sizes and cache sizes are whole numbers of bytes", _figures),
    ]


def sample_specs(fmt: str) -> list[Spec]:
    """One spec of every operator."""
    return [
        EmbeddingSpec(64, 256, fmt),
        linear(256, 64, fmt),
        norm(256),
        RopeSpec(64, 1e4, "half"),
        attention(4, 2, 64, fmt),
        mla(4, fmt, latent=256),
        mlp(256, 256, fmt),
        router_v3(256, 16, 2, fmt="F32"),
        experts(8, 2, 256, 256, fmt),
        moe(256, 8, 2, 256, fmt),
        KVCacheSpec("gqa", 4, 2, 64, 64),
        KVCacheSpec("mla", 4, 1, 96, 64),
        SamplingSpec(64),
    ]


def _case(name: str, about: str, run: Check) -> Case:
    return Case(f"L0.implementations.{name}", 0, "implementations", about, run)


def _ids(ctx: Context) -> None:
    for item in ctx.target.implementations:
        ctx.require(item.id.startswith(f"{ctx.target.name}."), f"{item.id} is not of this backend")
        ctx.require(issubclass(item.spec_type, Spec), f"{item.id} implements {item.spec_type}, which is no spec")
        ctx.require(isinstance(item.options, frozenset), f"{item.id}: options are no frozenset")


def _handles(ctx: Context) -> None:
    for item in ctx.target.implementations:
        ctx.require(isinstance(item.handles, frozenset), f"{item.id}: handles is no frozenset")
        unknown = sorted(item.handles - known_names(item.spec_type, item.fused))
        ctx.require(not unknown, f"{item.id} handles {', '.join(unknown)}, which {item.spec_type.__name__} has not")


def _pure(ctx: Context) -> None:
    spec = ctx.target.registry.known(ctx.target.name).spec
    assert spec is not None
    for fmt in ("F32", "Q4_K"):
        for sample in sample_specs(fmt):
            for item in ctx.target.implementations:
                if item.spec_type is not type(sample):
                    continue
                answers = [answer(item, sample, spec.declared[0]) for _ in range(2)]
                good = all(isinstance(a, Supported | Unsupported) for a in answers)
                ctx.require(good, f"{item.id}: supports gave a {type(answers[0]).__name__}")
                ctx.require(answers[0] == answers[1], f"{item.id}: supports gives two answers to one question")
                refusal = answers[0]
                if isinstance(refusal, Unsupported):
                    ctx.require(bool(refusal.reason), f"{item.id}: refuses {sample.op} without a reason")


def _unknown(ctx: Context) -> None:
    spec = ctx.target.registry.known(ctx.target.name).spec
    assert spec is not None
    for sample in sample_specs(NO_FORMAT):
        for item in ctx.target.implementations:
            if item.spec_type is type(sample) and NO_FORMAT in sample.formats():
                said = answer(item, sample, spec.declared[0])
                ctx.require(isinstance(said, Unsupported), f"{item.id} claims to take a format that does not exist")


def _figures(ctx: Context) -> None:
    spec = ctx.target.registry.known(ctx.target.name).spec
    assert spec is not None
    for sample in (*sample_specs("F32"), *sample_specs("Q4_K")):
        for item in ctx.target.implementations:
            # plans ask for the figures of what is taken only
            if item.spec_type is type(sample) and isinstance(answer(item, sample, spec.declared[0]), Supported):
                sizes = [
                    item.packed_bytes(sample, 1 << 20),
                    item.cache_bytes_per_token(sample),
                    *item.page_sizes(sample),
                ]
                ctx.require(all(isinstance(n, int) and n >= 0 for n in sizes), f"{item.id}: figures {sizes}")
