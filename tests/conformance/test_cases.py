"""Quick cases of the kit by themselves: a host passes those of copies and launches, and what they are to notice."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from ktcore.backend import LoadRequest, Unsupported
from ktcore.backend.host import HostRuntime
from ktcore.conformance import Status
from ktcore.conformance.case import Case
from ktcore.conformance.levels import all_cases, select
from ktcore.conformance.runner import run_case, run_cases
from ktcore.ops import LinearSpec, RMSNormSpec, Spec

from .plain import Plain, linear, norm, plain_target

CASES = all_cases()


def case(name: str) -> Case:
    (found,) = select(CASES, ids=[name])
    return found


@pytest.mark.parametrize(
    ("version", "fits"), [((2, 0), True), ((1, 0), False), ((3, 0), False), ((2, 1), False), ((1, 9), False)]
)
def test_the_plugin_api_must_be_this_one(version: tuple[int, int], fits: bool) -> None:
    target = plain_target()
    record = target.registry.known(target.name)
    assert record.spec is not None
    record.spec = replace(record.spec, api_version=version)
    assert (run_case(target, case("L0.packaging.api-version")).status is Status.PASS) is fits


def test_a_host_passes_what_is_about_copies_launches_and_streams(one_thread: None) -> None:
    chosen = [c for c in CASES if c.level == 1 and c.operator != "memory"]
    results = run_cases(plain_target(), chosen)
    assert [(r.id, r.reason) for r in results if r.status not in (Status.PASS, Status.NOT_APPLICABLE)] == []
    assert sum(r.status is Status.PASS for r in results) > len(results) // 2


def test_pinned_buffers_that_are_one_are_noticed() -> None:
    class Sharing(HostRuntime):
        held = torch.empty(33, 5, dtype=torch.float16)

        def pinned_buffer(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
            return self.held

    result = run_case(plain_target(None, Sharing), case("L1.copy.pinned-buffers-are-apart"))
    assert (result.status, result.reason) == (Status.FAIL, "two buffers share memory")


@pytest.mark.parametrize(
    ("operator", "spec_type", "make"), [("linear", LinearSpec, linear), ("rms_norm", RMSNormSpec, norm)]
)
def test_a_module_that_keeps_to_its_first_weights_is_noticed(
    operator: str, spec_type: type[Spec], make: Callable[[LoadRequest], Any], one_thread: None
) -> None:
    first: list[Any] = []

    def once(request: LoadRequest) -> Any:
        first.append(make(request))
        return first[0]

    result = run_case(plain_target({spec_type: once}), case(f"L2.{operator}.two-modules"))
    assert (result.status, result.reason) == (Status.FAIL, f"plain.{operator}: different weights gave the same result")


def test_figures_are_asked_of_what_an_implementation_takes_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def packed_bytes(self: Plain, spec: Spec, size: int) -> int:
        asked.append((self.spec_type, type(spec), spec.formats()))
        return size

    supports = Plain.supports
    refused = Unsupported("no blocks")
    monkeypatch.setattr(Plain, "packed_bytes", packed_bytes)
    monkeypatch.setattr(
        Plain,
        "supports",
        lambda self, spec, device: refused if "Q4_K" in spec.formats() else supports(self, spec, device),
    )
    assert run_case(plain_target(), case("L0.implementations.memory-figures")).status is Status.PASS
    assert {kind for kind, *_ in asked} >= {LinearSpec, RMSNormSpec}
    assert all(own is kind and "Q4_K" not in formats for own, kind, formats in asked)
