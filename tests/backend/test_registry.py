"""Discovery, the four states, and that one broken plugin never harms another."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ktcore.backend import BackendState, Registry
from ktcore.backend.registry import split_device
from ktcore.errors import BackendError

from .plugin_factory import PluginFactory

Discover = Callable[[], Registry]


@pytest.fixture
def plugins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[PluginFactory]:
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delenv("KTCORE_PLUGINS", raising=False)
    factory = PluginFactory(tmp_path)
    yield factory
    factory.forget()


@pytest.fixture
def discover(plugins: PluginFactory) -> Discover:
    """Load the test's own plugins and no installed one."""
    return lambda: Registry.discover(sorted(set(plugins.names)))


def state(registry: Registry, name: str) -> tuple[BackendState, str]:
    record = registry.get(name)
    assert record is not None
    return record.state, record.reason


def test_a_good_plugin_is_loaded_with_its_reason_and_distribution(plugins: PluginFactory, discover: Discover) -> None:
    plugins.good("alpha", package="alpha-cards")
    registry = discover()
    assert state(registry, "alpha") == (BackendState.LOADED, "one card")
    (record,) = registry.records()
    assert record.distribution == "alpha-cards 1.0"
    assert record.verdict.devices == 1
    assert list(registry.implementations())[-1] == "alpha.linear"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("import no_such_vendor_library", "ModuleNotFoundError: No module named 'no_such_vendor_library'"),
        ("raise RuntimeError('the driver is on fire')", "RuntimeError: the driver is on fire"),
        ("import sys; sys.exit(3)", "SystemExit: 3"),
        ("def (", "SyntaxError"),
        ("", "registers no backend"),
        ("from ktcore.backend import hookimpl\n@hookimpl\ndef ktcore_register_backends():\n    return 5", "TypeError"),
        ("from ktcore.backend import hookimpl\n@hookimpl\ndef ktcore_register_backends():\n    return ['x']", "a str"),
        ("from ktcore.backend import hookimpl\n@hookimpl\ndef ktcore_regster_backends():\n    return []", "regster"),
    ],
)
def test_a_broken_plugin_keeps_its_reason_and_harms_no_other(
    plugins: PluginFactory, discover: Discover, source: str, message: str
) -> None:
    plugins.add("bad", source)
    plugins.good("good")
    registry = discover()
    found, reason = state(registry, "bad")
    assert found is BackendState.BROKEN
    assert message in reason
    assert state(registry, "good")[0] is BackendState.LOADED
    assert "good.linear" in registry.implementations()
    with pytest.raises(BackendError, match=r"backend 'bad' \(pkg-bad 1\.0\) is broken"):
        registry.require("bad")


def test_the_traceback_of_a_failed_import_is_kept(plugins: PluginFactory, discover: Discover) -> None:
    module = plugins.add("bad", "def fail():\n    raise ValueError('deep inside')\nfail()")
    record = discover().get("bad")
    assert record is not None
    assert record.traceback is not None
    assert f"{module}.py" in record.traceback
    assert "deep inside" in record.traceback


@pytest.mark.parametrize(
    ("api", "message"),
    [("(3, 0)", "API 3.0, this ktcore has 2.0: update ktcore"), ("(2, 1)", "API 2.1"), ("(0, 9)", "update pkg-alpha")],
)
def test_another_api_version_is_incompatible(
    plugins: PluginFactory, discover: Discover, api: str, message: str
) -> None:
    plugins.good("alpha", api=api)
    registry = discover()
    found, reason = state(registry, "alpha")
    assert found is BackendState.INCOMPATIBLE
    assert message in reason
    assert "alpha.linear" not in registry.implementations()
    with pytest.raises(BackendError, match="is incompatible"):
        registry.choose("alpha")


def test_a_probe_that_hangs_is_given_up(plugins: PluginFactory, discover: Discover) -> None:
    plugins.good("slow", probe="import threading; threading.Event().wait(30)")
    registry = discover()
    record = registry.get("slow")
    assert record is not None
    record.probe_seconds = 0.1
    found, reason = state(registry, "slow")
    assert found is BackendState.UNAVAILABLE
    assert "no answer within 0.1 s" in reason
    assert registry.records()[0].verdict is record.verdict


