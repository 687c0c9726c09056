"""Captured decode steps over a model whose answers are known by heart, and why a plan's steps are not captured."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ktcore.backend.runtime import GraphMode, HostCallbackMode
from ktcore.engine.prefix.cache import ON_DEVICE
from ktcore.engine.schedule.lookahead import PromptLookup
from ktcore.engine.schedule.sequence import Sequence
from ktcore.engine.step.decode_graph import SIZES, DecodeGraphs, graph_device
from ktcore.engine.step.engine import Engine
from ktcore.engine.step.scores import Scores
from ktcore.errors import BackendError
from ktcore.ops.batch import StepBatch
from ktcore.ops.moe import ExpertsSpec
from ktcore.ops.sampling import SamplingParams

from .toy import NoDevices, Pages, States, answer, run, toy


class Fixed:
    """Adds up as `part` does, but from arguments at fixed places, as a captured step has them."""

    def __init__(self, part: Any) -> None:
        self.part = part
        self.steps: list[StepBatch] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.part, name)

    def __call__(self, x: torch.Tensor, step: StepBatch) -> torch.Tensor:
        if step.mirrors is not None:
            held = SimpleNamespace(step=step)
            self.steps.append(step)
            step.mirrors.at_fill(lambda new, stream: setattr(held, "step", new))  # type: ignore[attr-defined]
            made = self.part(x, step)
            self.again: Callable[[], torch.Tensor] = lambda: self.part(x, held.step)
            return made
        return self.part(x, step)


class Device(NoDevices):
    """A device that records steps and runs them again."""

    def __init__(self, layer: Fixed | None = None, refuses: Exception | None = None) -> None:
        super().__init__()
        self.layer, self.refuses = layer, refuses
        self.captured, self.replayed, self.waited = 0, 0, 0
        self.device = torch.device("cpu")

    def runtime(self, device: str) -> Any:
        return self

    def stream(self, device: str) -> str:
        return "a stream"

    def synchronize(self, stream: Any = None) -> None:
        self.waited += 1

    def take_over(self) -> list[Any]:
        return list(self.tickets)

    tickets: tuple[Any, ...] = ()

    def capture(self, stream: Any, work: Callable[[], None]) -> Any:
        if self.refuses is not None:
            raise self.refuses
        assert stream == "a stream"
        assert self.layer is not None
        assert len(self.layer.steps) == 1, "the step has run once, so that all it allocates is there"
        self.layer.steps.clear()
        self.captured += 1
        work()
        self.layer.steps.clear()
        again, out = self.layer.again, work.__closure__
        found = next(c.cell_contents for c in out or () if isinstance(c.cell_contents, list))

        def replay(stream: Any) -> None:
            self.replayed += 1
            found[0].copy_(again())

        return SimpleNamespace(replay=replay)


def captured_engine(part: Any, context: int = 64, **options: Any) -> tuple[Engine, Device]:
    layer = Fixed(part)
    device = Device(layer)
    model = toy(part, devices=device)
    object.__setattr__(model, "layers", ((layer, lambda x: x),))
    object.__setattr__(model, "graph_device", "fast:0")
    return Engine(model, context, 4, **options), device


@pytest.mark.parametrize("part", [Pages, States])
def test_replayed_steps_give_the_answers_of_plain_ones(part: type) -> None:
    made, device = captured_engine(part(), context=256, state_slots=5)
    prompts = [[1], [2, 3], [9, 9, 9], [4], [5, 6, 7, 8, 9]]
    new = [9, 7, 5, 3, 2]
    sequences = [Sequence(list(p), SamplingParams(temperature=0), n) for p, n in zip(prompts, new, strict=True)]
    run(made, *sequences)
    assert [s.new_tokens for s in sequences] == [answer(p, n) for p, n in zip(prompts, new, strict=True)]
    assert made.graphs is not None
    assert made.graphs.sizes == (1, 2, 4, 8)  # five, four, three, two and one at a time
    assert device.captured == 4
    assert device.replayed == 8
    assert made.scheduler.pages.free == made.scheduler.pages.total == 64


def test_a_captured_step_keeps_to_a_page_and_a_state_that_no_sequence_owns() -> None:
    part = Pages()
    made, _ = captured_engine(part, context=8)
    assert made.scheduler.pages.total == 2
    assert part.memory.shape == (3, 4)
    sequence = Sequence([1, 2, 3], SamplingParams(temperature=0), 5)
    run(made, sequence)
    assert sequence.new_tokens == answer([1, 2, 3], 5)
    states = States()
    captured_engine(states, state_slots=3)
    assert states.memory.shape == (4, 1)
    plain = States()
    captured_engine(plain, state_slots=3, graphs=False)
    assert plain.memory.shape == (3, 1)


def test_what_replayed_steps_have_computed_is_shared() -> None:
    made, device = captured_engine(Pages(), prefix=ON_DEVICE)
    first = Sequence([1, 2, 3], SamplingParams(temperature=0), 9)
    run(made, first)
    assert device.replayed == 8
    turn = Sequence([*first.tokens, 5], SamplingParams(temperature=0), 2)
    run(made, turn)
    assert turn.prefix.reused == 8  # of twelve tokens the last one was never run
    assert turn.new_tokens == answer([*first.tokens, 5], 2)


def step(count: int, tokens: int | None = None) -> StepBatch:
    return StepBatch(
        token_ids=torch.arange(tokens or count),
        positions=torch.zeros(tokens or count, dtype=torch.int64),
        q_start=tuple(range(count + 1)) if tokens is None else (0, tokens),
        context_lens=(1,) * count,
        block_table=torch.arange(count, dtype=torch.int32)[:, None],
        page_size=4,
    )


def scores_of(graphs: DecodeGraphs, asked: StepBatch) -> Scores | None:
    found = graphs.run(asked)
    return None if found is None else found[1]


@pytest.mark.parametrize("part", [Pages, States])
def test_guesses_are_checked_by_captured_steps_where_no_state_has_to_pass_from_token_to_token(part: type) -> None:
    made, device = captured_engine(part(), context=256, state_slots=5)
    prompts = [[0] * 9, [1, 1, 2, 4, 8, 16, 32, 64], [3]]
    sequences = [Sequence(list(p), SamplingParams(temperature=0), 12, lookup=PromptLookup(4)) for p in prompts]
    run(made, *sequences)
    assert [s.new_tokens for s in sequences] == [answer(p, 12) for p in prompts]
    assert made.guesses["lookup"].right > 8
    assert made.graphs is not None
    # three sequences run a token each, or up to five
    assert (max(made.graphs.sizes) > 4) is (part is Pages)
    assert device.replayed == (9 if part is Pages else 3)


def test_steps_of_more_tokens_or_more_sequences_than_any_graph_run_plainly() -> None:
    made, device = captured_engine(Pages(), context=4 * 40)
    assert made.graphs is not None
    assert made.graphs.run(step(1, tokens=3)) is None
    assert made.graphs.run(step(SIZES[-1] + 1)) is None
    assert device.captured == 0
    found = scores_of(made.graphs, step(SIZES[-1]))
    assert found is not None
    assert found.likeliest()[3][0] == 3
    assert len(found.logits) == 32
    for count in (3, 9):
        found = scores_of(made.graphs, step(count))
        assert found is not None
        assert len(found.logits) == count
    assert made.graphs.sizes == (4, 16, 32), "the next powers of two"


def test_errors_of_host_experts_come_with_a_replays_scores() -> None:
    made, device = captured_engine(Pages())
    failed = SimpleNamespace(error=None)
    device.tickets = (SimpleNamespace(error=None), failed)
    assert made.graphs is not None
    scores = scores_of(made.graphs, step(1))
    assert scores is not None
    scores.rows()
    failed.error = MemoryError("an expert failed")
    with pytest.raises(MemoryError, match="an expert failed"):
        scores.rows()
    device.fails = MemoryError("an expert failed while capturing")
    with pytest.raises(MemoryError, match="while capturing"):
        made.graphs.run(step(2))


def test_a_refused_capture_says_what_to_do() -> None:
    device = Device(refuses=RuntimeError("not while capturing"))
    model = toy(devices=device)
    object.__setattr__(model, "graph_device", "fast:0")
    model.allocate_pages(3, 4)
    with pytest.raises(BackendError, match=r"of 2 sequences cannot be captured on fast:0: .*not while") as caught:
        DecodeGraphs(model, 2, None, 4, 2).run(step(2))
    assert "--no-graphs" in str(caught.value.hint)
    assert device.waited == 1


def node(name: str, spec: Any = None, *parts: Any) -> Any:
    made = SimpleNamespace(name=name, spec=spec)
    made.walk = lambda: [made, *(n for p in parts for n in p.walk())]
    return made


EXPERTS = object.__new__(ExpertsSpec)


def choice(device: str = "fast:0", capturable: bool = True, resident: Any = None) -> Any:
    made = SimpleNamespace(capturable=capturable, id="acme.op")
    return SimpleNamespace(device=device, implementation=made, resident=resident)


@pytest.mark.parametrize(
    ("changes", "device", "why"),
    [
        ({}, {}, ""),
        ({"attn": choice("fast:1")}, {}, "layers live on several devices: fast:0, fast:1"),
        ({}, {"device": torch.device("cpu")}, "the model runs on the host"),
        ({}, {"graph": GraphMode.NONE}, "fast:0 has no graphs"),
        ({}, {"host_callback": HostCallbackMode.EAGER}, "host callbacks of fast:0 cannot be captured (eager)"),
        ({}, {"host_callback": HostCallbackMode.EAGER, "hands_off": False}, ""),
        ({"router": choice("cpu:0")}, {}, "router runs on cpu:0"),
        ({"experts": choice("cpu:0", capturable=False)}, {}, ""),
        ({"experts": choice(capturable=False)}, {}, "acme.op (experts) cannot be captured"),
        ({"head": choice(capturable=False)}, {}, "acme.op (head) cannot be captured"),
        ({"experts": choice("cpu:0", resident=choice())}, {}, ""),
        (
            {"experts": choice("cpu:0", resident=choice("fast:1"))},
            {},
            "acme.op (experts, on fast:1) cannot be captured",
        ),
        (
            {"experts": choice("cpu:0", resident=choice(capturable=False))},
            {},
            "acme.op (experts, on fast:0) cannot be captured",
        ),
    ],
)
def test_what_keeps_steps_from_being_captured(changes: dict[str, Any], device: dict[str, Any], why: str) -> None:
    experts, router = node("experts", EXPERTS), node("router")
    graph = SimpleNamespace(
        layers=[SimpleNamespace(attn=node("attn"), ffn=node("ffn", None, router, experts, node("not planned")))],
        norm=node("norm"),
        head=node("head"),
    )
    names = ("attn", "ffn", "router", "norm", "head")
    choices = {name: choice() for name in names} | {"experts": choice("cpu:0")} | changes
    found = {
        "device": torch.device("meta"),
        "graph": GraphMode.CAPTURE,
        "host_callback": HostCallbackMode.CAPTURABLE,
        "hands_off": True,
    } | device
    devices: Any = SimpleNamespace(runtime=lambda name: SimpleNamespace(**found), hands_off=found["hands_off"])
    plan: Any = SimpleNamespace(graph=graph, choices=choices)
    assert graph_device(plan, devices) == (None if why else "fast:0", why)
