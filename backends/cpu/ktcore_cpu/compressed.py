"""Attention over a window and compressed entries: native projections, and attention over rows named token by token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from ktcore.backend import Capabilities, LoadRequest, Supported, Unsupported
from ktcore.backend.compressed import COMPRESSED
from ktcore.backend.handles import FREQUENCIES, nested
from ktcore.backend.open_windows import OpenWindows, closings, page_entries
from ktcore.backend.pages import check_pages
from ktcore.errors import BackendError
from ktcore.ops.batch import StepBatch
from ktcore.ops.compressed import CompressedAttentionSpec, EntryCacheSpec
from ktcore.ops.norm import RMSNormSpec, rms_norm
from ktcore.ops.rope import RopeSpec, inverse_frequencies, rope
from ktcore_cpu import packing
from ktcore_cpu.attention import DEFAULT_KV_TYPE, empty_rows, kv_dtype, native_step, row_bytes
from ktcore_cpu.packings import Packs

FLOAT_BYTES = 4
PAGE_SIZES = (64, 32, 128, 256, 16)
CPU = torch.device("cpu")


class CpuCompressedAttention(Packs):
    """A token's keys are rows of one memory: its window's, and the entries that were chosen for it. No result depends
    on the other tokens of a step.

    Options: `activations` and `kv_dtype`, as of cpu.attention.
    """

    id = "cpu.compressed_attention"
    spec_type = CompressedAttentionSpec
    handles = (
        COMPRESSED
        | {"entries.overlap", "entries.chosen", "indexer.entries.overlap", "indexer.entries.top_k"}
        | {f"{norm}.offset" for norm in ("norm", "q_a_norm", "kv_norm", "pool_norm", "indexer.pool_norm")}
        | nested("rope", FREQUENCIES)
        | nested("indexer.rope", FREQUENCIES)
    )
    fused = True
    options = packing.OPTIONS | {"kv_dtype"}

    def supports(self, spec: CompressedAttentionSpec, device: Capabilities) -> Supported | Unsupported:
        """Every native weight format; heads up to 1024 wide; a choice among entries of whole pages."""
        indexer = spec.indexer
        if max(spec.head_dim, indexer.head_dim if indexer else 0) > 1024:
            return Unsupported("heads wider than 1024")
        if indexer and not all(size % indexer.entries.ratio == 0 for size in self.page_sizes(spec)):
            return Unsupported(f"a choice among entries of {indexer.entries.ratio} tokens")
        return packing.supports_formats(spec)

    def page_sizes(self, spec: CompressedAttentionSpec) -> tuple[int, ...]:
        """Those that windows fit."""
        return spec.entries.pages(PAGE_SIZES) if spec.entries else PAGE_SIZES

    def cache_bytes_per_token(self, spec: CompressedAttentionSpec) -> int:
        """In the default type."""
        return self.cache_bytes(spec, {})

    def cache_bytes(self, spec: CompressedAttentionSpec, options: Mapping[str, Any]) -> int:
        """In the type that option `kv_dtype` names."""
        kind = options.get("kv_dtype", DEFAULT_KV_TYPE)
        caches = [c for c in (spec.entries, spec.indexer.entries if spec.indexer else None) if c]
        return sum(-(-row_bytes(kind, c.dim) // min(c.ratio, PAGE_SIZES[0])) for c in caches)

    def state_bytes(self, spec: CompressedAttentionSpec) -> int:
        """The window's keys in the default type, open windows as float32."""
        caches = [c for c in (spec.entries, spec.indexer.entries if spec.indexer else None) if c]
        ring = spec.window.window * row_bytes(DEFAULT_KV_TYPE, spec.head_dim)
        return ring + FLOAT_BYTES * sum(c.values for c in caches)

    def load(self, request: LoadRequest) -> CpuCompressedAttentionModule:
        """Pack the projections, that of the output group by group."""
        return CpuCompressedAttentionModule(request)