def test_a_probe_is_waited_for(plugins: PluginFactory, discover: Discover) -> None:
    plugins.good("alpha", probe="import time; time.sleep(0.05); return Probe(True, 'one card', 1)")
    assert state(discover(), "alpha") == (BackendState.LOADED, "one card")


@pytest.mark.parametrize(
    ("probe", "message"),
    [
        ("raise OSError('libvendor.so.7: cannot open')", "its probe failed: OSError: libvendor.so.7"),
        ("raise SystemExit(1)", "its probe failed: SystemExit"),
        ("return True", "returned bool instead of a Probe"),
    ],
)
def test_a_probe_that_throws_is_broken(plugins: PluginFactory, discover: Discover, probe: str, message: str) -> None:
    plugins.good("alpha", probe=probe)
    found, reason = state(discover(), "alpha")
    assert found is BackendState.BROKEN
    assert message in reason


def test_of_two_backends_with_one_name_the_second_is_broken(plugins: PluginFactory, discover: Discover) -> None:
    plugins.good("same", package="first-package")
    plugins.good("same", package="second-package", entry_name="same2")
    registry = discover()
    first, second = registry.records()
    assert (first.state, second.state) == (BackendState.LOADED, BackendState.BROKEN)
    assert "first-package 1.0" in second.reason
    assert "second-package 1.0" in second.reason
    assert registry.require("same") is first


@pytest.mark.parametrize("name", ["reference", "auto", "Upper", "a:b"])
def test_reserved_and_malformed_names_are_broken(plugins: PluginFactory, discover: Discover, name: str) -> None:
    plugins.good(name, entry_name="odd")
    assert state(discover(), name)[0] is BackendState.BROKEN


def test_discovery_neither_probes_nor_imports_the_entry(plugins: PluginFactory, discover: Discover) -> None:
    module = plugins.good("alpha", probe="raise RuntimeError")
    threads = threading.active_count()
    registry = discover()
    record = registry.get("alpha")
    assert record is not None
    assert record.settled is None
    assert f"{module}_impl" not in sys.modules
    assert threading.active_count() == threads
    registry.implementations()
    assert f"{module}_impl" in sys.modules
    assert record.settled is None


def test_an_unavailable_backend_still_offers_what_planning_needs(plugins: PluginFactory, discover: Discover) -> None:
    plugins.good("alpha", probe="return Probe(False, 'no card in the slot')")
    registry = discover()
    assert "alpha.linear" in registry.implementations()
    assert registry.capabilities("alpha").has("bf16")
    assert not registry.capabilities("alpha").live
    assert registry.choose("alpha")[0] == "alpha"
    with pytest.raises(BackendError, match=r"is unavailable: no card in the slot\n  it needs: a alpha card"):
        registry.runtime("alpha")


def test_an_unknown_backend_names_the_known_and_their_states(plugins: PluginFactory, discover: Discover) -> None:
    plugins.good("alpha")
    plugins.good("beta", probe="return Probe(False, 'none')")
    with pytest.raises(BackendError, match=r"'gamma' is unknown\n  known: alpha \(loaded\), beta \(unavailable\)"):
        discover().require("gamma")


def test_an_entry_that_does_not_import_makes_the_backend_broken(plugins: PluginFactory, discover: Discover) -> None:
    module = plugins.good("alpha")
    plugins.good("beta")
    (plugins.folder / f"{module}_impl.py").write_text("import missing_kernels")
    registry = discover()
    assert [name for name in registry.implementations() if not name.startswith("reference.")] == ["beta.linear"]
    found, reason = state(registry, "alpha")
    assert found is BackendState.BROKEN
    assert "missing_kernels" in reason
    with pytest.raises(BackendError, match="missing_kernels"):
        registry.backend_object("alpha")


def test_an_entry_of_the_wrong_type_is_broken(plugins: PluginFactory, discover: Discover) -> None:
    module = plugins.good("alpha")
    (plugins.folder / f"{module}_impl.py").write_text("make = dict")
    with pytest.raises(BackendError, match="gave a dict instead of a Backend"):
        discover().backend_object("alpha")


