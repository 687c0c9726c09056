"""The plain backend's attention over a window and compressed entries: right, and easy to break."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ktcore.backend import LoadRequest
from ktcore.ops import EntryCacheSpec, StepBatch, WindowCacheSpec
from ktcore.ops.compressed import Seen, merged, mirrored_pairs, pooled, rotated_last, weighed
from ktcore.ops.indexer import choose_tokens, index_scores


class Rings:
    """The last `rows` rows of each slot's sequence; row p mod rows is position p's."""

    def __init__(self, rows: int, *shape: int) -> None:
        self.rows, self.shape = rows, shape

    def allocate_states(self, slots: int) -> None:
        self.held = torch.zeros(slots, self.rows, *self.shape)

    def state_tensors(self) -> tuple[torch.Tensor, ...]:
        return (self.held,)

    def copy_states(self, source: Sequence[int], target: Sequence[int]) -> None:
        self.held[list(target)] = self.held[list(source)]

    def spans(self, step: StepBatch) -> list[tuple[int, slice, int, int]]:
        """Of each sequence: its number, its rows in the step, tokens before it and after it."""
        starts = zip(step.q_start, step.q_start[1:], step.context_lens, strict=False)
        return [(i, slice(a, b), n - (b - a), n) for i, (a, b, n) in enumerate(starts)]

    def with_new(self, step: StepBatch, i: int, new: torch.Tensor, before: int, first: int) -> torch.Tensor:
        """Rows of positions `first` and later, the new ones among them, which the ring then holds."""
        ring = self.held[step.state_slots[i]]
        rows = torch.cat((ring[torch.arange(first, before) % self.rows], new))
        for p in range(max(before, before + len(new) - self.rows), before + len(new)):
            ring[p % self.rows] = new[p - before]
        return rows


class Window(Rings):
    def __init__(self, spec: WindowCacheSpec) -> None:
        super().__init__(spec.window, spec.dim)
        self.window = spec.window

    def attend(self, step: StepBatch, q: torch.Tensor, k: torch.Tensor, scale: float) -> Seen:
        out = []
        for i, span, before, after in self.spans(step):
            first = max(0, before - self.window + 1)
            keys = self.with_new(step, i, k[span], before, first)
            at = torch.arange(first, after)
            mine = torch.arange(before, after)[:, None]
            out.append(seen(q[span], keys, scale, (at <= mine) & (at > mine - self.window)))
        return torch.cat([v for v, _ in out]), torch.cat([log for _, log in out])


class Entries(Rings):
    def __init__(self, spec: EntryCacheSpec) -> None:
        super().__init__(spec.rows, 2, spec.width)
        self.spec = spec

    def allocate_pages(self, pages: int, page_size: int) -> None:
        self.a_page = max(1, page_size // self.spec.ratio)
        self.kept = torch.zeros(pages, self.a_page, self.spec.dim)

    def page_tensors(self) -> tuple[torch.Tensor, ...]:
        return (self.kept,)

    def places(self, step: StepBatch, i: int, windows: range) -> torch.Tensor:
        last = torch.tensor(windows, dtype=torch.int64) * self.spec.ratio + self.spec.ratio - 1
        page = step.block_table[i].long()[last // step.page_size]
        return page * self.a_page + last % step.page_size // self.spec.ratio

    def closed(self, before: int, after: int) -> range:
        return range(before // self.spec.ratio, after // self.spec.ratio)

    def pool(self, step: StepBatch, values: torch.Tensor, gates: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        s, made, starts = self.spec, [], []
        both = torch.stack((values, gates), 1)
        for i, span, before, after in self.spans(step):
            first = max(0, before // s.ratio - s.overlap) * s.ratio
            rows = self.with_new(step, i, both[span], before, first)
            for w in self.closed(before, after):
                own = rows[w * s.ratio - first : (w + 1) * s.ratio - first, :, s.width - s.dim :]
                if s.overlap and w:
                    own = torch.cat((rows[(w - 1) * s.ratio - first : w * s.ratio - first, :, : s.dim], own))
                made.append(pooled(own[None, :, 0], own[None, :, 1]))
                starts.append(self.position(w))
        return torch.cat((torch.empty(0, s.dim), *made)), torch.tensor(starts, dtype=torch.int64)

    def position(self, window: int) -> int:
        return window * self.spec.ratio

    def append(self, step: StepBatch, entries: torch.Tensor) -> None:
        done = 0
        for i, _, before, after in self.spans(step):
            windows = self.closed(before, after)
            self.kept.view(-1, self.spec.dim)[self.places(step, i, windows)] = entries[done : done + len(windows)]
            done += len(windows)

    def shown(self, step: StepBatch) -> list[tuple[slice, torch.Tensor, torch.Tensor]]:
        """Of each sequence: its rows in the step, its entries, how many each token sees."""
        out = []
        for i, span, before, after in self.spans(step):
            rows = self.kept.view(-1, self.spec.dim)[self.places(step, i, range(after // self.spec.ratio))]
            out.append((span, rows, torch.arange(before + 1, after + 1) // self.spec.ratio))
        return out

    def attend(self, step: StepBatch, q: torch.Tensor, scale: float, chosen: Any = None) -> Seen:
        out = []
        for span, rows, count in self.shown(step):
            mask = torch.arange(len(rows)) < count[:, None]
            if self.spec.chosen:
                mask &= (chosen[span][:, :, None] == torch.arange(len(rows))).any(1)
            out.append(seen(q[span], rows, scale, mask))
        return torch.cat([v for v, _ in out]), torch.cat([log for _, log in out])

    def choose(self, step: StepBatch, q: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return torch.cat(
            [
                choose_tokens(index_scores(q[span], weights[span], rows), count - 1, self.spec.top_k)
                for span, rows, count in self.shown(step)
            ]
        )


def seen(q: torch.Tensor, rows: torch.Tensor, scale: float, mask: torch.Tensor) -> Seen:
    scores = torch.einsum("thd,nd->thn", q, rows) * scale
    return weighed(scores.masked_fill(~mask[:, None], -float("inf")), rows)


def store(p: Any, spec: Any, ape: torch.Tensor, n: torch.Tensor, step: StepBatch) -> None:
    """Pool, norm, rotate and store what closes in the step."""
    gates = p["pool_gates"](n) + ape[step.positions % spec.entries.ratio]
    made, positions = p["entries"].pool(step, p["pool_values"](n), gates)
    made = p["pool_norm"](made) if getattr(spec, "pool_norm", True) else made
    p["entries"].append(step, rotated_last(made[:, None], spec.rope.dim, lambda t: p["rope"](t, positions))[:, 0])


def entry_indexer(request: LoadRequest) -> Any:
    spec: Any = request.spec
    p, ape = request.children, request.weights["ape"].tensor()

    def run(n: torch.Tensor, low: torch.Tensor, step: StepBatch) -> torch.Tensor:
        store(p, spec, ape, n, step)
        q = p["q"](low).view(len(low), spec.heads, -1)
        q = rotated_last(q, spec.rope.dim, lambda t: p["rope"](t, step.positions))
        return p["entries"].choose(step, q, p["weights"](n) * spec.scale)

    return run


class Compressed:
    def __init__(self, request: LoadRequest) -> None:
        self.spec: Any = request.spec
        self.p = request.children
        has = self.spec.entries and self.spec.pool_values and self.spec.pool_gates
        self.ape = request.weights["ape"].tensor() if has else None
        self.o_a, self.sinks = (request.weights[role].tensor() for role in ("o_a", "sinks"))

    def __call__(self, x: torch.Tensor, step: StepBatch) -> torch.Tensor:
        s, p = self.spec, self.p
        n = p["norm"](x) if s.norm else x
        low = p["q_a_norm"](p["q_a"](n))
        q = self.turned(self.normed(p["q_b"](low).view(len(x), s.heads, -1)), step)
        k = self.turned(p["kv_norm"](p["kv"](n))[:, None], step)[:, 0]
        parts = [p["window"].attend(step, q, k, s.scale)]
        if self.ape is not None:
            store(p, s, self.ape, n, step)
            chosen = p["indexer"](n, low, step) if s.indexer else None
            parts.append(p["entries"].attend(step, q, s.scale, self.no_choice(q) if chosen is None else chosen))
        o = self.back(merged(tuple(parts), self.sinks), step).reshape(len(x), s.groups, -1)
        y = p["o_b"](torch.einsum("tgd,grd->tgr", o, self.o_a).flatten(1))
        return x + y if s.residual else y

    def normed(self, q: torch.Tensor) -> torch.Tensor:
        return q * torch.rsqrt(q.pow(2).mean(-1, keepdim=True) + self.spec.q_eps)

    def no_choice(self, q: torch.Tensor) -> torch.Tensor:
        return torch.zeros(len(q), 1, dtype=torch.int32)

    def turned(self, x: torch.Tensor, step: StepBatch) -> torch.Tensor:
        return rotated_last(x, self.spec.rope.dim, lambda t: self.p["rope"](t, step.positions))

    def back(self, x: torch.Tensor, step: StepBatch) -> torch.Tensor:
        kind = self.spec.rope.pairing
        turn = lambda t: mirrored_pairs(self.p["rope"](mirrored_pairs(t, kind), step.positions), kind)  # noqa: E731
        return rotated_last(x, self.spec.rope.dim, turn)
