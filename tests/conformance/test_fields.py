"""Every field of every spec has a case that whoever is blind to the field fails, on a plain backend and on sim."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass, replace
from typing import Any, get_args, get_origin, get_type_hints

import pytest

import ktcore.ops as ops
from ktcore.backend import Implementation, LoadRequest
from ktcore.backend.handles import is_optional
from ktcore.conformance.case import Case
from ktcore.conformance.fields import DEFAULT, FIELDS, FORMAT, Seen, Unseen
from ktcore.conformance.levels import all_cases
from ktcore.conformance.runner import run_case
from ktcore.conformance.status import Status
from ktcore.ops import SamplingParams, SamplingSpec, Spec, StepBatch

from . import plain
from .plain import plain_target
from .sim import sim_target

SPECS: dict[str, type[Spec]] = {
    kind.op: kind
    for kind in (getattr(ops, name) for name in ops.__all__)
    if isinstance(kind, type) and issubclass(kind, Spec) and kind is not Spec
}
SEEN = sorted(name for name, found in FIELDS.items() if isinstance(found, Seen) and not name.startswith("StepBatch."))


@pytest.fixture(scope="module")
def cases() -> dict[str, Case]:
    return {case.id: case for case in all_cases()}


def walked() -> Iterator[str]:
    """Names of all fields of specs, of the plain values in them, of sampling parameters and of steps."""
    for op, spec_type in SPECS.items():
        hints = get_type_hints(spec_type)
        for f in fields(spec_type):
            yield f"{op}.{f.name}"
            options = get_args(hints[f.name]) if get_origin(hints[f.name]) is not None else (hints[f.name],)
            for kind in options:
                if isinstance(kind, type) and is_dataclass(kind) and not issubclass(kind, Spec):
                    yield from (f"{op}.{f.name}.{inner.name}" for inner in fields(kind))
    for kind in (SamplingParams, StepBatch):
        yield from (f"{kind.__name__}.{f.name}" for f in fields(kind) if not f.name.startswith("_"))


def test_no_field_is_without_a_case_or_a_reason() -> None:
    assert set(walked()) == set(FIELDS)


def test_no_spec_is_left_out() -> None:
    defined = {kind for kind in Spec.__subclasses__() if kind.__module__.startswith("ktcore.")}
    assert defined == set(SPECS.values())


def test_the_cases_exist_and_reasons_are_given(cases: dict[str, Case]) -> None:
    for name, found in FIELDS.items():
        assert found.case in cases if isinstance(found, Seen) else found.reason, name


def test_what_may_be_absent_is_always_seen_by_a_case() -> None:
    """A reason is enough for what every model has; a field with a default is what older plugins have never heard of."""
    unseen = {
        f"{op}.{f.name}" for op, kind in SPECS.items() for f in fields(kind)
        if is_optional(f) and isinstance(FIELDS[f"{op}.{f.name}"], Unseen)
    }  # fmt: skip
    assert unseen == {"mla.q", "mla.q_a_norm", "mla.q_b"}


@pytest.mark.parametrize("name", sorted(n for n, f in FIELDS.items() if f is FORMAT))
def test_formats_are_fields_that_name_one(name: str) -> None:
    assert name.endswith("_format")


def blinded(spec: Any, path: list[str], blind: Any) -> Any:
    """The spec as who does not read the field takes it."""
    name = path[0]
    if len(path) > 1:
        inner = getattr(spec, name)
        return spec if inner is None else replace(spec, **{name: blinded(inner, path[1:], blind)})
    if blind is DEFAULT:
        f = next(f for f in fields(spec) if f.name == name)
        assert f.default is not MISSING
        blind = f.default
    return replace(spec, **{name: blind})


def blind_request(request: LoadRequest, field: str) -> LoadRequest:
    found = FIELDS[field]
    assert isinstance(found, Seen)
    path = field.split(".")[1:]
    # who does not know a field does not ask for its weight either
    weights = {role: weight for role, weight in request.weights.items() if role != path[0]}
    return replace(request, spec=blinded(request.spec, path, found.blind), weights=weights)


def blind_sampler(field: str) -> Any:
    found = FIELDS[field]
    assert isinstance(found, Seen)

    def make(request: LoadRequest) -> Any:
        run = plain.sampling(request)
        return lambda logits, params, *rest: run(logits, blinded(params, field.split(".")[1:], found.blind), *rest)

    return make


@pytest.mark.parametrize("field", SEEN)
def test_whoever_is_blind_to_it_fails(field: str, cases: dict[str, Case], one_thread: None) -> None:
    found = FIELDS[field]
    assert isinstance(found, Seen)
    if field.startswith("SamplingParams."):
        makers: Any = {SamplingSpec: blind_sampler(field)}
    else:
        kind = SPECS[field.split(".")[0]]
        make = plain.MAKERS[kind]
        makers = {kind: lambda request: make(blind_request(request, field))}
    result = run_case(plain_target(makers), cases[found.case])
    assert result.status is Status.FAIL, (result.status, result.reason)
    assert run_case(plain_target(), cases[found.case]).status is Status.PASS


STEP = {
    "positions": lambda step: replace(step, positions=step.positions * 0),
    "state_slots": lambda step: replace(step, state_slots=tuple(range(step.sequences))),
}


@pytest.mark.parametrize("name", STEP)
def test_whoever_is_blind_to_a_field_of_the_step_fails(name: str, cases: dict[str, Case], one_thread: None) -> None:
    found = FIELDS[f"StepBatch.{name}"]
    assert isinstance(found, Seen)

    def branch(make: Any) -> Any:
        def blind(request: LoadRequest) -> Any:
            run = make(request)
            return lambda x, step: run(x, STEP[name](step))

        return blind

    kinds = (ops.AttentionSpec, ops.GatedDeltaNetSpec)
    makers: Any = {kind: branch(plain.MAKERS[kind]) for kind in kinds}
    result = run_case(plain_target(makers), cases[found.case])
    assert result.status is Status.FAIL, (result.status, result.reason)


# sim samples on the host, and takes a norm's weight where there is one, whatever the spec says
NOT_ON_SIM = {f for f in SEEN if f.startswith("SamplingParams.")} | {"rms_norm.weight_format"}


@pytest.mark.parametrize("field", sorted(set(SEEN) - NOT_ON_SIM))
def test_on_the_simulated_device_too_or_it_is_refused_by_name(
    field: str, cases: dict[str, Case], one_thread: None
) -> None:
    found, kind = FIELDS[field], SPECS[field.split(".")[0]]
    assert isinstance(found, Seen)

    def load(right: Implementation, request: LoadRequest) -> Any:
        return right.load(blind_request(request, field))

    target = sim_target(changes={kind: load}, delay_us=0.0)
    result = run_case(target, cases[found.case])
    target.close()
    own = [i for i in target.implementations if i.spec_type is kind]
    name = field.partition(".")[2]
    if own and any(name.partition(".")[0] in i.handles or not _optional(kind, name) for i in own):
        assert result.status is Status.FAIL, (result.status, result.reason)
    elif own:
        assert result.status is Status.NOT_APPLICABLE
        assert f"does not handle {name.partition('.')[0]}" in result.reason
    else:
        assert result.status in (Status.NOT_APPLICABLE, Status.PASS_FALLBACK)


def _optional(kind: type[Spec], name: str) -> bool:
    """Whether the field may be absent, so that who does not name it is never asked for it."""
    return is_optional(next(f for f in fields(kind) if f.name == name.partition(".")[0]))


def test_memory_that_is_not_all_of_a_page_is_seen(cases: dict[str, Case], one_thread: None) -> None:
    class KeysOnly(plain.Cache):
        def page_tensors(self) -> tuple[Any, ...]:
            return super().page_tensors()[:1]

    makers: Any = {ops.KVCacheSpec: lambda request: KeysOnly(request.spec)}
    assert run_case(plain_target(makers), cases["L3.attention.kept-pages"]).status is Status.FAIL


def test_states_that_are_not_all_of_a_slot_are_seen(cases: dict[str, Case], one_thread: None) -> None:
    class MatricesOnly(plain.States):
        def state_tensors(self) -> tuple[Any, ...]:
            return super().state_tensors()[1:]

    makers: Any = {ops.StateCacheSpec: lambda request: MatricesOnly(request.spec)}
    assert run_case(plain_target(makers), cases["L3.gated_delta_net.kept-states"]).status is Status.FAIL


def test_columns_that_are_taken_to_be_in_place_are_seen(cases: dict[str, Case], one_thread: None) -> None:
    from ktcore.weights import dequantize

    def make(request: LoadRequest) -> Any:
        w = request.weights["weight"]
        values = dequantize(w.format, w.raw(), w.shape)
        return lambda x: x @ values.T

    assert run_case(plain_target({ops.LinearSpec: make}), cases["L3.linear.ordered"]).status is Status.FAIL
