"""Backends that are not installed: near names, and how to get the package, from metadata alone."""

from __future__ import annotations

import json
from importlib.metadata import PathDistribution
from pathlib import Path

import pytest

from ktcore.backend.absent import absence_hint, offered_backends, source_tree
from ktcore.backend.registry import Registry
from ktcore.errors import BackendError


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A source tree with the backend "acme", which needs the package beside it."""
    for name, needs, entry in (("acme", '"ktcore>=0.1", "ktcore-parts>=0.1"', "acme"), ("parts", '"ktcore>=0.1"', "")):
        folder = tmp_path / "backends" / name
        folder.mkdir(parents=True)
        text = f'[project]\nname = "ktcore-{name}"\ndependencies = [{needs}]\n'
        text += f'\n[project.entry-points."ktcore.backends"]\n{entry} = "ktcore_{entry}.plugin"\n' if entry else ""
        (folder / "pyproject.toml").write_text(text)
    return tmp_path


def test_a_package_of_the_source_tree_is_named_with_what_it_needs(tree: Path) -> None:
    assert set(offered_backends(tree)) == {"acme"}
    hint = absence_hint("acme", ["cpu"], tree)
    assert f"`pip install {tree}/backends/parts {tree}/backends/acme`" in hint


def test_a_typing_error_gives_the_near_name_and_its_package(tree: Path) -> None:
    hint = absence_hint("acne", ["cpu"], tree)
    assert "did you mean acme?" in hint
    assert f"acme is not installed: `pip install {tree}/backends/parts {tree}/backends/acme`" in hint


def test_a_typing_error_of_an_installed_one_installs_nothing(tree: Path) -> None:
    assert "did you mean cpu?" in absence_hint("cpuu", ["cpu"], tree)
    assert "pip install" not in absence_hint("cpuu", ["cpu"], tree)


def test_without_a_source_tree_the_customary_package_name_is_told(tmp_path: Path) -> None:
    assert "ktcore-abacus" in absence_hint("abacus", ["cpu"], tmp_path)


def test_the_source_tree_is_what_pip_noted(tmp_path: Path) -> None:
    info = tmp_path / "ktcore-1.dist-info"
    info.mkdir()
    assert source_tree(PathDistribution(info)) is None
    for url, found in (
        (tmp_path.as_uri(), tmp_path),
        ("https://host/ktcore.git", None),
        ("file:///nothing/here", None),
    ):
        (info / "direct_url.json").write_text(json.dumps({"url": url, "dir_info": {}}))
        assert source_tree(PathDistribution(info)) == found


def test_an_unknown_backend_is_refused_with_that(monkeypatch: pytest.MonkeyPatch, tree: Path) -> None:
    monkeypatch.setattr("ktcore.backend.absent.source_tree", lambda: tree)
    with pytest.raises(BackendError, match="'acme' is unknown") as refused:
        Registry([]).known("acme")
    assert "pip install" in str(refused.value.hint)
    with pytest.raises(BackendError, match="acme"):
        Registry([]).choose("acme:1")
