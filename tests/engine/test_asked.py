"""What `ktcore.load` takes, and what it refuses before anything is opened: types, sizes, contexts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import ktcore
from ktcore.engine.load.asked import check_asked, read_memory
from ktcore.engine.load.room import check_room
from ktcore.engine.prefix.cache import PrefixOptions
from ktcore.errors import BackendError, PlanError, RequestError
from ktcore.rules.prepare import Prepared, prepare

from .tiny_sources import llama_gguf

GIB = 2**30


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llama_gguf(tmp_path_factory.mktemp("asked") / "tiny.gguf")


def test_the_package_shows_its_public_names_and_nothing_else() -> None:
    names = ["Backend", "BackendSpec", "KtcoreError", "Model", "Plan", "SamplingParams", "__version__", "load"]
    assert dir(ktcore) == names == sorted(ktcore.__all__)
    for name in names:
        assert getattr(ktcore, name) is not None
    with pytest.raises(AttributeError, match="module 'ktcore' has no attribute 'laod'"):
        _ = ktcore.laod


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"path": None}, r"path cannot be None \(NoneType\)\n.*a path, as str or pathlib.Path"),
        ({"path": 5}, r"path cannot be 5 \(int\)"),
        ({"path": b"model.gguf"}, r"path cannot be b'model.gguf' \(bytes\)"),
        ({"path": ""}, "path is empty"),
        ({"rules": 3}, r"rules cannot be 3 \(int\)"),
        ({"experts_from": ["a"]}, r"experts_from cannot be \['a'\] \(list\)"),
        ({"packed_cache": True}, r"packed_cache cannot be True \(bool\)"),
        ({"backend": None}, r'backend cannot be None \(NoneType\)\n.*"auto"'),
        ({"backend": ""}, "backend cannot be ''"),
        ({"threads": 0}, r"threads cannot be 0 \(int\)\n.*at least 1"),
        ({"threads": True}, r"threads cannot be True \(bool\)"),
        ({"context": -1}, r"context cannot be -1 \(int\)"),
        ({"context": "4k"}, r"context cannot be '4k' \(str\)"),
        ({"context": 4.0}, r"context cannot be 4.0 \(float\)"),
        ({"progress": "yes"}, r"progress cannot be 'yes' \(str\)"),
        ({"graphs": None}, r"graphs cannot be None \(NoneType\)"),
        ({"prefix": {"memory": 5}}, r"prefix cannot be \{'memory': 5\} \(dict\)"),
        ({"prefix": list(range(99))}, r"prefix cannot be \[0, 1, .{,60}\.\.\. \(list\)"),
        ({"memory": "24 apples"}, "memory: '24 apples' is not a size.*\n.*24GiB"),
        ({"memory": 0}, "memory cannot be 0"),
        ({"memory": "0"}, "memory: a size must be above 0"),
        ({"memory": -5}, "memory cannot be -5"),
        ({"memory": 1.5}, "memory cannot be 1.5"),
        ({"memory": True}, "memory cannot be True"),
        ({"memory": {}}, r"memory cannot be \{\} \(dict\)"),
        ({"memory": {0: "1GiB"}}, r"memory cannot be \{0: '1GiB'\}"),
        ({"memory": {"cpu": "lots"}}, r"memory\['cpu'\]: 'lots' is not a size"),
    ],
)
def test_arguments_of_another_type_are_named(model: Path, given: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        ktcore.load(**({"path": model} | given))


ASKED: dict[str, Any] = {
    "path": "model.gguf", "rules": None, "experts_from": None, "packed_cache": None, "backend": "auto",
    "threads": None, "context": None, "progress": None, "graphs": True, "prefix": None, "packing": None,
}  # fmt: skip


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"path": Path("model.gguf"), "rules": "reference", "experts_from": Path("other"), "packed_cache": "cache"},
        {"threads": 1, "context": 1, "graphs": False},
        {"progress": lambda name, done, total: None, "prefix": PrefixOptions()},
    ],
)
def test_arguments_of_the_right_type_pass(given: dict[str, Any]) -> None:
    check_asked(**(ASKED | given))


def test_a_value_is_shown_whole_up_to_a_lines_length() -> None:
    for name, shown in (("x" * 58, repr("x" * 58)), ("x" * 59, "'" + "x" * 56 + "...")):
        with pytest.raises(RequestError) as caught:
            check_asked(**(ASKED | {"threads": name}))
        assert caught.value.message == f"threads cannot be {shown} (str)"


def test_a_backend_that_is_none_is_answered_with_near_names(model: Path) -> None:
    with pytest.raises(BackendError, match=r"backend 'cpuu' is unknown\n.*did you mean cpu"):
        ktcore.load(model, backend="cpuu")


def test_sizes_are_taken_in_words() -> None:
    assert read_memory(None) is None
    assert read_memory(24) == 24
    assert read_memory("24GiB") == 24 * GIB
    assert read_memory({"cpu": "1GiB", "sim:1": 5}) == {"cpu": GIB, "sim:1": 5}
    prefix = PrefixOptions("1GiB", "somewhere", "2GB")
    assert (prefix.memory_bytes, prefix.disk_bytes) == (GIB, 2 * 10**9)
    assert PrefixOptions().memory_bytes == 0
    for wrong in ({"memory": "much"}, {"memory": -1}, {"disk": 0}, {"disk": "much"}):
        with pytest.raises(RequestError, match=next(iter(wrong))):
            PrefixOptions(**wrong)  # type: ignore[arg-type]


def test_the_memory_of_the_host_can_be_limited_by_name(model: Path) -> None:
    with pytest.raises(PlanError, match=r"on cpu:0 with a context of 512 tokens .* 16\.0 KiB that may be used"):
        ktcore.load(model, backend="cpu", memory={"cpu": "16KiB"})


@dataclass(frozen=True)
class Planned:
    made: Prepared
    context: int = 4096

    def check(self, usable: int, mapped: bool = False) -> None:
        check_room(self.made.plan, self.made.registry, self.context, mapped, usable)


class TestRoom:
    @pytest.fixture
    def planned(self, model: Path) -> Planned:
        made = prepare(model, backend="cpu")
        made.checkpoint.close()
        return Planned(made)

    def test_a_context_that_the_machine_cannot_hold_is_refused_with_the_largest_that_fits(
        self, planned: Planned
    ) -> None:
        need = planned.made.plan.memory(planned.context)["cpu:0"]
        planned.check(need.total)
        with pytest.raises(PlanError, match=r"a context of 4096 tokens needs .* of KV cache on cpu:0") as caught:
            planned.check(need.total - 1)
        largest = planned.context - planned.made.plan.page_size
        assert caught.value.hint == f"a context of {largest} tokens fits"
        Planned(planned.made, largest).check(need.total - 1)

    def test_mapped_weights_and_weights_that_fit_nowhere_take_no_room(self, planned: Planned) -> None:
        need = planned.made.plan.memory(planned.context)["cpu:0"]
        planned.check(need.kv + need.workspace, mapped=True)
        with pytest.raises(PlanError, match="a context of 4096"):
            planned.check(need.kv + need.workspace - 1, mapped=True)
        with pytest.raises(PlanError, match="no context fits"):
            planned.check(need.workspace, mapped=True)
        small = Planned(planned.made, planned.made.plan.page_size)
        small.check(need.weights + need.workspace - 1)

    def test_load_asks_before_it_loads(self, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("ktcore.engine.model.load_modules", lambda *a, **k: pytest.fail("loaded"))
        with pytest.raises(PlanError, match=r"of 100000000000 tokens needs .* of this machine\n.*tokens fits"):
            ktcore.load(model, backend="cpu", context=10**11)
        with pytest.raises(PlanError, match="a context of 100000000000 tokens needs"):
            ktcore.load(model, backend="cpu", context=10**11, packed_cache=model.parent / "cache")

    def test_an_accelerators_room_is_the_plans_affair(self, planned: Planned) -> None:
        class Accelerators:
            def known(self, name: str) -> Any:
                return type("Record", (), {"accelerator": True})

        check_room(planned.made.plan, Accelerators(), planned.context, False, 1)  # type: ignore[arg-type]