class CpuCompressedAttentionModule:
    """x float32 [T, hidden], step -> float32 [T, hidden]; owns the layer's keys, entries and open windows."""

    def __init__(self, request: LoadRequest) -> None:
        from ktcore_cpu import _native

        spec: CompressedAttentionSpec = request.spec  # type: ignore[assignment]
        self._spec, self._name = spec, request.name
        self._type = kv_dtype(request)
        self._pool = request.runtime.pool  # type: ignore[attr-defined]
        self._staged = _native.STAGED_ROWS
        self._slots = self._pages = self._page_size = 0
        self._rows = torch.empty(0)
        self._held = torch.empty(0, dtype=torch.int64)
        self._q_a, self._q_b, self._kv, self._o_b = (_Linear(request, r) for r in ("q_a", "q_b", "kv", "o_b"))
        self._o_a = _groups(request, spec)
        self._norm = _Norm(request, "norm", spec.norm) if spec.norm else None
        self._q_a_norm = _Norm(request, "q_a_norm", spec.q_a_norm)
        self._kv_norm = _Norm(request, "kv_norm", spec.kv_norm)
        self._turn = _Rope(request, "rope", spec.rope)
        self._entries = _Pool(request, "", spec.entries, spec.pool_norm, self._turn) if spec.entries else None
        self._indexer = _Indexer(request, spec) if spec.indexer else None
        self._attention = _native.EntryAttention(
            self._pool,
            heads=spec.heads,
            dim=spec.head_dim,
            window=spec.window.window,
            ratio=spec.entries.ratio if spec.entries else 0,
            scale=spec.scale,
            sinks=request.weights["sinks"].tensor().numpy(),
        )

    def allocate_pages(self, pages: int, page_size: int) -> None:
        """Make room for entries; those before are gone, states are not."""
        if self._entries and page_size not in self._entries.spec.pages((page_size,)):
            raise BackendError(f"{self._name}: windows of {self._entries.spec.ratio} tokens do not fit such pages")
        rings = self._rings.clone() if self._slots else None
        self._pages, self._page_size = pages, page_size
        self._allocate()
        if rings is not None:
            self._rings.copy_(rings)
        if self._indexer:
            self._indexer.allocate_pages(pages, page_size)

    def allocate_states(self, slots: int) -> None:
        """Make room for `slots` sequences; earlier states are gone, pages are not."""
        kept = self._kept.clone() if self._pages else None
        self._slots = slots
        self._allocate()
        if kept is not None:
            self._kept.copy_(kept)
        self._held = torch.full((slots,), -1)
        for pool in self._pools():
            pool.open.allocate_states(slots)

    def page_tensors(self) -> tuple[torch.Tensor, ...]:
        """The entries, and those that the choice is made among."""
        if self._entries is None:
            return ()
        own = self._kept.view(self._pages, -1)
        return (own, self._indexer.keys) if self._indexer else (own,)

    def state_tensors(self) -> tuple[torch.Tensor, ...]:
        """How many tokens slots hold, the window's keys, and open windows."""
        more = [tensor for pool in self._pools() for tensor in pool.open.state_tensors()]
        return (self._held, self._rings.view(self._slots, -1), *more)

    def copy_states(self, source: Sequence[int], target: Sequence[int]) -> None:
        """Copy slots `source` to slots `target`, pair by pair."""
        rings = self._rings.view(self._slots, -1)
        for a, b in zip(source, target, strict=True):
            rings[b], self._held[b] = rings[a], self._held[a]
        for pool in self._pools():
            pool.open.copy_states(source, target)

    def __call__(self, x: torch.Tensor, step: StepBatch) -> torch.Tensor:
        spec, tokens = self._spec, x.shape[0]
        x = packing.rows(x, spec.hidden)
        self._check(step)
        n = self._norm(x) if self._norm else x
        low = self._q_a_norm(self._q_a(n))
        q = rms_norm(self._q_b(low).view(tokens, spec.heads, spec.head_dim), None, spec.q_eps)
        self._turn(q, step)
        k = self._kv_norm(self._kv(n))
        self._turn(k[:, None], step)
        chosen, top_k = 0, 0
        if self._entries:
            check_pages(self._name, step, self._pages, self._page_size)
            self._store(self._entries, n, step)
            if self._indexer:
                named = self._indexer(n, low, step)
                chosen, top_k = named.data_ptr(), named.shape[1]
        out = torch.empty_like(q)
        self._attention.forward(
            native_step(step),
            step.state_slots,
            q.data_ptr(),
            k.data_ptr(),
            out.data_ptr(),
            self._rows.data_ptr(),
            self._slots,
            self._pages,
            step.page_size,
            self._type,
            chosen,
            top_k,
        )
        for slot, length in zip(step.state_slots, step.context_lens, strict=True):
            self._held[slot] = length
        self._turn(out, step, back=True)
        y = self._o_b(self._o_a(out.view(tokens, spec.groups, -1)))
        return x + y if spec.residual else y

    def _store(self, pool: _Pool, n: torch.Tensor, step: StepBatch) -> None:
        made = pool(n, step)
        first = self._staged + self._slots * self._spec.window.window
        pool.write(made, closings(step, pool.spec.ratio).places + first, self._rows, self._type)

    def _pools(self) -> list[_Pool]:
        return [pool for pool in (self._entries, self._indexer.pool if self._indexer else None) if pool]

    @property
    def _rings(self) -> torch.Tensor:
        return self._rows[self._staged : self._staged + self._slots * self._spec.window.window]

    @property
    def _kept(self) -> torch.Tensor:
        return self._rows[self._staged + self._slots * self._spec.window.window :]

    def _allocate(self) -> None:
        """One memory for keys that are staged, rings and entries."""
        own = self._pages * page_entries(self._page_size, self._entries.spec.ratio) if self._entries else 0
        count = self._staged + self._slots * self._spec.window.window + own
        self._rows = empty_rows((count,), self._spec.head_dim, self._type)

    def _check(self, step: StepBatch) -> None:
        """A slot that holds the keys of other tokens would give wrong tokens silently."""
        if len(step.state_slots) != step.sequences:
            raise BackendError(f"{self._name}: {step.sequences} sequences have {len(step.state_slots)} state slots")
        for i, slot in enumerate(step.state_slots):
            before = step.context_lens[i] - (step.q_start[i + 1] - step.q_start[i])
            if not 0 <= slot < self._slots:
                raise BackendError(f"{self._name}: the step uses state slot {slot}, {self._slots} were allocated")
            if before and int(self._held[slot]) != before:
                held = int(self._held[slot])
                raise BackendError(
                    f"{self._name}: slot {slot} holds the state after {held} tokens, {before} are needed"
                )


