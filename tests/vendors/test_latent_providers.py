"""Optional packages for latent attention: called as their documents say, and for what they cover alone.

Stand-ins take the packages' places; they compute what their documents promise, by torch's own attention in float64, and
refuse what is excluded there.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="prompts run on the shared Triton kernel, interpreted")

from ktcore_cuda.flash_mla import FlashMla
from ktcore_cuda.flashinfer import FlashInferMla
from ktcore_rocm.aiter import Aiter
from ktcore_triton.tuning import Tuning

from ktcore.backend import Capabilities, LoadRequest, Supported, Unsupported
from ktcore.backend.handles import answer as judge
from ktcore.backend.host import HostRuntime
from ktcore.ops.batch import StepBatch
from ktcore.ops.kv_cache import KVCacheSpec

SPEC = KVCacheSpec("mla", 16, 1, 576, 512)
SCALE = 0.07
HOPPER = Capabilities("cuda", "H100", None, frozenset({"f16"}), {"arch": "sm_90"})
MI300 = Capabilities("rocm", "MI300X", None, frozenset({"f16"}), {"arch": "gfx942"})
ADA = Capabilities("cuda", "RTX 4090", None, frozenset({"f16"}), {"arch": "sm_89"})
PROVIDERS = [
    (FlashMla("cuda", Tuning()), HOPPER),
    (FlashInferMla("cuda", Tuning()), ADA),
    (Aiter("rocm", Tuning()), MI300),
]


def _attended(q: torch.Tensor, rows: torch.Tensor, scale: float) -> torch.Tensor:
    """q [heads, 576] over rows [context, 576] -> [heads, 512], float64."""
    q, rows = q.double()[:, None], rows.double()
    found = torch.nn.functional.scaled_dot_product_attention(
        q, rows.expand(len(q), -1, -1), rows[:, :512].expand(len(q), -1, -1), scale=scale
    )
    return found[:, 0]


def _flash_mla(calls: list[str]) -> ModuleType:
    module = ModuleType("flash_mla")
    module.__spec__ = None

    class Schedule:
        seen: tuple[int, ...] | None = None

    def metadata(*given: Any, **named: Any) -> tuple[Schedule, None]:
        calls.append("metadata")
        return Schedule(), None

    def attention(
        q: torch.Tensor,
        k_cache: torch.Tensor,
        block_table: torch.Tensor,
        cache_seqlens: torch.Tensor,
        head_dim_v: int,
        tile_scheduler_metadata: Schedule,
        num_splits: None = None,
        softmax_scale: float | None = None,
        causal: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        calls.append("attention")
        lengths = tuple(cache_seqlens.tolist())
        assert tile_scheduler_metadata.seen in (None, lengths), "a schedule serves one step's lengths"
        tile_scheduler_metadata.seen = lengths
        n, sq, heads, width = q.shape
        assert (sq, width, head_dim_v) == (1, 576, 512)
        assert k_cache.shape[1:] == (64, 1, 576), "pages of 64 tokens"
        assert q.dtype == k_cache.dtype in (torch.float16, torch.bfloat16)
        assert block_table.dtype == cache_seqlens.dtype == torch.int32
        assert 0 <= int(block_table.min()) <= int(block_table.max()) < len(k_cache)
        assert softmax_scale is not None, "the default is that of 576 values"
        assert causal
        out = []
        for i in range(n):
            rows = k_cache[block_table[i].long()].reshape(-1, 576)[: lengths[i]]
            out.append(_attended(q[i, 0], rows, softmax_scale))
        return torch.stack(out)[:, None].to(q.dtype), torch.zeros(n, heads, 1)

    module.get_mla_metadata, module.flash_mla_with_kvcache = metadata, attention  # type: ignore[attr-defined]
    return module


def _aiter(calls: list[str]) -> ModuleType:
    module = ModuleType("aiter.mla")

    def attention(
        q: torch.Tensor,
        kv_buffer: torch.Tensor,
        o: torch.Tensor,
        qo_indptr: torch.Tensor,
        kv_indptr: torch.Tensor,
        kv_indices: torch.Tensor,
        kv_last_page_lens: torch.Tensor,
        max_seqlen_q: int,
        page_size: int = 1,
        nhead_kv: int = 1,
        sm_scale: float | None = None,
        logit_cap: float = 0.0,
    ) -> None:
        calls.append("attention")
        assert page_size == 1, "more is silently wrong"
        assert kv_buffer.shape[1:] == (1, 1, 576)
        assert o.shape == (*q.shape[:2], 512)
        assert q.shape[1] in (16, 128)
        assert (max_seqlen_q, nhead_kv) == (1, 1)
        assert logit_cap <= 0
        for table in (qo_indptr, kv_indptr, kv_indices, kv_last_page_lens):
            assert table.dtype == torch.int32
        assert qo_indptr.tolist() == list(range(len(q) + 1))
        assert kv_last_page_lens.tolist() == [1] * len(q)
        assert int(kv_indptr[-1]) == len(kv_indices)
        assert sm_scale is not None
        for i in range(len(q)):
            rows = kv_buffer[kv_indices[kv_indptr[i] : kv_indptr[i + 1]].long(), 0, 0]
            o[i] = _attended(q[i], rows, sm_scale).to(o.dtype)

    module.mla_decode_fwd = attention  # type: ignore[attr-defined]
    return module


def _flashinfer(calls: list[str]) -> ModuleType:
    module = ModuleType("flashinfer.mla")

    class Wrapper:
        def __init__(self, float_workspace_buffer: torch.Tensor) -> None:
            assert float_workspace_buffer.dtype == torch.uint8
            assert not float_workspace_buffer.any()

        def plan(
            self,
            qo_indptr: torch.Tensor,
            kv_indptr: torch.Tensor,
            kv_indices: torch.Tensor,
            kv_len_arr: torch.Tensor,
            num_heads: int,
            head_dim_ckv: int,
            head_dim_kpe: int,
            page_size: int,
            causal: bool,
            sm_scale: float,
            q_data_type: torch.dtype,
            kv_data_type: torch.dtype,
        ) -> None:
            calls.append("metadata")
            for table in (qo_indptr, kv_indptr, kv_indices, kv_len_arr):
                assert table.dtype == torch.int32
            assert qo_indptr.tolist() == list(range(len(kv_len_arr) + 1))
            assert kv_indptr.diff().tolist() == [-(-n // page_size) for n in kv_len_arr.tolist()]
            assert int(kv_indptr[-1]) <= len(kv_indices)
            assert (head_dim_ckv, head_dim_kpe) == (512, 64)
            self.planned = (
                kv_indptr,
                kv_indices,
                kv_len_arr,
                num_heads,
                page_size,
                sm_scale,
                q_data_type,
                kv_data_type,
            )

        def run(
            self, q_nope: torch.Tensor, q_pe: torch.Tensor, ckv_cache: torch.Tensor, kpe_cache: torch.Tensor
        ) -> torch.Tensor:
            calls.append("attention")
            starts, pages, lengths, heads, page, scale, q_type, kv_type = self.planned
            assert q_nope.shape == (len(lengths), heads, 512)
            assert q_pe.shape == (len(lengths), heads, 64)
            assert ckv_cache.shape[1:] == (page, 512)
            assert kpe_cache.shape[1:] == (page, 64)
            assert (q_nope.dtype, q_pe.dtype) == (q_type, q_type)
            assert (ckv_cache.dtype, kpe_cache.dtype) == (kv_type, kv_type)
            assert q_type in (torch.float16, torch.bfloat16)
            out = torch.empty(q_nope.shape, dtype=q_type)
            for i, length in enumerate(lengths.tolist()):
                own = pages[starts[i] : starts[i + 1]].long()
                rows = torch.cat([ckv_cache[own], kpe_cache[own]], -1).reshape(-1, 576)[:length]
                out[i] = _attended(torch.cat([q_nope[i], q_pe[i]], -1), rows, scale).to(q_type)
            return out

    module.BatchMLAPagedAttentionWrapper = Wrapper  # type: ignore[attr-defined]
    return module


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    made: list[str] = []
    monkeypatch.setitem(sys.modules, "flash_mla", _flash_mla(made))
    monkeypatch.setitem(sys.modules, "flashinfer", ModuleType("flashinfer"))
    monkeypatch.setitem(sys.modules, "flashinfer.mla", _flashinfer(made))
    monkeypatch.setitem(sys.modules, "aiter", ModuleType("aiter"))
    monkeypatch.setitem(sys.modules, "aiter.mla", _aiter(made))
    return made


@pytest.mark.parametrize(("provider", "device"), PROVIDERS)
def test_decode_steps_go_to_the_package_and_prompts_to_the_shared_kernel(
    provider: Any, device: Capabilities, calls: list[str], host_runtime: Callable[[], HostRuntime]
) -> None:
    torch.manual_seed(0)
    caches = []
    for _ in range(2):  # two layers share what is made for a step
        cache = provider.load(LoadRequest("mla", SPEC, {}, host_runtime(), device, options={"compute": "float16"}))
        cache.allocate_pages(6, 64)
        caches.append(cache)
    lengths, pages = (70, 64, 3), torch.tensor([[4, 1], [0, -1], [5, -1]], dtype=torch.int32)
    rows = [torch.randn(length + 1, 576) for length in lengths]

    def step(spans: list[tuple[int, int]], table: torch.Tensor) -> tuple[StepBatch, torch.Tensor]:
        positions = torch.cat([torch.arange(a, b) for a, b in spans])
        starts = [0]
        for a, b in spans:
            starts.append(starts[-1] + b - a)
        ids = torch.zeros(starts[-1], dtype=torch.int64)
        new = torch.cat([r[a:b] for r, (a, b) in zip(rows, spans, strict=True)])
        return StepBatch(ids, positions, tuple(starts), tuple(b for _, b in spans), table, 64), new

    # all but the last tokens are only stored: the interpreted kernel takes its time for each that attends
    first, stored = step([(0, length - 2) for length in lengths], pages)
    prompt, new = step([(length - 2, length) for length in lengths], pages)
    q = torch.randn(prompt.tokens, 16, 576)
    for cache in caches:
        cache.append(first, stored[:, :512], stored[:, 512:])
        cache.append(prompt, new[:, :512], new[:, 512:])
    out = caches[0].attend(prompt, q, SCALE)
    ends = [length - 1 + last for length in lengths for last in (0, 1)]
    expected = torch.stack([_attended(q[i], rows[i // 2][:end], SCALE) for i, end in enumerate(ends)])
    torch.testing.assert_close(out.double(), expected, atol=4e-3, rtol=4e-3)
    assert calls == []
    table = torch.tensor([[4, 1], [0, 2], [5, -1]], dtype=torch.int32)
    decode, new = step([(length, length + 1) for length in lengths], table)
    q = torch.randn(3, 16, 576)
    for cache in caches:
        cache.append(decode, new[:, :512], new[:, 512:])
        out = cache.attend(decode, q, SCALE)
        expected = torch.stack([_attended(q[i], rows[i], SCALE) for i in range(3)])
        torch.testing.assert_close(out.double(), expected, atol=4e-3, rtol=4e-3)
    assert calls.count("attention") == 2
    assert calls.count("metadata") == (provider.package != "aiter")


@pytest.fixture
def host_runtime() -> Callable[[], HostRuntime]:
    from ktcore.backend.registry import Registry

    def opened() -> HostRuntime:
        runtime = Registry.discover().runtime("cpu:0")
        assert isinstance(runtime, HostRuntime)
        return runtime

    return opened


@pytest.mark.parametrize(("provider", "device"), PROVIDERS)
def test_what_the_documents_exclude_is_refused_with_the_reason(provider: Any, device: Capabilities) -> None:
    def answer(spec: KVCacheSpec = SPEC, **changes: Any) -> str:
        found = judge(provider, spec, Capabilities(**{**device.__dict__, **changes}))
        return found.reason if isinstance(found, Unsupported) else ""

    assert isinstance(judge(provider, SPEC, device), Supported)
    assert "latents of 512" in answer(KVCacheSpec("mla", 16, 1, 320, 256))
    assert "latents of 512" in answer(KVCacheSpec("gqa", 16, 16, 576, 512))
    assert "it runs on" in answer(properties={"arch": "sm_75"})
    assert answer(live=True) == f"the package {provider.package} is not installed"
    if provider.heads:
        assert "24 query heads: it takes 16, 128" in answer(KVCacheSpec("mla", 24, 1, 576, 512))
    if provider.page:
        assert provider.page_sizes(SPEC) == (provider.page,)
    assert not provider.capturable
