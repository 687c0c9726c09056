"""Switch points are measured when a format is first used, kept for the machine, and read back by later pools."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from ktcore_cpu.switch import Switch, switch_file


class FakePool:
    """Measures what it is told, and counts; reads ahead 64 bytes more than its point has tokens of 64 bytes."""

    def __init__(self, points: dict[str, int]) -> None:
        self.points, self.measured = points, []
        self.few, self.ahead = dict.fromkeys(points, 12), dict.fromkeys(points, 8192)

    def measure_ahead(self, format: str) -> int:
        return 64 * self.points[format] + 64

    def measure_few(self, format: str) -> int:
        assert self.ahead[format] == self.measure_ahead(format), "few tokens are timed as they will be read"
        self.measured.append(format)
        return self.points[format]

    def set_few(self, format: str, tokens: int) -> None:
        self.few[format] = tokens

    def set_ahead(self, format: str, bytes: int) -> None:
        self.ahead[format] = bytes


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
    assert later.ahead == {"Q4_K": 576, "Q6_K": 8192, "Q8_0": 128}
    assert list(json.loads(path.read_text()).values()) == [{"Q4_K": [8, 576], "Q6_K": [20, 1344], "Q8_0": [1, 128]}]
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("text", ["", "[1]", '{"x": 3}', "not json", '{"x": {"Q4_K": "many"}}', '{"x": {"Q4_K": [2]}}'])
def test_a_file_that_is_not_ours_is_replaced(tmp_path: Path, text: str) -> None:
    path, pool = tmp_path / "switch.json", FakePool({"Q4_K": 8})
    path.write_text(text)
    Switch(pool, path).use("Q4_K")  # type: ignore[arg-type]
    assert pool.few == {"Q4_K": 8}
    assert {"Q4_K": [8, 576]} in json.loads(path.read_text()).values()


def test_another_machine_s_figures_stay_and_are_not_used(tmp_path: Path) -> None:
    path, pool = tmp_path / "switch.json", FakePool({"Q4_K": 8})
    path.write_text('{"another": {"Q4_K": [2, 0]}}')
    Switch(pool, path).use("Q4_K")  # type: ignore[arg-type]
    kept = json.loads(path.read_text())
    assert kept["another"] == {"Q4_K": [2, 0]}
    assert len(kept) == 2
    assert pool.few == {"Q4_K": 8}


@pytest.mark.parametrize("kept", ["8", "[40, 256]", "[8, 100]", "[8, -64]", "[8, true, 0]"])
def test_figures_that_cannot_be_are_measured_again(tmp_path: Path, kept: str) -> None:
    path, pool = tmp_path / "switch.json", FakePool({"Q4_K": 8})
    Switch(pool, path).use("Q4_K")  # type: ignore[arg-type]
    path.write_text(path.read_text().replace("[\n   8,\n   576\n  ]", kept))
    again = FakePool({"Q4_K": 3})
    Switch(again, path).use("Q4_K")  # type: ignore[arg-type]
    assert again.measured == ["Q4_K"]


def test_a_folder_that_takes_no_file_costs_the_measurement_alone(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    pool = FakePool({"Q4_K": 8})
    Switch(pool, tmp_path / "file" / "switch.json").use("Q4_K")  # type: ignore[arg-type]
    assert pool.few == {"Q4_K": 8}


def test_it_lies_in_the_user_s_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert switch_file() == tmp_path / "ktcore" / "cpu-switch.json"