class _Linear:
    def __init__(self, request: LoadRequest, role: str) -> None:
        from ktcore_cpu import _native

        self._call, self._pool = _native.linear, request.runtime.pool  # type: ignore[attr-defined]
        self._weight = packing.pack(request, f"{role}.weight")
        self._bias = packing.vector(request.weights, f"{role}.bias")
        self._exact = packing.exact(request)
        self._out = request.weights[f"{role}.weight"].shape[0]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        out = torch.empty(x.shape[0], self._out)
        bias = 0 if self._bias is None else self._bias.ctypes.data
        self._call(self._pool, self._weight, x.data_ptr(), out.data_ptr(), x.shape[0], bias, self._exact)
        return out


def _groups(request: LoadRequest, spec: CompressedAttentionSpec) -> Any:
    """float32 [T, groups, width] -> [T, groups * rank]: each group through its own rows of o_a."""
    from ktcore_cpu import _native

    weight = request.weights["o_a"]
    width = spec.heads // spec.groups * spec.head_dim
    raw = weight.raw().reshape(spec.groups, spec.o_rank, -1)
    packed = []
    for g in range(spec.groups):
        rows = partial(np.ascontiguousarray, raw[g])
        what = f"o_a, group {g}"
        packed.append(packing.pack_matrix(request, what, weight.format, spec.o_rank, width, weight, rows))
    pool, exact = request.runtime.pool, packing.exact(request)  # type: ignore[attr-defined]

    def run(x: torch.Tensor) -> torch.Tensor:
        by_group = x.transpose(0, 1).contiguous()
        out = torch.empty(spec.groups, x.shape[0], spec.o_rank)
        for part, to, matrix in zip(by_group, out, packed, strict=True):
            _native.linear(pool, matrix, part.data_ptr(), to.data_ptr(), x.shape[0], 0, exact)
        return out.transpose(0, 1).reshape(x.shape[0], -1)

    return run


class _Norm:
    def __init__(self, request: LoadRequest, role: str, spec: RMSNormSpec) -> None:
        factors = packing.norm_weight(request.weights, f"{role}.weight", spec)
        assert factors is not None
        self._weight, self._eps = torch.from_numpy(factors), spec.eps

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self._weight, self._eps)


