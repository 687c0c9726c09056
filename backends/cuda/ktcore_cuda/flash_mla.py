"""Latent attention of decode steps by FlashMLA, where that package is installed.

Contract: `flash_mla_with_kvcache` and `get_mla_metadata` of deepseek-ai/FlashMLA (flash_mla/flash_mla_interface.py and
csrc/api/dense_decode.h at 9241ae3e): sm_90a alone, pages of 64 tokens, query and cache of one 16-bit type.
"""

from __future__ import annotations

import importlib

import torch
from ktcore_triton.operators.provided import LATENT, ROPE, ProvidedLatentCache

from ktcore.backend.mirror import mirrored
from ktcore.backend.runtime import DeviceRuntime
from ktcore.ops.batch import StepBatch


class FlashMla(ProvidedLatentCache):
    """`cuda.flash_mla`, for rules that ask for it."""

    package = name = "flash_mla"
    chips = ("sm_90",)
    page = 64

    def decode(
        self, runtime: DeviceRuntime, step: StepBatch, q: torch.Tensor, rows: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """One call for all sequences; its schedule is made once a step, and shared by the layers."""
        library = importlib.import_module(self.package)
        schedule = step.derived("flash_mla.schedule", lambda s: library.get_mla_metadata()[0])
        out, _ = library.flash_mla_with_kvcache(
            q.unsqueeze(1),
            rows.view(-1, step.page_size, 1, LATENT + ROPE),
            # where there is no page any will do: lengths say what is read
            mirrored(runtime, step, "flash_mla.pages", lambda s: s.block_table.clamp(min=0)),
            mirrored(runtime, step, "context_lens", lambda s: torch.tensor(s.context_lens, dtype=torch.int32)),
            LATENT,
            schedule,
            softmax_scale=scale,
            causal=True,
        )
        made: torch.Tensor = out
        return made.squeeze(1)
