"""Latent attention of decode steps by AITER, where that package is installed.

Contract: `aiter.mla.mla_decode_fwd` of ROCm/aiter at e4048607. Its kernels for 16-bit caches are right with pages of
one token only (ROCm/aiter#2996, #3095), so it is given the cache's rows as pages, and each token's row as the page's
number: the cache itself keeps the pages that the engine has.
"""

from __future__ import annotations

import importlib

import torch
from ktcore_triton.operators.provided import LATENT, ROPE, ProvidedLatentCache

from ktcore.backend.mirror import mirrored
from ktcore.backend.runtime import DeviceRuntime
from ktcore.ops.batch import StepBatch
from ktcore.ops.kv_cache import sequence_slots


class Aiter(ProvidedLatentCache):
    """`rocm.aiter_mla`, for rules that ask for it: 16 heads, or 128, for which CDNA3 and CDNA4 have kernels."""

    package = "aiter"
    name = "aiter_mla"
    chips = ("gfx942", "gfx950")
    heads = (16, 128)

    def decode(
        self, runtime: DeviceRuntime, step: StepBatch, q: torch.Tensor, rows: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """One call for all sequences; it writes its result in place."""
        library = importlib.import_module("aiter.mla")
        out = torch.empty(*q.shape[:2], LATENT, dtype=q.dtype, device=q.device)
        library.mla_decode_fwd(
            q,
            rows.view(-1, 1, 1, LATENT + ROPE),
            out,
            mirrored(runtime, step, "q_start", lambda s: torch.tensor(s.q_start, dtype=torch.int32)),
            mirrored(runtime, step, "aiter.kv_indptr", _starts),
            mirrored(runtime, step, "aiter.kv_indices", _rows),
            mirrored(runtime, step, "aiter.last", lambda s: torch.ones(s.sequences, dtype=torch.int32)),
            1,
            page_size=1,
            nhead_kv=1,
            sm_scale=scale,
        )
        return out


def _starts(step: StepBatch) -> torch.Tensor:
    return torch.tensor((0, *step.context_lens)).cumsum(0).int()


def _rows(step: StepBatch) -> torch.Tensor:
    return torch.cat([slots for _, slots in sequence_slots(step)]).int()
