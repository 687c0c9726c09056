"""A registry with a made-up host and accelerator, and a way to plan with rules written in a test."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest

from ktcore.backend import (
    API_VERSION,
    Backend,
    BackendSpec,
    Capabilities,
    Implementation,
    Probe,
    Registry,
    Supported,
    Unsupported,
)
from ktcore.backend.discovery import Found
from ktcore.backend.handles import known_names
from ktcore.backend.record import BackendRecord
from ktcore.graph.node import Graph
from ktcore.ops import AttentionSpec, ExpertsSpec, LinearSpec, MLPSpec, MoESpec
from ktcore.rules.load import read_rule_set
from ktcore.rules.plan import Plan
from ktcore.rules.resolve import resolve

GIB = 1 << 30


class Fake(Implementation):
    def __init__(
        self,
        name: str,
        spec_type: type,
        fused: bool = False,
        pages: Sequence[int] = (),
        options: Sequence[str] = (),
    ) -> None:
        self.id, self.spec_type, self.fused = name, spec_type, fused
        self.pages, self.options = tuple(pages), frozenset(options)
        self.handles = known_names(spec_type, fused)

    def supports(self, spec: Any, device: Capabilities) -> Supported | Unsupported:
        bad = [f for f in spec.formats() if f not in ("Q8_0", "F32")]
        return Unsupported(f"no kernel for {bad[0]}") if bad else Supported()

    def load(self, request: Any) -> Any:
        raise AssertionError("planning must not load")

    def packed_bytes(self, spec: Any, stored_bytes: int) -> int:
        return 2 * stored_bytes

    def page_sizes(self, spec: Any) -> tuple[int, ...]:
        return self.pages

    def cache_bytes_per_token(self, spec: Any) -> int:
        return 100 if self.pages else 0


class FakeBackend(Backend):
    def __init__(self, items: Sequence[Implementation]) -> None:
        self.items = items

    def implementations(self) -> Sequence[Implementation]:
        return self.items

    def runtime(self, index: int = 0, threads: int | None = None) -> Any:
        raise AssertionError("planning must not open a device")


HOST = FakeBackend(
    [
        Fake("host1.linear", LinearSpec, options=["activations"]),
        Fake("host1.attention", AttentionSpec, fused=True, pages=(64, 128)),
        Fake("host1.mlp", MLPSpec, fused=True),
        Fake("host1.moe", MoESpec, fused=True),
        Fake("host1.experts", ExpertsSpec),
    ]
)
ACCEL = FakeBackend(
    [
        Fake("accel.linear", LinearSpec),
        Fake("accel.attention", AttentionSpec, fused=True, pages=(256, 128)),
        Fake("accel.experts", ExpertsSpec),
    ]
)


def host_entry() -> Backend:
    return HOST


def accel_entry() -> Backend:
    return ACCEL


def _found(name: str, entry: str, accelerator: bool) -> Found:
    caps = Capabilities(name, f"a declared {name}", None, frozenset({"bf16", "fp8:e4m3fn"} if accelerator else {"f32"}))
    spec = BackendSpec(
        name=name,
        api_version=API_VERSION,
        requirements=f"a {name}",
        entry=f"{__name__}:{entry}",
        probe=lambda: Probe(not accelerator, "not plugged in" if accelerator else "here", 0 if accelerator else 1),
        declared=(caps,),
        accelerator=accelerator,
    )
    return Found((BackendRecord(name, f"{name}-package 1.0", spec),))


@pytest.fixture
def registry() -> Registry:
    """`host1` is available, `accel` is not; both have implementations."""
    found = [_found("host1", "host_entry", False), _found("accel", "accel_entry", True)]
    made = Registry(found)
    made._objects = {"host1": HOST, "accel": ACCEL}
    return made


Planner = Callable[..., Plan]


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, str], Path]:
    """Write a rule file; its text may be indented."""

    def write_file(text: str, name: str = "rules.yaml") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(dedent(text).lstrip())
        return path

    return write_file


@pytest.fixture
def plan(registry: Registry, write: Callable[..., Path]) -> Planner:
    """Plan a graph with rule texts, the first tried first."""

    def run(graph: Graph, *texts: str, backend: str = "host1", **limits: Any) -> Plan:
        heads = [write(text, f"rules{i}.yaml") for i, text in enumerate(texts)]
        return resolve(graph, read_rule_set(heads), registry, backend, **limits)

    return run


REST = """
version: 1
rules:
  - {name: embedding, match: {op: embedding}, use: reference.embedding}
  - {name: attention, match: {op: attention}, use: reference.attention}
  - {name: mlp, match: {op: mlp}, use: reference.mlp}
  - {name: linear, match: {op: linear}, use: reference.linear}
  - {name: norm, match: {op: rms_norm}, use: reference.rms_norm}
  - {name: rope, match: {op: rope}, use: reference.rope}
  - {name: cache, match: {op: kv_cache}, use: reference.kv_cache}
  - {name: sampling, match: {op: sampling}, use: reference.sampling}
"""
"""References for every operator of the llama graph; tests put rules of their own before it."""


@pytest.fixture
def rest() -> str:
    return REST
