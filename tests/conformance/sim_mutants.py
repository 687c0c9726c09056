"""Broken variants of the simulated accelerator: what only a device with its own memory and streams can get wrong."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ktcore.backend import Implementation, LoadRequest
from ktcore.backend.reference import reference_implementations
from ktcore.ops import ExpertsSpec, KVCacheSpec, LinearSpec, RouterSpec, Spec
from ktcore.weights import dequantize

from .sim import Change

C_FUNCTION = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


@dataclass(frozen=True)
class SimMutant:
    """`runtime` makes a broken class of the right one; `changes` break what is loaded."""

    name: str
    case: str
    runtime: Callable[[type], type] = lambda right: right
    changes: Mapping[type[Spec], Change] = field(default_factory=dict)


def broken(**methods: Callable[..., Any]) -> Callable[[type], type]:
    """A runtime with other methods; each gets the right class as its first argument."""

    def change(right: type) -> type:
        return type("Broken", (right,), {name: bound(method, right) for name, method in methods.items()})

    return change


def bound(method: Callable[..., Any], right: type) -> Callable[..., Any]:
    """The method with the right class as its first argument."""
    return lambda self, *arguments: method(right, self, *arguments)


def no_wait(right: Any, self: Any, stream: Any, event: Any) -> None:
    """The stream goes on."""


def call_now(right: Any, self: Any, stream: Any, function: int, data: int) -> None:
    C_FUNCTION(function)(data)


def call_aside(right: Any, self: Any, stream: Any, function: int, data: int) -> None:
    """On a thread of its own, in stream order; the stream does not wait for its end."""
    call, pool = C_FUNCTION(function), self.__dict__.setdefault("_pool", ThreadPoolExecutor(2))
    wrapped = C_FUNCTION(lambda _: pool.submit(call, data) and None)
    self.__dict__.setdefault("_alive", []).append(wrapped)
    right.launch_host(self, stream, ctypes.cast(wrapped, ctypes.c_void_p).value, 0)


def first_function_only(right: Any, self: Any, stream: Any, function: int, data: int) -> None:
    """Starts the experts, and never waits for them."""
    if self.__dict__.setdefault("_first", function) == function:
        right.launch_host(self, stream, function, data)


def own_stream(right: Any, self: Any, destination: torch.Tensor, source: torch.Tensor, stream: Any) -> None:
    """Every copy on a stream that nobody orders."""
    if "_aside" not in self.__dict__:
        self._aside = right.new_stream(self)
    right.copy_async(self, destination, source, self._aside)


def done_at_once(right: Any, self: Any, event: Any) -> bool:
    return True


def quiet(right: Any, self: Any, what: Any = None) -> None:
    try:
        right.synchronize(self, what)
    except RuntimeError:
        return


def no_synchronize(right: Any, self: Any, what: Any = None) -> None:
    """Does not wait for streams."""
    if what is None:
        right.synchronize(self)


def same_stream(right: Any, self: Any, stream: Any) -> Any:
    """torch's work stays on the default stream."""
    return nullcontext()


def run_and_capture(right: Any, self: Any, stream: Any, work: Callable[[], None]) -> Any:
    with self.use_stream(stream):
        work()
    return right.capture(self, stream, work)


def all_is_free(right: Any, self: Any) -> Any:
    info = right.memory(self)
    return type(info)(info.total, info.total)


