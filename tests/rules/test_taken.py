"""The sentence that says which backend and devices a plan took, and why."""

from __future__ import annotations

from ktcore.rules.taken import taken

from .conftest import Planner
from .graphs import llama
from .test_resolve import rule

EMBED_ON_HOST = rule("{name: e, match: {op: embedding}, use: reference.embedding, device: host}")


def test_the_backends_own_device_comes_first_wherever_its_first_node_is(plan: Planner, rest: str) -> None:
    made = plan(llama(1), EMBED_ON_HOST, rest, backend="accel")
    assert made.devices[0] == "host1:0"
    found = taken(made, "accel was asked for.")
    assert (found.backend, found.device, found.why) == ("accel", "accel:0", "accel was asked for.")
    assert list(found.devices) == ["accel:0", "host1:0"]
    names = made.device_names
    assert str(found) == (
        f"Runs on accel:0, {names['accel:0']} and on host1:0, {names['host1:0']}. accel was asked for."
    )
    assert names["accel:0"] != names["host1:0"] != "host1:0"


def test_the_index_is_part_of_the_device_and_not_of_the_backend(plan: Planner, rest: str) -> None:
    found = taken(plan(llama(1), rest, backend="accel:1"), "")
    assert (found.backend, found.device) == ("accel", "accel:1")


def test_a_device_that_rules_leave_empty_is_said_to_be(plan: Planner, rest: str) -> None:
    everything = rest.replace("use: reference", "device: host, use: reference")
    found = taken(plan(llama(1), everything, backend="accel"), "accel was asked for.")
    assert list(found.devices) == ["host1:0"]
    assert str(found).endswith("accel was asked for. The rules put nothing on accel:0.")
