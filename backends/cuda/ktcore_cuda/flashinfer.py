"""Latent attention of decode steps by FlashInfer, where that package is installed.

Contract: `BatchMLAPagedAttentionWrapper` of flashinfer-ai/flashinfer (flashinfer/mla.py; docs.flashinfer.ai, "MLA Page
Layout"): made with a workspace on the device, planned once a step with tables of the step's pages, run once a layer.
Latents and rotary keys are two arguments, and may be slices of one cache: strides are theirs to have.
"""

from __future__ import annotations

import importlib
from itertools import accumulate
from typing import Any

import torch
from ktcore_triton.operators.provided import LATENT, ROPE, ProvidedLatentCache
from ktcore_triton.tuning import Tuned

from ktcore.backend.runtime import DeviceRuntime
from ktcore.ops.batch import StepBatch

Shape = tuple[torch.device, int, float, torch.dtype]
WORKSPACE = 128 << 20
"""Bytes for partial results, as FlashInfer recommends; layers alike share them."""


class FlashInferMla(ProvidedLatentCache):
    """`cuda.flashinfer_mla`, for rules that ask for it."""

    package = "flashinfer"
    name = "flashinfer_mla"
    chips = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_120")

    def __init__(self, backend: str, tuning: Tuned) -> None:
        super().__init__(backend, tuning)
        self._wrappers: dict[Shape, Any] = {}

    def decode(
        self, runtime: DeviceRuntime, step: StepBatch, q: torch.Tensor, rows: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """One call for all sequences; its plan is made once a step, and shared by layers of one scale."""
        shape = (runtime.device, q.shape[1], scale, q.dtype)
        wrapper = step.derived(f"flashinfer.plan.{shape}", lambda s: _planned(self._wrapper(shape), s, *shape[1:]))
        pages = rows.view(-1, step.page_size, LATENT + ROPE)
        out: torch.Tensor = wrapper.run(q[..., :LATENT], q[..., LATENT:], pages[..., :LATENT], pages[..., LATENT:])
        return out

    def _wrapper(self, shape: Shape) -> Any:
        if shape not in self._wrappers:
            workspace = torch.zeros(WORKSPACE, dtype=torch.uint8, device=shape[0])
            library = importlib.import_module(f"{self.package}.mla")
            self._wrappers[shape] = library.BatchMLAPagedAttentionWrapper(workspace)
        return self._wrappers[shape]


def _planned(wrapper: Any, step: StepBatch, heads: int, scale: float, dtype: torch.dtype) -> Any:
    """Tables on the host: the wrapper wants them there, and copies what its kernels read."""
    used = [-(-length // step.page_size) for length in step.context_lens]
    wrapper.plan(
        torch.arange(step.sequences + 1, dtype=torch.int32),
        torch.tensor(list(accumulate(used, initial=0)), dtype=torch.int32),
        torch.cat([step.block_table[i, :count] for i, count in enumerate(used)]),
        torch.tensor(step.context_lens, dtype=torch.int32),
        heads,
        LATENT,
        ROPE,
        step.page_size,
        False,  # one query a sequence sees all of it
        scale,
        dtype,
        dtype,
    )
    return wrapper