def shared_pinned(right: Any, self: Any, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    kept: dict[Any, torch.Tensor] = self.__dict__.setdefault("_kept", {})
    if (shape, dtype) not in kept:
        kept[shape, dtype] = right.pinned_buffer(self, shape, dtype)
    return kept[shape, dtype]


def on_the_host(implementation: Implementation, request: LoadRequest) -> Any:
    """Copies to the host, computes there, and copies back."""
    device, w = request.runtime.device, request.weights["weight"].tensor()
    return lambda x: torch.nn.functional.linear(x.cpu(), w).to(device)


def by_reference(implementation: Implementation, request: LoadRequest) -> Any:
    return next(i for i in reference_implementations() if i.spec_type is type(request.spec)).load(request)


def leaking(implementation: Implementation, request: LoadRequest) -> Any:
    run, kept = implementation.load(request), []

    def call(x: torch.Tensor) -> Any:
        kept.append(torch.empty(1 << 18, device=x.device))
        return run(x)

    return call


def one_buffer(implementation: Implementation, request: LoadRequest) -> Any:
    run, kept = implementation.load(request), {}

    def call(x: torch.Tensor) -> Any:
        out = run(x)
        return kept.setdefault(tuple(out.shape), torch.empty_like(out)).copy_(out)

    return call


def without_last(implementation: Implementation, request: LoadRequest) -> Any:
    run, last = implementation.load(request), request.spec.experts - 1  # type: ignore[attr-defined]

    def call(x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> Any:
        return run(x, ids, weights * (ids != last).float())

    return call


class InPlace:
    """A weight whose columns stay as they are stored."""

    def __init__(self, stored: Any) -> None:
        self._stored, self.shape = stored, stored.shape

    def part(self, index: int) -> Any:
        return InPlace(self._stored.part(index))

    def tensor(self) -> torch.Tensor:
        return dequantize(self._stored.format, self._stored.raw().reshape(-1), self.shape)


def columns_as_stored(implementation: Implementation, request: LoadRequest) -> Any:
    held: Any = {role: InPlace(w) for role, w in request.weights.items()}
    return implementation.load(replace(request, weights=held))


def chosen_again(implementation: Implementation, request: LoadRequest) -> Any:
    """Of experts at -inf always the first."""
    run, bias = implementation.load(request), request.weights["bias"].tensor()
    hidden, first = bias.isinf().to(request.runtime.device), int(bias.argmin())

    def call(x: torch.Tensor) -> Any:
        ids, weights = run(x)
        return torch.where(hidden[ids], first, ids), weights

    return call


def all_rows_times_zero(implementation: Implementation, request: LoadRequest) -> Any:
    module = implementation.load(request)
    attend = module.attend
    module.attend = lambda *arguments: attend(*arguments) + 0.0 * module.page_tensors()[0].sum()
    return module


SIM_MUTANTS = [
    SimMutant("missing stream wait", "L1.stream.wait-event", broken(wait_event=no_wait)),
    SimMutant("missing stream wait before the hand-off", "L4.hand-off.sum", broken(launch_host=call_now)),
    SimMutant("missing stream wait after the hand-off", "L4.hand-off.sum", broken(launch_host=first_function_only)),
    SimMutant("copies outside of the stream", "L4.hand-off.inputs-may-change", broken(copy_async=own_stream)),
    SimMutant(
        "hand-off buffer reused a step too early",
        "L4.hand-off.two-in-flight",
        broken(pinned_buffer=shared_pinned),
    ),
    SimMutant("callback too early", "L1.launch.callback.sees-earlier-work", broken(launch_host=call_now)),
    SimMutant(
        "stream goes on during a callback", "L1.launch.callback.holds-later-work", broken(launch_host=call_aside)
    ),
    SimMutant("event done at once", "L1.stream.event-done", broken(event_done=done_at_once)),
    SimMutant("synchronise that does not wait", "L1.stream.synchronize-stream", broken(synchronize=no_synchronize)),
    SimMutant("swallowed late error", "L1.stream.late-error", broken(synchronize=quiet)),
    SimMutant("streams ignored", "L1.stream.order-with-copies", broken(use_stream=same_stream)),
    SimMutant("capture that runs", "L1.launch.graph.replay", broken(capture=run_and_capture)),
    SimMutant("free memory made up", "L1.memory.figures-follow", broken(memory=all_is_free)),
    SimMutant("computed on the host", "L2.linear.own-code", changes={LinearSpec: on_the_host}),
    SimMutant("silent fallback", "L2.linear.own-code", changes={LinearSpec: by_reference}),
    SimMutant("leaked device buffer", "L2.linear.leak", changes={LinearSpec: leaking}),
    SimMutant("buffer reused a step too early", "L2.linear.result-stays", changes={LinearSpec: one_buffer}),
    SimMutant("experts' columns as they are stored", "L3.experts.ordered", changes={ExpertsSpec: columns_as_stored}),
    SimMutant("an expert chosen twice", "L2.router.nothing-left.experts", changes={RouterSpec: chosen_again}),
    SimMutant(
        "rows of others times zero", "L2.nonfinite.kv_cache.gqa.freed-pages", changes={KVCacheSpec: all_rows_times_zero}
    ),
    SimMutant("dropped last expert", "L2.experts.last-only", changes={ExpertsSpec: without_last}),
]
