"""Pages and states of a loaded model go to the host and come back, as the prefix cache moves them."""

from __future__ import annotations

import torch

import ktcore
from ktcore.engine.prefix.transfer import Transfer


def assert_pages_move(model: ktcore.Model) -> None:
    """Exchange two pages, and two slots of states, by way of the host; both were written before."""
    transfer = Transfer(model.engine.model)
    assert transfer.obstacle == ""
    with torch.inference_mode(), model.engine.model.running():
        pages = model.engine.scheduler.pages.total - 1, 0
        before = transfer.read_pages(pages)
        assert any(bool(content.any()) for content in before)
        transfer.write_pages(pages, before[::-1])
        assert all(torch.equal(a, b) for a, b in zip(transfer.read_pages(pages[::-1]), before, strict=True))
        if transfer.state_bytes:
            first, second = (transfer.read_state(slot) for slot in (0, 1))
            transfer.write_state(0, first + 1)
            transfer.write_state(1, first)
            assert torch.equal(transfer.read_state(1), first)
            assert torch.equal(transfer.read_state(0), first + 1)
            assert len(first) == len(second) == transfer.state_bytes