class _Rope:
    """Turns the last values of heads in place."""

    def __init__(self, request: LoadRequest, role: str, spec: RopeSpec) -> None:
        divisors = request.weights[f"{role}.freq_factors"].tensor() if spec.freq_factors else None
        self._freq, self._factor = inverse_frequencies(spec, divisors)
        self._spec = spec

    def __call__(self, x: torch.Tensor, step: StepBatch, back: bool = False) -> None:
        self.at(x, -step.positions if back else step.positions)

    def at(self, x: torch.Tensor, positions: torch.Tensor) -> None:
        """x [T, heads, d], positions [T]."""
        part = x[..., x.shape[-1] - self._spec.dim :]
        part.copy_(rope(part, positions, self._freq, self._factor, self._spec.pairing))


class _Pool:
    """Makes entries of what closes in a step.

    Args:
        prefix: of the parts' roles.
    """

    def __init__(
        self, request: LoadRequest, prefix: str, spec: EntryCacheSpec, norm: RMSNormSpec | None, turn: _Rope
    ) -> None:
        assert norm is not None, "entries have a norm"
        self.spec, self._turn = spec, turn
        self.open = OpenWindows(request.name, spec, CPU)
        self._values, self._gates = (_Linear(request, f"{prefix}pool_{part}") for part in ("values", "gates"))
        self._norm = _Norm(request, f"{prefix}pool_norm", norm)
        self._ape = request.weights[f"{prefix}ape"].tensor()
        self._pool = request.runtime.pool  # type: ignore[attr-defined]

    def __call__(self, n: torch.Tensor, step: StepBatch) -> torch.Tensor:
        """Entries float32 [m, dim]."""
        gates = self._gates(n) + self._ape[step.positions % self.spec.ratio]
        made, positions = self.open.pool(step, self._values(n), gates)
        made = self._norm(made)
        self._turn.at(made[:, None], positions)
        return made

    def write(self, made: torch.Tensor, rows: torch.Tensor, to: torch.Tensor, kind: str) -> None:
        """Store entries as rows of a memory."""
        from ktcore_cpu import _native

        made = made.contiguous()
        _native.store_rows(
            self._pool, made.data_ptr(), len(made), self.spec.dim, rows.tolist(), to.data_ptr(), len(to), kind
        )


class _Indexer:
    """n float32 [T, hidden], low float32 [T, rank], step -> int32 [T, top_k]: entries, rising, then -1."""

    def __init__(self, request: LoadRequest, branch: CompressedAttentionSpec) -> None:
        spec = branch.indexer
        assert spec is not None
        self._spec, self._name = spec, request.name
        self._type = kv_dtype(request)
        self._pool = request.runtime.pool  # type: ignore[attr-defined]
        self._turn = _Rope(request, "indexer.rope", spec.rope)
        self._q, self._weights = _Linear(request, "indexer.q"), _Linear(request, "indexer.weights")
        self.pool = _Pool(request, "indexer.", spec.entries, spec.pool_norm, self._turn)
        self.keys = torch.empty(0)
        self._page_size = 0

    def allocate_pages(self, pages: int, page_size: int) -> None:
        """Make room for keys."""
        self._page_size = page_size
        rows = pages * page_entries(page_size, self._spec.entries.ratio)
        self.keys = empty_rows((rows,), self._spec.head_dim, self._type).view(pages, -1)

    def __call__(self, n: torch.Tensor, low: torch.Tensor, step: StepBatch) -> torch.Tensor:
        from ktcore_cpu import _native

        spec, entries = self._spec, self._spec.entries
        made = self.pool(n, step)
        rows = self.keys.view(len(self.keys) * page_entries(self._page_size, entries.ratio), -1)
        self.pool.write(made, closings(step, entries.ratio).places, rows, self._type)
        q = self._q(low).view(-1, spec.heads, spec.head_dim)
        self._turn(q, step)
        weights = self._weights(n) * spec.scale
        chosen = torch.empty(len(n), entries.top_k, dtype=torch.int32)
        _native.choose_entries(
            self._pool,
            native_step(step),
            q.data_ptr(),
            weights.data_ptr(),
            chosen.data_ptr(),
            spec.heads,
            spec.head_dim,
            entries.ratio,
            entries.top_k,
            self.keys.data_ptr(),
            len(self.keys),
            self._page_size,
            self._type,
        )
        return chosen
