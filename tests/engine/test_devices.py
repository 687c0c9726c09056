"""The devices of one engine: opened on first use, each with a stream, all closed in the end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from ktcore.engine.experts.split import DeferralChain
from ktcore.engine.step.devices import Devices
from ktcore.engine.step.runner import LoadedModel


class Runtime:
    """A device that notes what is done with it."""

    def __init__(self, name: str) -> None:
        self.name, self.seen = name, list[str]()
        self.device = torch.device("meta" if name.startswith("fast") else "cpu")

    def new_stream(self) -> str:
        self.seen.append("stream")
        return f"stream of {self.name}"

    @contextmanager
    def use_stream(self, stream: str) -> Iterator[None]:
        self.seen.append(f"in {stream}")
        yield
        self.seen.append(f"out of {stream}")

    def synchronize(self) -> None:
        self.seen.append("waited")

    def close(self) -> None:
        self.seen.append("closed")


@pytest.fixture
def opened() -> tuple[Devices, list[Runtime]]:
    made: list[Runtime] = []

    def open_runtime(name: str) -> Any:
        made.append(Runtime(name))
        return made[-1]

    return Devices(open_runtime), made


def test_a_device_is_opened_once_and_has_one_stream(opened: tuple[Devices, list[Runtime]]) -> None:
    devices, made = opened
    assert devices.runtime("fast:0") is devices.runtime("fast:0") is made[0]
    assert devices.stream("fast:0") == devices.stream("fast:0") == "stream of fast:0"
    assert devices.stream("fast:1") == "stream of fast:1"
    assert devices.open_runtimes() == tuple(made)
    assert [r.seen for r in made] == [["stream"], ["stream"]]
    assert not devices.hands_off


def test_work_goes_to_the_streams_of_accelerators_alone(opened: tuple[Devices, list[Runtime]]) -> None:
    devices, made = opened
    for name in ("fast:0", "cpu:0"):
        devices.runtime(name)
    with devices.running():
        assert made[0].seen == ["stream", "in stream of fast:0"]
    assert [r.seen for r in made] == [["stream", "in stream of fast:0", "out of stream of fast:0"], []]
    devices.synchronize()
    assert [r.seen[-1] for r in made] == ["waited", "waited"]


def test_what_fails_in_a_step_leaves_no_submission_behind(opened: tuple[Devices, list[Runtime]]) -> None:
    devices, made = opened
    devices.runtime("fast:0")
    seen: list[str] = []

    class HandOff:
        def abandon(self) -> None:
            seen.append(made[0].seen[-1])

    devices._hand_offs += [HandOff(), HandOff()]  # type: ignore[list-item]
    with devices.running():
        pass
    assert seen == []
    with pytest.raises(KeyboardInterrupt), devices.running():
        raise KeyboardInterrupt
    # on the engine's stream still, where the submissions are
    assert seen == ["in stream of fast:0"] * 2


def test_closing_closes_each_once(opened: tuple[Devices, list[Runtime]]) -> None:
    devices, made = opened
    for name in ("fast:0", "cpu:0"):
        devices.runtime(name)

    class Lane:
        closed = 0

        def close(self) -> None:
            self.closed += 1
            assert not any("closed" in r.seen for r in made), "jobs end before the devices that they run on"

    class HandOff:
        def __init__(self, fails: Exception | None = None) -> None:
            self.fails = fails

        def check(self) -> None:
            if self.fails is not None:
                raise self.fails

        def take_over(self) -> list[str]:
            return ["a ticket"]

    lane = devices._lanes["cpu:0"] = Lane()  # type: ignore[assignment]
    devices._hand_offs += [HandOff(), HandOff(MemoryError("an expert failed"))]  # type: ignore[list-item]
    assert devices.hands_off
    assert devices.take_over() == ["a ticket"] * 2
    with pytest.raises(MemoryError, match="an expert failed"):
        devices.check()
    for _ in range(2):
        devices.close()
        assert (lane.closed, [r.seen for r in made]) == (1, [["closed"]] * 2)  # type: ignore[attr-defined]
    assert not devices.hands_off
    devices.check()


def test_memory_is_allocated_on_the_stream_of_the_steps(opened: tuple[Devices, list[Runtime]]) -> None:
    """Whoever fills it there is done before the first step writes into it."""
    devices, made = opened
    devices.runtime("fast:0")
    seen = made[0].seen

    class Owner:
        def allocate_pages(self, pages: int, page_size: int) -> None:
            seen.append(f"{pages} pages of {page_size}")

        def allocate_states(self, slots: int) -> None:
            seen.append(f"{slots} states")

    parts: dict[str, Any] = dict.fromkeys(("embed", "norm", "head", "sampler"))
    owner: Any = Owner()
    model = LoadedModel(
        **parts, layers=(), early=frozenset(), caches=(owner,), states=(owner,), devices=devices,
        deferred=DeferralChain(),
    )  # fmt: skip
    model.allocate_pages(7, 16)
    model.allocate_states(3)
    inside, outside = "in stream of fast:0", "out of stream of fast:0"
    assert seen == ["stream", inside, "7 pages of 16", outside, inside, "3 states", outside]
