"""What every paged KV cache checks of a step before its kernels use the page numbers as addresses."""

from __future__ import annotations

from ktcore.errors import BackendError
from ktcore.ops.batch import StepBatch


def check_pages(name: str, step: StepBatch, pages: int, page_size: int) -> None:
    """That a step fits a cache of `pages` pages of `page_size` tokens.

    Args:
        name: the cache's node, for the message.

    Raises:
        BackendError: the step has pages of another size, or uses one that was not allocated.
    """
    check_page_size(name, step, page_size)
    highest = step.derived("highest page", _highest_page)
    if highest >= pages:
        raise BackendError(f"{name}: the step uses KV page {highest}, {pages} were allocated")


def check_page_size(name: str, step: StepBatch, page_size: int) -> None:
    """That a step counts its pages as the cache does.

    Raises:
        BackendError: its pages have another size.
    """
    if step.page_size != page_size:
        raise BackendError(f"{name}: the step has pages of {step.page_size} tokens, the cache of {page_size}")


def _highest_page(step: StepBatch) -> int:
    return int(step.block_table.max()) if step.block_table.numel() else -1
