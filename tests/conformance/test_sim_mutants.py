"""The simulated accelerator passes the cases of devices, and each broken variant of it fails the case that names it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from ktcore.backend import Implementation, LoadRequest
from ktcore.conformance.case import Case
from ktcore.conformance.levels import all_cases
from ktcore.conformance.runner import run_case, run_cases
from ktcore.conformance.status import Status
from ktcore.ops import AttentionSpec

from .sim import sim_target
from .sim_mutants import SIM_MUTANTS, SimMutant


@pytest.fixture(scope="module")
def cases() -> dict[str, Case]:
    return {case.id: case for case in all_cases()}


@pytest.fixture
def clean_afterwards() -> Iterator[None]:
    """What a mutant writes late to memory that was given back must not be blamed on whoever gets that memory next."""
    yield
    from ktcore_sim.native import load_native

    native = load_native()
    for index in range(native.device_count()):
        with contextlib.suppress(RuntimeError):
            native.synchronize(index)
        native.poison_again(index)


@pytest.mark.usefixtures("clean_afterwards")
@pytest.mark.parametrize("mutant", SIM_MUTANTS, ids=lambda m: m.name.replace(" ", "-"))
def test_the_mutant_is_caught(mutant: SimMutant, cases: dict[str, Case], one_thread: None) -> None:
    target = sim_target(mutant.runtime, dict(mutant.changes))
    result = run_case(target, cases[mutant.case])
    print(result.status, result.reason)
    assert result.status is Status.FAIL
    assert "NotImplementedError" not in result.reason
    with contextlib.suppress(RuntimeError):
        target.close()


@pytest.mark.parametrize("seed", range(5))
def test_the_device_itself_passes_them_at_every_seed_of_delays(
    seed: int, cases: dict[str, Case], one_thread: None
) -> None:
    target = sim_target(seed=seed)
    wanted = sorted({m.case for m in SIM_MUTANTS})
    assert [
        (r.id, r.status, r.reason) for r in run_cases(target, [cases[i] for i in wanted]) if r.status is not Status.PASS
    ] == []
    target.close()


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32])
def test_a_strided_result_comes_back_whole(dtype: torch.dtype, one_thread: None) -> None:
    """Its dense copy is work of the same stream, and its memory lives until that work is done."""
    target = sim_target()
    runtime = target.runtime
    with runtime.use_stream(target.stream):
        made = torch.arange(24, dtype=dtype, device=runtime.device).view(4, 6)
    assert target.get(made[:, :2]).tolist() == [[0, 1], [6, 7], [12, 13], [18, 19]]
    target.close()


def test_pages_are_filled_before_the_first_keys_come(cases: dict[str, Case], one_thread: None) -> None:
    """The reference's cache zeroes its pages: on the stream of the keys, however busy the default one is."""

    def load(right: Implementation, request: LoadRequest) -> Any:
        from ktcore_sim.runtime import SimStream

        request.runtime.launch_python(SimStream(0, 0), lambda: time.sleep(0.3), (), "busy")
        return right.load(request)

    target = sim_target(changes={AttentionSpec: load}, delay_us=0.0)
    result = run_case(target, cases["L3.attention.chunk"])
    target.close()
    assert result.status is Status.PASS_FALLBACK, result.reason
    assert "kv_cache" in result.reason