@pytest.mark.parametrize(
    ("ids", "prefix", "message"),
    [
        (("reference.linear",), "other", "'other.linear' does not start with 'alpha.'"),
        (("reference.linear", "reference.linear"), "reference", "does not start with"),
    ],
)
def test_implementation_ids_belong_to_their_backend(
    plugins: PluginFactory, discover: Discover, ids: tuple[str, ...], prefix: str, message: str
) -> None:
    plugins.good("alpha", ids=ids, prefix=prefix)
    registry = discover()
    assert all(name.startswith("reference.") for name in registry.implementations())
    assert message in state(registry, "alpha")[1]


def test_an_implementation_id_given_twice_is_an_error(plugins: PluginFactory, discover: Discover) -> None:
    module = plugins.good("alpha")
    path = plugins.folder / f"{module}_impl.py"
    path.write_text(path.read_text().replace("return items", "return items + items"))
    registry = discover()
    assert "alpha.linear" not in registry.implementations()
    assert "'alpha.linear' is given twice" in state(registry, "alpha")[1]


def test_the_variable_limits_what_loads(plugins: PluginFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    plugins.good("alpha")
    plugins.add("bad", "raise RuntimeError")
    monkeypatch.setenv("KTCORE_PLUGINS", " alpha ,")
    assert [record.name for record in Registry.discover().records()] == ["alpha"]
    monkeypatch.setenv("KTCORE_PLUGINS", "")
    assert Registry.discover().records() == ()
    monkeypatch.setenv("KTCORE_PLUGINS", "alpha,gamma")
    with pytest.raises(BackendError, match=r"plugin 'gamma' was .* not installed\n  installed: alpha, bad"):
        Registry.discover()


def test_auto_takes_an_accelerator_only_when_there_is_no_doubt(plugins: PluginFactory, discover: Discover) -> None:
    plugins.good("hostish", accelerator=False)
    assert discover().choose() == ("hostish", "No accelerator is available, so hostish is used.")
    plugins.good("absent", probe="return Probe(False, 'none')")
    plugins.add("torn", "raise RuntimeError('no kernels; and more')")
    name, reason = discover().choose()
    assert name == "hostish"
    assert "(absent is unavailable: none; torn is broken: " in reason
    assert "no kernels), so hostish is used." in reason
    plugins.good("alpha")
    assert discover().choose() == ("alpha", "alpha is the one available accelerator (one card).")
    plugins.good("beta")
    name, reason = discover().choose()
    assert name == "hostish"
    assert reason == "alpha and beta are both available, so none was chosen: name one; hostish is used."


def test_there_must_be_one_host(plugins: PluginFactory, discover: Discover) -> None:
    plugins.add("bad", "raise RuntimeError('no kernels')")
    with pytest.raises(BackendError, match=r"no host backend is usable: bad .*no kernels"):
        discover().choose()
    plugins.good("one", accelerator=False)
    assert discover().host().name == "one"
    plugins.good("two", accelerator=False)
    with pytest.raises(BackendError, match="2 host backends are installed: one, two"):
        discover().host()


def test_a_runtime_is_opened_by_device_and_a_vendors_error_is_named(plugins: PluginFactory, discover: Discover) -> None:
    plugins.good("alpha")
    registry = discover()
    assert registry.runtime("alpha") is not registry.runtime("alpha:1")
    with pytest.raises(BackendError, match=r"backend 'alpha' \(pkg-alpha 1\.0\) cannot open alpha:7: only two cards"):
        registry.runtime("alpha:7")
    assert registry.capabilities("alpha").live


def test_devices_split_into_name_and_index() -> None:
    assert split_device("alpha") == ("alpha", 0)
    assert split_device("alpha:3") == ("alpha", 3)
    for bad in ("alpha:", "alpha:x", "alpha:-1"):
        with pytest.raises(BackendError, match="malformed"):
            split_device(bad)


def test_rule_folders_of_plugins_are_listed(plugins: PluginFactory, discover: Discover, tmp_path: Path) -> None:
    module = plugins.good("alpha")
    path = tmp_path / f"{module}.py"
    more = f"@hookimpl\ndef ktcore_rule_paths():\n    return [{str(tmp_path)!r}]\n"
    path.write_text(path.read_text() + more)
    assert discover().rule_paths() == (tmp_path,)


def test_registries_share_nothing(plugins: PluginFactory, discover: Discover) -> None:
    plugins.good("alpha")
    one, two = discover(), discover()
    record = one.get("alpha")
    assert record is not None
    record.fail(BackendState.BROKEN, "only here")
    assert state(two, "alpha")[0] is BackendState.LOADED
