"""Fields of a spec that an implementation does not name in `handles` are refused by name, whatever `supports` says."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest

from ktcore.backend import Backend, BackendSpec, BackendState, Capabilities, Implementation, Probe, Registry, Supported
from ktcore.backend.discovery import Found, compatible
from ktcore.backend.handles import answer, known_names, unhandled
from ktcore.backend.record import BackendRecord
from ktcore.backend.reference import reference_implementations
from ktcore.backend.spec import API_VERSION
from ktcore.ops import (
    AttentionSpec,
    KVCacheSpec,
    LinearSpec,
    MLPSpec,
    RMSNormSpec,
    RopeScaling,
    RopeSpec,
    Spec,
    Temperature,
)

DEVICE = Capabilities("old", "card")
SQUARE = LinearSpec(16, 16, "F32")
ATTENTION = AttentionSpec(
    16, 1, 1, 16, 0.25, SQUARE, SQUARE, SQUARE, SQUARE, KVCacheSpec("gqa", 1, 1, 16, 16), rope=RopeSpec(16, 1e4, "half")
)


class Trusting(Implementation):
    """Takes whatever it is asked."""

    def __init__(self, spec_type: type[Spec], handles: set[str], fused: bool = False, name: str = "old.op") -> None:
        self.id, self.spec_type, self.fused, self.handles = name, spec_type, fused, frozenset(handles)

    def supports(self, spec: Any, device: Capabilities) -> Supported:
        return Supported()

    def load(self, request: Any) -> Any:
        raise AssertionError


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sinks": True}, "sinks=True"),
        ({"temperature": Temperature(0.1, 64)}, "temperature=Temperature"),
        ({"post_norm": RMSNormSpec(16, 1e-5)}, "post_norm=RMSNormSpec"),
        ({"residual": False}, "residual=False"),
    ],
)
def test_a_field_in_use_that_is_not_named_is_the_reason(changes: dict[str, Any], words: str) -> None:
    blind = Trusting(AttentionSpec, {"rope"})
    assert isinstance(answer(blind, ATTENTION, DEVICE), Supported)
    refused = answer(blind, replace(ATTENTION, **changes), DEVICE)
    assert not isinstance(refused, Supported)
    assert refused.reason == f"it does not handle {words}"


def test_parts_answer_for_themselves_unless_they_are_fused() -> None:
    windowed = replace(ATTENTION, cache=replace(ATTENTION.cache, window=8), q=replace(SQUARE, bias=True))
    assert unhandled(Trusting(AttentionSpec, {"rope"}), windowed) == []
    fused = Trusting(AttentionSpec, {"rope"}, fused=True)
    assert unhandled(fused, windowed) == ["q.bias=True", "cache.window=8"]
    assert unhandled(Trusting(AttentionSpec, {"rope", "q.bias", "cache.window"}, fused=True), windowed) == []


def test_values_inside_of_a_plain_value_count_too() -> None:
    spec = RopeSpec(16, 1e4, "half", RopeScaling("yarn", 8.0, 4096, truncate=False))
    blind = Trusting(RopeSpec, {"scaling"})
    assert unhandled(blind, spec) == ["scaling.original_context=4096", "scaling.truncate=False"]


def test_a_field_that_ktcore_adds_is_refused_by_name_to_all_who_never_heard_of_it() -> None:
    @dataclass(frozen=True)
    class Later(RMSNormSpec):
        op: ClassVar[str] = "rms_norm"
        twist: float = 0.0

    every = Trusting(RMSNormSpec, set(known_names(RMSNormSpec, False)))
    assert unhandled(every, Later(16, 1e-5, offset=1.0)) == []
    assert unhandled(every, Later(16, 1e-5, twist=0.5)) == ["twist=0.5"]


@pytest.mark.parametrize("reference", reference_implementations(), ids=lambda i: i.id)
def test_references_handle_every_field(reference: Implementation) -> None:
    assert reference.handles == known_names(reference.spec_type, reference.fused)


def test_names_of_a_fused_branch_reach_down_to_its_parts() -> None:
    assert {"norm", "norm.offset", "gate.bias", "residual"} <= known_names(MLPSpec, True)
    assert known_names(MLPSpec, False) >= {"norm", "residual", "post_norm", "clamped", "clamped.after"}


class Old(Backend):
    def implementations(self) -> list[Implementation]:
        return [Trusting(LinearSpec, {"bias"}, name="old.linear")]

    def runtime(self, index: int = 0, threads: int | None = None) -> Any:
        raise AssertionError


def _registry(version: tuple[int, int]) -> Registry:
    spec = BackendSpec("old", version, "x", f"{__name__}:Old", lambda: Probe(True, "here", 1), (DEVICE,))
    return Registry([Found((BackendRecord("old", "old 1", spec),))])


@pytest.mark.parametrize(("version", "handled"), [(API_VERSION, {"bias"}), ((1, 0), set())])
def test_a_plugin_of_the_older_api_is_trusted_with_no_field(version: tuple[int, int], handled: set[str]) -> None:
    registry = _registry(version)
    assert registry.implementations()["old.linear"].handles == handled
    record = registry.known("old")
    assert record.state is BackendState.LOADED
    assert ("older plugin API" in record.reason) is (version != API_VERSION)


@pytest.mark.parametrize(
    ("version", "fits"), [((0, 9), False), ((1, 0), True), (API_VERSION, True), ((2, 1), False), ((3, 0), False)]
)
def test_versions_that_are_taken_in(version: tuple[int, int], fits: bool) -> None:
    assert compatible(version) is fits
