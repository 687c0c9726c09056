"""All backends that plugins brought, each with its state; an ordinary object, one an engine, shared by nobody.

Discovery imports the plugins' light modules only. A backend is probed when its state is asked for, and its real code
(`BackendSpec.entry`) is imported when its implementations or its runtime are.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from importlib import import_module
from pathlib import Path

from ktcore.backend.absent import absence_hint
from ktcore.backend.capabilities import Capabilities
from ktcore.backend.discovery import Found, find_plugins
from ktcore.backend.implementation import Implementation
from ktcore.backend.record import BackendRecord, BackendState, broken
from ktcore.backend.runtime import DeviceRuntime
from ktcore.backend.spec import Backend
from ktcore.errors import BackendError

__all__ = ["BackendRecord", "BackendState", "Registry", "split_device"]


class Registry:
    """Backends by name.

    Args:
        found: what plugins gave, in order; of two backends with one name the second is BROKEN.
    """

    def __init__(self, found: Iterable[Found] = ()) -> None:
        self._records: dict[str, BackendRecord] = {}
        self._duplicates: list[BackendRecord] = []
        self._rule_paths: list[Path] = []
        self._objects: dict[str, Backend] = {}
        self._implementations: dict[str, Implementation] | None = None
        for plugin in found:
            self._rule_paths += plugin.rule_paths
            for record in plugin.records:
                self._add(record)

    @classmethod
    def discover(cls, plugins: Sequence[str] | None = None) -> Registry:
        """The installed plugins.

        Args:
            plugins: names of the only ones to load; None takes those of the variable KTCORE_PLUGINS, or all.

        Raises:
            BackendError: one of the named plugins is not installed.
        """
        return cls(find_plugins(plugins))

    def records(self) -> tuple[BackendRecord, ...]:
        """All backends in the order they were found, the failed ones too."""
        return (*self._records.values(), *self._duplicates)

    def get(self, name: str) -> BackendRecord | None:
        """The backend of that name, None when there is none."""
        return self._records.get(name)

    def known(self, name: str) -> BackendRecord:
        """The backend of that name if plans can be made for it; it may be unavailable here.

        Raises:
            BackendError: unknown (names the known ones and their states), incompatible or broken (its own reason).
        """
        record = self._records.get(name)
        if record is None:
            known = ", ".join(f"{r.name} ({r.state.value})" for r in self.records())
            hint = absence_hint(name, [r.name for r in self.records()])
            raise BackendError(
                f"backend '{name}' is unknown", f"known: {known or 'none; no plugin is installed'}; {hint}"
            )
        if not record.usable:
            raise _error(record)
        return record

    def require(self, name: str) -> BackendRecord:
        """The backend of that name, able to run here.

        Raises:
            BackendError: as `known`, and when it is unavailable, with its own reason.
        """
        record = self.known(name)
        if record.state is not BackendState.LOADED:
            raise _error(record)
        return record

    def backend_object(self, name: str) -> Backend:
        """The object behind the backend's entry, imported at the first call.

        Raises:
            BackendError: as `known`; or the entry does not import, which makes the backend BROKEN.
        """
        record = self.known(name)
        if name not in self._objects:
            assert record.spec is not None
            try:
                module, attribute = record.spec.entry.split(":")
                made = getattr(import_module(module), attribute)()
                if not isinstance(made, Backend):
                    raise TypeError(f"{record.spec.entry} gave a {type(made).__name__} instead of a Backend")
            except KeyboardInterrupt:
                raise
            except BaseException as error:
                record._verdict = broken(error, f"its entry {record.spec.entry} does not load")
                raise _error(record) from error
            self._objects[name] = made
        return self._objects[name]

    def implementations(self) -> Mapping[str, Implementation]:
        """Implementations by id: the references, and those of every backend that is neither broken nor incompatible.

        A backend that fails here becomes BROKEN and adds nothing; `implementations` itself does not raise for it.
        """
        if self._implementations is None:
            from ktcore.backend.reference import reference_implementations

            found = {item.id: item for item in reference_implementations()}
            for record in self._records.values():
                if record.usable:
                    found.update(self._implementations_of(record, found))
            self._implementations = found
        return self._implementations

    def capabilities(self, device: str) -> Capabilities:
        """What a device can do: read from it where its accelerator backend is available, else as declared.

        Raises:
            BackendError: the backend is unknown, broken or incompatible, or an available device does not open.
        """
        name, _ = split_device(device)
        record = self.known(name)
        assert record.spec is not None
        if record.accelerator and record.state is BackendState.LOADED:
            runtime = self.runtime(device)
            try:
                return runtime.capabilities()
            finally:
                runtime.close()
        return record.spec.declared[0]

    def runtime(self, device: str, threads: int | None = None) -> DeviceRuntime:
        """Open a device, "name" or "name:index". Every call opens it anew; the caller closes it.

        Raises:
            BackendError: the backend cannot run here, with its own reason.
        """
        name, index = split_device(device)
        record = self.require(name)
        backend = self.backend_object(name)
        try:
            return backend.runtime(index, threads)
        except BackendError:
            raise
        except Exception as error:
            raise BackendError(f"backend '{name}' ({record.distribution}) cannot open {device}: {error}") from error

    def accelerators(self) -> tuple[BackendRecord, ...]:
        """All accelerator backends, in any state."""
        return tuple(r for r in self.records() if r.accelerator)

    def host(self) -> BackendRecord:
        """The one host backend.

        Raises:
            BackendError: there is none, or more than one.
        """
        hosts = [r for r in self._records.values() if not r.accelerator and r.usable]
        if len(hosts) == 1:
            return hosts[0]
        if hosts:
            raise BackendError(
                f"{len(hosts)} host backends are installed: {', '.join(r.name for r in hosts)}",
                "remove one, or limit what loads with the variable KTCORE_PLUGINS",
            )
        states = "; ".join(f"{r.name} ({r.distribution}): {r.reason}" for r in self.records() if not r.usable)
        raise BackendError("no host backend is usable" + (f": {states}" if states else ""), "reinstall ktcore")

    def choose(self, name: str = "auto") -> tuple[str, str]:
        """The backend to use and a sentence that says why; "auto" takes an accelerator only when there is no doubt.

        Raises:
            BackendError: `name` is unknown, broken or incompatible, or there is no usable backend at all. One that is
                merely unavailable is returned: a plan can be made for it, and opening it raises its reason.
        """
        if name != "auto":
            base, _ = split_device(name)
            self.known(base)
            return name, f"{name} was asked for."
        real = [r for r in self.accelerators() if r.spec is not None and not r.spec.simulated]
        found = [r for r in real if r.state is BackendState.LOADED]
        trusted = [r for r in found if r.spec is not None and not r.spec.experimental]
        if len(trusted) == 1:
            return trusted[0].name, f"{trusted[0].name} is the one available accelerator ({trusted[0].reason})."
        host = self.host()
        if trusted:
            names = " and ".join(r.name for r in trusted)
            return host.name, f"{names} are both available, so none was chosen: name one; {host.name} is used."
        if found:
            names = " and ".join(r.name for r in found)
            return host.name, f"{names} is marked experimental and taken only when it is named, so {host.name} is used."
        absent = [r for r in self.accelerators() if r not in found and not (r.spec is not None and r.spec.simulated)]
        why = "; ".join(f"{r.name} is {r.state.value}: {r.reason.partition(';')[0]}" for r in absent)
        return host.name, f"No accelerator is available{f' ({why})' if why else ''}, so {host.name} is used."

    def rule_paths(self) -> tuple[Path, ...]:
        """Folders with rule files that plugins bring."""
        return tuple(self._rule_paths)

    def _add(self, record: BackendRecord) -> None:
        first = self._records.get(record.name)
        if first is None:
            self._records[record.name] = record
            return
        # a name that only a failed plugin claims is free for one that works
        if first.spec is None and record.spec is not None:
            self._records[record.name], record = record, first
        elif record.spec is not None:
            record.fail(
                BackendState.BROKEN,
                f"the name '{record.name}' is taken: both {first.distribution} and {record.distribution} register it",
            )
        self._duplicates.append(record)

    def _implementations_of(
        self, record: BackendRecord, taken: Mapping[str, Implementation]
    ) -> dict[str, Implementation]:
        found: dict[str, Implementation] = {}
        try:
            for item in self.backend_object(record.name).implementations():
                if not item.id.startswith(f"{record.name}."):
                    raise ValueError(f"implementation id {item.id!r} does not start with '{record.name}.'")
                if item.id in found or item.id in taken:
                    raise ValueError(f"implementation id {item.id!r} is given twice")
                if record.older_api:
                    item.handles = frozenset()
                found[item.id] = item
        except KeyboardInterrupt:
            raise
        except BackendError:
            return {}
        except BaseException as error:
            record._verdict = broken(error, "its implementations do not load")
            return {}
        return found


def split_device(device: str) -> tuple[str, int]:
    """("name", index) of "name" or "name:index".

    Raises:
        BackendError: the index is not a number.
    """
    name, colon, index = device.partition(":")
    if colon and not index.isdecimal():
        raise BackendError(f"device '{device}' is malformed", "write a backend's name, or name:0, name:1 …")
    return name, int(index or 0)


def _error(record: BackendRecord) -> BackendError:
    verdict = record.verdict
    hint = f"it needs: {record.spec.requirements}" if record.spec is not None else None
    return BackendError(
        f"backend '{record.name}' ({record.distribution}) is {verdict.state.value}: {verdict.reason}", hint
    )
