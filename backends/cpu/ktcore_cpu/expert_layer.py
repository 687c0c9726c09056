"""A layer of routed experts for other engines: weights in, then y = layer(x, ids, weights), numpy or torch.

Imports numpy, the native module and, to quantise, `ktcore.weights` with torch; nothing of ktcore's engine.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ktcore_cpu import _native, expert_arrays
from ktcore_cpu.expert_arrays import Floats
from ktcore_cpu.expert_layout import (
    ROLES,
    Expert,
    Layout,
    MaybeNames,
    Names,
    block_bytes,
    expert_mask,
    float_layout,
    held_count,
    held_experts,
    three_names,
)
from ktcore_cpu.expert_run import ExpertPool, ExpertRun, finish, result_rows
from ktcore_cpu.expert_weights import Progress, fill

__all__ = ["ExpertLayer", "ExpertPool", "ExpertRun"]


class ExpertLayer:
    """out[t] = sum over k of weights[t, k] * down(act(gate x[t]) * up x[t]) of expert ids[t, k].

    A token's result depends on neither its batch nor the number of threads. Quantised weights take the activations as
    int8, a scale for every 16 values; BF16 and FP8 weights take them as bfloat16 where the CPU multiplies those.

    Args:
        gate, up: [experts, intermediate, hidden]; down: [experts, hidden, intermediate]. float32, float16 or bfloat16,
            numpy or torch on the CPU; kept in that type unless quantised. A memory-mapped array is read expert by
            expert: peak memory is the packed size and one expert.
        quantize: "int4_g32" to "int8_g128" quantises all three, a tuple (gate, up, down) each, None of it leaving one
            as it is.
        activation: "silu", "relu" or "gelu_tanh".
        weight_on_input: multiply an expert's input by its weight instead of its output.
        exact: compute in float32, without int8 or bfloat16 activations: slower.
        elsewhere: bool [experts]; experts that another device holds. They are neither packed nor computed, ids of them
            add nothing.
        pool: threads to share with other layers; else `threads` and `cpus` make one for this layer.
        progress: called with (experts packed, all); True draws a bar on stderr.

    Raises:
        TypeError: a dtype that cannot be used. ValueError: shapes, formats or names that do not fit.
    """

    def __init__(
        self,
        gate: Any,
        up: Any,
        down: Any,
        *,
        quantize: MaybeNames = None,
        activation: str = "silu",
        weight_on_input: bool = False,
        exact: bool = False,
        elsewhere: Any = None,
        pool: ExpertPool | None = None,
        threads: int = 0,
        cpus: Sequence[int] | None = None,
        progress: Progress | bool = False,
    ) -> None:
        shapes = [expert_arrays.shape_of(a) for a in (gate, up, down)]
        if len(shapes[0]) != 3 or shapes[1] != shapes[0] or shapes[2] != (shapes[0][0], shapes[0][2], shapes[0][1]):
            raise ValueError(
                "gate and up must be [experts, intermediate, hidden], down [experts, hidden, intermediate], not "
                + ", ".join(str(list(s)) for s in shapes)
            )
        stored = tuple(expert_arrays.stored_format(a, r) for a, r in zip((gate, up, down), ROLES, strict=True))
        experts, intermediate, hidden = shapes[0]
        held = held_experts(elsewhere, experts)
        self._build(
            ((gate[e], up[e], down[e]) for e in (range(experts) if held is None else held.tolist())),
            float_layout(experts, held, hidden, intermediate, stored, quantize),
            (activation, weight_on_input, exact),
            (experts, held),
            pool or ExpertPool(threads, cpus),
            progress,
        )

    @classmethod
    def from_blocks(
        cls,
        gate: Any,
        up: Any,
        down: Any,
        formats: Names,
        *,
        experts: int,
        hidden: int,
        intermediate: int,
        elsewhere: Any = None,
        **options: Any,
    ) -> ExpertLayer:
        """From the bytes of stored tensors, as a GGUF file has them.

        Args:
            gate, up, down: all experts' rows one after another: uint8 arrays or tensors, bytes or memory maps. Rows and
                columns as in the constructor.
            formats: "Q4_K", "INT4_G128", "F8_E4M3_G128" ... (`ktcore_cpu._native.formats()` lists them), or a tuple for
                gate, up and down.
            options: as in the constructor, but for `quantize`.
        """
        names = three_names(formats)
        held = held_experts(elsewhere, experts)
        layout = Layout(experts, hidden, intermediate, names, (False,) * 3, True)
        pieces = []
        for role, data, fmt, shape in zip(ROLES, (gate, up, down), names, layout.shapes(), strict=True):
            block = _native.formats()[fmt][0]
            raw, each = expert_arrays.raw_bytes(data, role), block_bytes(fmt, shape)
            if shape[1] % block or raw.size != experts * each:
                raise ValueError(
                    f"{role} has {raw.size} bytes; {experts} experts of {fmt} {list(shape)} take {experts * each}"
                    + (f", and rows must be multiples of {block} values" if shape[1] % block else "")
                )
            pieces.append(raw.reshape(experts, each))
        wanted = range(experts) if held is None else held.tolist()
        source = ((pieces[0][e], pieces[1][e], pieces[2][e]) for e in wanted)
        return cls.from_experts(
            source,
            experts=experts,
            hidden=hidden,
            intermediate=intermediate,
            formats=names,
            elsewhere=elsewhere,
            **options,
        )

    @classmethod
    def from_experts(
        cls,
        source: Iterable[Expert],
        *,
        experts: int,
        hidden: int,
        intermediate: int,
        formats: Names | None = None,
        stored: Names = "BF16",
        quantize: MaybeNames = None,
        activation: str = "silu",
        weight_on_input: bool = False,
        exact: bool = False,
        elsewhere: Any = None,
        pool: ExpertPool | None = None,
        threads: int = 0,
        cpus: Sequence[int] | None = None,
        progress: Progress | bool = False,
    ) -> ExpertLayer:
        """From an iterable of experts in order, each packed and dropped before the next is asked for.

        Args:
            source: (gate, up, down) of each expert that is not elsewhere, as float matrices, or as bytes of `formats`.
            formats: what the bytes are; None: the source gives floats.
            stored: of floats that are not quantised, their type: "F32", "F16" or "BF16".
        """
        held = held_experts(elsewhere, experts)
        if formats is not None:
            if quantize is not None:
                raise ValueError("quantize needs floats, but `formats` says that the source holds blocks")
            layout = Layout(held_count(experts, held), hidden, intermediate, three_names(formats), (False,) * 3, True)
        else:
            layout = float_layout(experts, held, hidden, intermediate, three_names(stored), quantize)
        layer = cls.__new__(cls)
        layer._build(
            source,
            layout,
            (activation, weight_on_input, exact),
            (experts, held),
            pool or ExpertPool(threads, cpus),
            progress,
        )
        return layer

    def _build(
        self,
        source: Iterable[Expert],
        layout: Layout,
        arithmetic: tuple[str, bool, bool],
        which: tuple[int, npt.NDArray[np.int64] | None],
        pool: ExpertPool,
        progress: Progress | bool,
    ) -> None:
        loss: Any = None
        if any(layout.quantize):
            from ktcore.weights.quantize import Loss

            loss = Loss()
        self.pool = pool
        self.hidden, self.intermediate, self.formats = layout.hidden, layout.intermediate, layout.formats
        self.experts, held = which
        self._place: npt.NDArray[np.int64] | None = None
        if held is not None:
            self._place = np.full(self.experts, -1, np.int64)
            self._place[held] = np.arange(len(held))
        pool.switch.use(*layout.formats)
        bank = fill(layout, source, pool.native, loss, progress)
        self.nbytes: int = bank.nbytes
        """Bytes of the packed experts."""
        self.quantization_error: float = loss.relative if loss is not None else 0.0
        """Root mean square error of the weights that were quantised here, over their root mean square."""
        self._block = _native.ExpertsBlock(pool.native, bank, *arithmetic)

    @property
    def threads(self) -> int:
        """Of its pool."""
        return self.pool.threads

    def __call__(self, x: Any, ids: Any, weights: Any, out: Any = None, *, elsewhere: Any = None) -> Any:
        """The weighted sum of each token's experts. Other Python threads run meanwhile.

        Args:
            x: [tokens, hidden], any float dtype; numpy, or torch on the CPU.
            ids: integers [tokens, k]; -1 adds nothing. Any k, the same expert more than once too.
            weights: floats [tokens, k].
            out: where to write, [tokens, hidden] of any float dtype, apart from x; float32 and contiguous is quickest.
            elsewhere: bool [experts]; experts to leave out of this call.

        Returns:
            `out`, or a new array of x's kind and dtype. The arithmetic is float32 and rounded once at the end.

        Raises:
            TypeError: a dtype that cannot be used. ValueError: shapes that do not fit, or an id beyond the experts.
        """
        rows, chosen, scales = self._inputs(x, ids, weights, elsewhere)
        result = result_rows(out, rows)
        self._block.forward(
            rows.ctypes.data, chosen.ctypes.data, scales.ctypes.data, result.ctypes.data, len(rows), chosen.shape[1]
        )
        return finish(result, out, x)

    def submit(self, x: Any, ids: Any, weights: Any, out: Any = None, *, elsewhere: Any = None) -> ExpertRun:
        """Start the call beside the caller; `wait()` of what it returns gives the result. Arguments as `__call__`'s.

        Submitted calls of all layers of a pool run one after another, from a native thread. x, ids, weights and `out`
        must stay untouched until then.
        """
        return self.prepare(x, ids, weights, out, elsewhere=elsewhere).start()

    def prepare(self, x: Any, ids: Any, weights: Any, out: Any = None, *, elsewhere: Any = None) -> ExpertRun:
        """A call that is not started yet, to be started as often as wanted, also from C.

        It reads the arrays' memory each time it runs if they are C-contiguous, x and weights float32 and ids int64, and
        all experts are held here; otherwise it reads copies that are made now.
        """
        rows, chosen, scales = self._inputs(x, ids, weights, elsewhere)
        result = result_rows(out, rows)
        job = self.pool.lane.experts_job(
            self._block,
            rows.ctypes.data,
            chosen.ctypes.data,
            scales.ctypes.data,
            result.ctypes.data,
            len(rows),
            chosen.shape[1],
            owners=(rows, chosen, scales, result),
        )
        return ExpertRun(job, result, out, x, (rows, chosen, scales, x, ids, weights))

    def _inputs(self, x: Any, ids: Any, weights: Any, elsewhere: Any) -> tuple[Floats, npt.NDArray[np.int64], Floats]:
        rows = expert_arrays.float_rows(x, "x", self.hidden)
        chosen, scales = expert_arrays.id_rows(ids), expert_arrays.float_rows(weights, "weights")
        if chosen.shape != scales.shape or len(chosen) != len(rows) or chosen.shape[1] == 0:
            raise ValueError(
                f"ids and weights must both be [{len(rows)}, k], not {list(chosen.shape)} and {list(scales.shape)}"
            )
        if self._place is None and elsewhere is None:
            return rows, chosen, scales  # the native call checks the ids
        if chosen.size and chosen.max() >= self.experts:
            raise ValueError(f"expert {chosen.max()} is not one of {self.experts}")
        place = np.arange(self.experts) if self._place is None else self._place
        if elsewhere is not None:
            place = np.where(expert_mask(elsewhere, self.experts), -1, place)
        return rows, np.where(chosen < 0, -1, place[np.maximum(chosen, 0)]), scales
