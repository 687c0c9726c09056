"""The shim's C functions as Python methods; errors of the SYCL runtime become `BackendError`."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path

from ktcore.errors import BackendError

Value = int | float | None
ROOM = 1 << 16


class _Payload(ctypes.Union):
    _fields_ = (("pointer", ctypes.c_void_p), ("integer", ctypes.c_int32), ("real", ctypes.c_float))


class Argument(ctypes.Structure):
    """One kernel argument: kind 0 a pointer, 1 an int32, 2 a float."""

    _anonymous_ = ("payload",)
    _fields_ = (("kind", ctypes.c_int64), ("payload", _Payload))


class Pointer(int):
    """An address, told from an int32 argument by its type."""


def arguments(values: Sequence[Value]) -> ctypes.Array[Argument]:
    """As the shim takes them. `Pointer` and None (a null pointer) are addresses, int is int32, float is float32."""
    made = (Argument * len(values))()
    for slot, value in zip(made, values, strict=True):
        if value is None or isinstance(value, Pointer):
            slot.kind, slot.pointer = 0, value
        elif isinstance(value, int):
            slot.kind, slot.integer = 1, value
        else:
            slot.kind, slot.real = 2, value
    return made


class Shim:
    """The loaded library. Handles are plain addresses of what lives as long as the process.

    Raises:
        BackendError: it does not load.
    """

    def __init__(self, path: Path) -> None:
        try:
            self._library = ctypes.CDLL(str(path))
        except OSError as error:
            raise BackendError(f"the SYCL shim does not load: {error}") from error

    def new_queue(self, kind: str) -> int:
        """A queue in order on the first device of `kind`, "cpu" or "gpu"."""
        return self._made(f"no SYCL {kind} device", "kt_sycl_queue_new", kind.encode())

    def describe(self, queue: int) -> dict[str, str]:
        """Facts of the queue's device: name, kind, widths, local, units, f16, dpas, in_order."""
        text = ctypes.create_string_buffer(ROOM)
        failed = self._library.kt_sycl_describe(ctypes.c_void_p(queue), text, ctypes.c_size_t(ROOM))
        self._check(failed, "the device cannot be described", text)
        return dict(line.split("=", 1) for line in text.value.decode().splitlines())

    def compile(self, queue: int, source: str, option: str = "") -> int:
        """A bundle of kernels from source, for the queue's context."""
        what = (ctypes.c_void_p(queue), source.encode(), option.encode(), 0)
        return self._made("SYCL source does not compile", "kt_sycl_compile", *what)

    def check_source(self, queue: int, source: str, option: str = "") -> None:
        """Compile to SPIR-V alone: for kernels that the queue's device could not run."""
        what = (ctypes.c_void_p(queue), source.encode(), option.encode(), 1)
        self._made("SYCL source does not compile", "kt_sycl_compile", *what)

    def kernel(self, bundle: int, name: str) -> int:
        """A kernel of a bundle; it lives as long as that."""
        return self._made(f"no kernel {name}", "kt_sycl_kernel", ctypes.c_void_p(bundle), name.encode())

    def launch(
        self, queue: int, kernel: int, groups: tuple[int, int, int], width: int, values: ctypes.Array[Argument]
    ) -> None:
        """Put a kernel on the queue over `groups` work-groups of `width` work-items; it does not wait."""
        error = ctypes.create_string_buffer(1024)
        failed = self._library.kt_sycl_launch(
            ctypes.c_void_p(queue),
            ctypes.c_void_p(kernel),
            (ctypes.c_int64 * 3)(*groups),
            ctypes.c_int64(width),
            values,
            ctypes.c_int32(len(values)),
            error,
            ctypes.c_size_t(1024),
        )
        self._check(failed, "a kernel cannot be launched", error)

    def host(self, queue: int, function: int, data: int) -> None:
        """Put a call of a C function `void (*)(void *)` on the queue, by a host_task."""
        error = ctypes.create_string_buffer(1024)
        what = (ctypes.c_void_p(queue), ctypes.c_void_p(function), ctypes.c_void_p(data))
        failed = self._library.kt_sycl_host(*what, error, ctypes.c_size_t(1024))
        self._check(failed, "a host call cannot be queued", error)

    def wait(self, queue: int) -> None:
        """Wait until all work of the queue is done."""
        error = ctypes.create_string_buffer(1024)
        failed = self._library.kt_sycl_wait(ctypes.c_void_p(queue), error, ctypes.c_size_t(1024))
        self._check(failed, "work on the device failed", error)

    def _made(self, problem: str, name: str, *before: object) -> int:
        handle, error = ctypes.c_void_p(), ctypes.create_string_buffer(ROOM)
        failed = getattr(self._library, name)(*before, ctypes.byref(handle), error, ctypes.c_size_t(ROOM))
        self._check(failed, problem, error)
        return handle.value or 0

    @staticmethod
    def _check(failed: int, problem: str, text: ctypes.Array[ctypes.c_char]) -> None:
        if failed:
            raise BackendError(f"{problem}: {text.value.decode(errors='replace').strip()}")
