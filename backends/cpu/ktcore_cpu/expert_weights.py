"""Fills a bank of packed experts from any source, one expert at a time, so that no layer is in memory twice."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from ktcore_cpu import _native, expert_arrays
from ktcore_cpu.expert_layout import ROLES, Expert, Layout, block_bytes

Progress = Callable[[int, int], None]
"""Called with the experts packed so far and all of them."""


def fill(layout: Layout, source: Iterable[Expert], pool: _native.Pool, loss: Any, progress: Progress | bool) -> Any:
    """A bank with every expert of `source` packed.

    Raises:
        TypeError, ValueError: an expert does not fit the layout, or there are too few or too many.
    """
    bank = _native.ExpertBank(layout.experts, layout.hidden, layout.intermediate, *layout.formats)
    count = 0
    with _reporter(progress) as report:
        for expert in source:
            if count == layout.experts:
                raise ValueError(f"the source holds more than {layout.experts} experts")
            bank.pack(pool, count, *_parts(layout, expert, count, loss))
            del expert  # before the next one is made
            count += 1
            report(count, layout.experts)
    if count < layout.experts:
        raise ValueError(f"the source ended after {count} of {layout.experts} experts")
    return bank


def _parts(layout: Layout, expert: Expert, index: int, loss: Any) -> Iterator[expert_arrays.Bytes]:
    parts = tuple(expert)
    if len(parts) != 3:
        raise ValueError(f"expert {index} has {len(parts)} matrices; expected gate, up and down")
    for role, part, shape, fmt, quantize in zip(
        ROLES, parts, layout.shapes(), layout.formats, layout.quantize, strict=True
    ):
        what = f"{role} of expert {index}"
        if layout.blocks:
            yield _blocks(part, fmt, shape, what)
            continue
        found = expert_arrays.shape_of(part)
        if found != shape:
            raise ValueError(f"{what} must be {list(shape)}, not {list(found)}")
        if quantize:
            yield expert_arrays.quantized(part, fmt, loss, what)
            continue
        stored = expert_arrays.stored_format(part, what)
        if stored != fmt:
            raise TypeError(f"{what} is {stored}, but the layer holds {fmt}")
        yield expert_arrays.stored_bytes(part, what)


def _blocks(part: Any, fmt: str, shape: tuple[int, int], what: str) -> expert_arrays.Bytes:
    raw = expert_arrays.raw_bytes(part, what)
    wanted = block_bytes(fmt, shape)
    if raw.size != wanted:
        raise ValueError(f"{what} has {raw.size} bytes; {fmt} {list(shape)} takes {wanted}")
    return raw


@contextmanager
def _reporter(progress: Progress | bool) -> Iterator[Progress]:
    """`progress` itself, or for True a bar on stderr, or for False nothing."""
    if not isinstance(progress, bool):
        yield progress
        return
    if not progress:
        yield lambda done, total: None
        return
    from rich.console import Console
    from rich.progress import Progress as Bar

    with Bar(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("packing experts", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
