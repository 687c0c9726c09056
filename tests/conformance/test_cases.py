"""Quick cases of the kit by themselves: a host passes those of copies and launches, and what they are to notice."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ktcore.backend.host import HostRuntime
from ktcore.conformance import Status
from ktcore.conformance.case import Case
from ktcore.conformance.levels import all_cases, select
from ktcore.conformance.runner import run_case, run_cases

from .plain import plain_target

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
