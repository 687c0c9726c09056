"""Switch points are measured when a format is first used, kept for the machine, and read back by later pools."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from ktcore_cpu.switch import Switch, switch_file


class FakePool:
    """Measures what it is told, and counts."""

    def __init__(self, points: dict[str, int]) -> None:
        self.points, self.measured, self.few = points, [], dict.fromkeys(points, 12)

    def measure_few(self, format: str) -> int:
        self.measured.append(format)
        return self.points[format]

    def set_few(self, format: str, tokens: int) -> None:
        self.few[format] = tokens


def test_each_format_is_measured_once_a_machine(tmp_path: Path) -> None:
    path, first = tmp_path / "new" / "switch.json", FakePool({"Q4_K": 8, "Q6_K": 20, "Q8_0": 3})
    switch = Switch(first, path)  # type: ignore[arg-type]
    switch.use("Q4_K", "Q6_K", "Q4_K")
    switch.use("Q6_K")
    assert first.measured == ["Q4_K", "Q6_K"]
    assert first.few == {"Q4_K": 8, "Q6_K": 20, "Q8_0": 12}
    later = FakePool({"Q4_K": 1, "Q6_K": 1, "Q8_0": 1})
    Switch(later, path).use("Q8_0", "Q4_K")  # type: ignore[arg-type]
    assert later.measured == ["Q8_0"]
    assert later.few == {"Q4_K": 8, "Q6_K": 12, "Q8_0": 1}
    assert list(json.loads(path.read_text()).values()) == [{"Q4_K": 8, "Q6_K": 20, "Q8_0": 1}]
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("text", ["", "[1]", '{"x": 3}', "not json", '{"x": {"Q4_K": "many"}}'])
def test_a_file_that_is_not_ours_is_replaced(tmp_path: Path, text: str) -> None:
    path, pool = tmp_path / "switch.json", FakePool({"Q4_K": 8})
    path.write_text(text)
    Switch(pool, path).use("Q4_K")  # type: ignore[arg-type]
    assert pool.few == {"Q4_K": 8}
    assert {"Q4_K": 8} in json.loads(path.read_text()).values()


def test_another_machine_s_figures_stay_and_are_not_used(tmp_path: Path) -> None:
    path, pool = tmp_path / "switch.json", FakePool({"Q4_K": 8})
    path.write_text('{"another": {"Q4_K": 2}}')
    Switch(pool, path).use("Q4_K")  # type: ignore[arg-type]
    kept = json.loads(path.read_text())
    assert kept["another"] == {"Q4_K": 2}
    assert len(kept) == 2
    assert pool.few == {"Q4_K": 8}


def test_a_folder_that_takes_no_file_costs_the_measurement_alone(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    pool = FakePool({"Q4_K": 8})
    Switch(pool, tmp_path / "file" / "switch.json").use("Q4_K")  # type: ignore[arg-type]
    assert pool.few == {"Q4_K": 8}


def test_it_lies_in_the_user_s_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert switch_file() == tmp_path / "ktcore" / "cpu-switch.json"
