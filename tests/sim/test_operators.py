"""Torch operators on the device: those that run on its stream, those that it hands to the host, and their counts."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from ktcore_sim import _C
from ktcore_sim.runtime import SimRuntime

from .conftest import Gate, Open

G = torch.Generator().manual_seed(3)
X, Y = torch.randn(6, 8, generator=G), torch.randn(6, 8, generator=G)
P = torch.rand(6, 8, generator=G) + 0.5
IDS = torch.tensor([[0, 3], [5, 1]])
Tensors = dict[str, torch.Tensor]
OPERATORS: dict[str, Callable[[Tensors], torch.Tensor]] = {
    "add": lambda t: t["x"] + t["y"],
    "add number": lambda t: t["x"] + 2.5,
    "alpha": lambda t: torch.add(t["x"], t["y"], alpha=3),
    "integers by a float": lambda t: t["i"] * 0.5,
    "integers divided": lambda t: t["i"] / 2,
    "floor division": lambda t: t["i"] // 2,
    "remainder": lambda t: t["i"] % 3,
    "rsub": lambda t: 1.0 - t["x"],
    "rsub of integers": lambda t: 1.5 - t["i"],
    "power": lambda t: t["p"].pow(1.5),
    "half and float": lambda t: t["x"].half() * t["y"],
    "half and number": lambda t: t["x"].half() * 2,
    "broadcast": lambda t: t["x"][:, None, :] * t["y"][None],
    "compare": lambda t: (t["x"] > t["y"]) | (t["x"] < -1) & ~(t["y"] == 0),
    "where": lambda t: torch.where(t["x"] > 0, t["x"], t["y"].double()),
    "exp of integers": lambda t: t["i"].exp(),
    "unary": lambda t: t["p"].rsqrt() + t["x"].cos() * t["x"].sin() - t["x"].sigmoid() + t["p"].log().neg().abs(),
    "activations": lambda t: torch.nn.functional.silu(t["x"]) + torch.nn.functional.gelu(t["y"], approximate="tanh"),
    "mm": lambda t: t["x"] @ t["y"].T,
    "addmm": lambda t: torch.addmm(t["y"][0, :6], t["x"], t["y"].T),
    "bmm": lambda t: torch.einsum("thd,hde->the", t["x"].view(6, 2, 4), t["y"][:2, :].reshape(2, 4, 2)),
    "mv": lambda t: t["x"] @ t["y"][0],
    "softmax": lambda t: t["x"].softmax(-1),
    "reductions": lambda t: t["x"].sum(-1) + t["x"].mean(1) + t["x"].amax(-1) + t["x"].prod(-1),
    "full sum": lambda t: t["x"].sum() + t["x"].max(),
    "argmax": lambda t: t["x"].argmax(-1),
    "any": lambda t: (t["x"] > 1).any(-1) | (t["x"] > -9).all(-1),
    "cumsum": lambda t: t["x"].cumsum(-1),
    "topk": lambda t: t["x"].topk(3, -1).indices,
    "sort": lambda t: t["x"].sort(-1, descending=True).values,
    "stable rank": lambda t: t["x"].argsort(dim=-1, descending=True, stable=True).argsort(-1),
    "gather": lambda t: t["x"].gather(0, t["ids"]),
    "scatter": lambda t: torch.zeros_like(t["x"]).scatter_(0, t["ids"], 1.0),
    "index": lambda t: t["x"][t["ids"]],
    "index two": lambda t: t["x"][t["ids"][0], t["ids"][1]],
    "mask": lambda t: t["x"][t["x"] > 0],
    "nonzero": lambda t: torch.nonzero(t["x"] > 0),
    "index_add": lambda t: torch.zeros_like(t["x"]).index_add_(0, t["ids"][0], t["y"][:2]),
    "index_put": lambda t: t["x"].clone().index_put_((t["ids"][0],), t["y"][:2]),
    "masked_fill": lambda t: t["x"].masked_fill(t["x"] > 0, float("-inf")),
    "cat": lambda t: torch.cat((t["x"], t["y"][:, :3], t["x"].double()), -1),
    "stack": lambda t: torch.stack((t["x"], t["y"]), 1).flatten(-2),
    "arange": lambda t: torch.arange(3, 40, 4, device=t["x"].device) + t["i"][0, 0],
    "full": lambda t: torch.full((3,), 2.0, device=t["x"].device) + torch.zeros(3, device=t["x"].device),
    "repeat_interleave": lambda t: t["x"].repeat_interleave(2, 1),
    "views": lambda t: t["x"].view(2, 3, 8).transpose(0, 1)[1:, :, ::2].reshape(-1).unflatten(0, (2, -1)).squeeze(),
    "in place on a view": lambda t: t["x"].clone().view(-1)[3:9].mul_(2.0),
    "in place": lambda t: t["x"].clone().add_(t["y"]).div_(2).sub_(1).pow_(2).relu_(),
    "tril": lambda t: t["x"].tril() + t["x"].triu(1),
    "clamp": lambda t: t["x"].clamp(-0.5, 0.5),
    "bits": lambda t: (t["i"] >> 1) & 3,
    "casts": lambda t: t["x"].bfloat16().float().to(torch.int32),
    "nan": lambda t: t["x"].log().isnan(),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_the_result_is_that_of_the_cpu_and_nothing_falls_back(open_runtime: Open, name: str) -> None:
    runtime = open_runtime(seed=len(name), delay_us=100)
    host = {"x": X, "y": Y, "p": P, "i": torch.arange(12).view(3, 4), "ids": IDS}
    there = {key: value.to(runtime.device) for key, value in host.items()}
    expected, got = OPERATORS[name](host), OPERATORS[name](there)
    assert got.device == runtime.device
    assert (got.dtype, got.shape) == (expected.dtype, expected.shape)
    torch.testing.assert_close(got.cpu(), expected, rtol=0, atol=0 if got.dtype != torch.float32 else 1e-6)
    assert runtime.fallback_names() == {}


def test_other_operators_go_to_the_host_are_counted_by_name_and_wait(runtime: SimRuntime) -> None:
    x = torch.rand(3, 3, device=runtime.device)
    before, blocked = runtime.fallback_count(), runtime.counts().blocked
    torch.linalg.inv(x + torch.eye(3).to(runtime.device))
    torch.special.i0e(x)
    torch.special.i0e(x)
    names = runtime.fallback_names()
    assert names["aten::special_i0e.out"] == 2
    assert any("linalg_inv" in name for name in names)
    assert runtime.fallback_count() >= before + 3
    assert runtime.counts().blocked > blocked


def test_fallbacks_are_counted_for_their_own_device(open_runtime: Open) -> None:
    zero, one = open_runtime(0), open_runtime(1)
    torch.special.i0e(torch.ones(3, device=one.device))
    assert (zero.fallback_count(), one.fallback_count()) == (0, 1)


def test_every_listed_operator_exists() -> None:
    names = _C.native_operators()
    assert len(set(names)) == len(names) > 100
    assert not [name for name in names if not _exists(name)]


def _exists(name: str) -> bool:
    operator, _, overload = name.partition(".")
    try:
        torch._C._dispatch_find_schema_or_throw(f"aten::{operator}", overload)
    except RuntimeError:
        return False
    return True


def test_a_host_number_is_read_when_the_work_is_launched(runtime: SimRuntime) -> None:
    stream = runtime.new_stream()
    with runtime.use_stream(stream):
        x = torch.ones(3, device=runtime.device)
        number = torch.tensor(5.0)
        with Gate(runtime, stream):
            y = x * number
            number.fill_(7.0)
        assert y.cpu()[0] == 5.0


def test_pageable_memory_is_staged_and_pinned_memory_is_read_when_the_copy_runs(runtime: SimRuntime) -> None:
    stream = runtime.new_stream()
    pageable, pinned = torch.ones(4), runtime.pinned_buffer((4,), torch.float32).fill_(1.0)
    with runtime.use_stream(stream):
        with Gate(runtime, stream):
            a, b = pageable.to(runtime.device, non_blocking=True), pinned.to(runtime.device, non_blocking=True)
            pageable.fill_(2.0)
            pinned.fill_(2.0)
        assert (a.cpu()[0], b.cpu()[0]) == (1.0, 2.0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda r: (torch.empty(4), torch.empty(4, device=r.device)), "not pinned"),
        (lambda r: (r.pinned_buffer((4,), torch.float32), torch.empty(5, device=r.device)), "does not fit"),
        (lambda r: (r.pinned_buffer((4,), torch.float64), torch.empty(4, device=r.device)), "does not fit"),
        (lambda r: (r.pinned_buffer((4, 2), torch.float32), torch.empty(2, 4, device=r.device).T), "contiguous"),
        (lambda r: (torch.empty(4), torch.empty(4)), "neither tensor"),
    ],
)
def test_copies_that_a_device_cannot_do_alone_are_refused(
    runtime: SimRuntime, make: Callable[[SimRuntime], tuple[torch.Tensor, torch.Tensor]], message: str
) -> None:
    destination, source = make(runtime)
    with pytest.raises(RuntimeError, match=message):
        runtime.copy_async(destination, source, runtime.new_stream())


def test_copies_between_devices_are_ordered_on_both_sides(open_runtime: Open) -> None:
    for seed in range(20):
        zero, one = open_runtime(0, seed=seed, delay_us=300), open_runtime(1, seed=seed, delay_us=300)
        a, b = zero.new_stream(), one.new_stream()
        with zero.use_stream(a), one.use_stream(b):
            x = torch.zeros(4, device=zero.device)
            for _ in range(3):
                y = (x + 1).to(one.device, non_blocking=True) * 2
                x = y.to(zero.device, non_blocking=True)
            assert x.cpu()[0] == 14.0
