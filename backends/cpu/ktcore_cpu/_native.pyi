"""Types of the native kernels. Activations, outputs and cache pages cross as integer addresses of C-contiguous float32
(or float16 pages) memory; every function raises ValueError for a shape, range or name that does not fit."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

_F32 = NDArray[np.float32]
_I32 = NDArray[np.int32]
_I64 = NDArray[np.int64]

MOST_FEW: int
"""The largest switch point of `Pool.few`."""
MOST_AHEAD: int
"""The longest distance of `Pool.ahead`, bytes."""

def isa_supported() -> list[str]:
    """Instruction sets that this build can use on this CPU, lowest first: "scalar", "avx2", "avx512"..."""

def isa_emulated() -> list[str]:
    """Names that KTCORE_ISA takes for tests: units that run an instruction set's kernels over emulated registers."""

def isa_selected() -> str:
    """The one in use: the best, or the one the environment variable KTCORE_ISA names (ValueError if it cannot be)."""

def cpu_flags() -> list[str]:
    """CPU features found (CPUID) and enabled by the operating system (XGETBV)."""

def cpu_quota(root: str = "") -> float:
    """CPUs' worth of time that the control groups above this process allow; 0: no limit.

    `root` stands before /proc and /sys.
    """

def default_threads(root: str = "") -> int:
    """Threads of a pool that names none.

    One for each physical core that this process may use and that has at least a third of the quickest one's capacity
    (`cpu_capacity`, else `acpi_cppc/highest_perf`, else `cpuinfo_max_freq`); at most the control group's quota.
    `root` stands before /proc and /sys.
    """

def formats() -> dict[str, tuple[int, int]]:
    """Weight formats: name -> (values in a block, bytes of a block), as stored."""

def packed_growth(format: str) -> float:
    """Packed bytes of full panels of this format as a multiple of its stored bytes."""

class Pool:
    """Threads and kernels of one engine. The calling thread is number 0; the others spin 40 us, then sleep.

    Args:
        threads: 0 takes `default_threads()`.
        cpus: CPU of each thread; workers 1.. are pinned to theirs, the caller is left alone.
    """

    def __init__(self, threads: int = 0, cpus: list[int] | None = None) -> None: ...
    @property
    def threads(self) -> int: ...
    @property
    def shares(self) -> list[float]:
        """How quick each thread has lately been, as its share of the work: about 1 in all; no result depends on it."""
    @property
    def few(self) -> dict[str, int]:
        """By weight format: up to so many tokens are multiplied straight from the panels; no result depends on it."""
    def set_few(self, format: str, tokens: int) -> None:
        """Replaces the built-in guess; ValueError unless tokens is 0 to MOST_FEW."""
    def measure_few(self, format: str) -> int:
        """Times both ways on this thread over panels that are in no cache, some 100 ms; changes nothing."""
    @property
    def ahead(self) -> dict[str, int]:
        """By weight format: bytes ahead of which few tokens' products ask for lines; no result depends on it."""
    def set_ahead(self, format: str, bytes: int) -> None:
        """Replaces the built-in guess; ValueError unless bytes is 0 to MOST_AHEAD, a multiple of 64."""
    def measure_ahead(self, format: str) -> int:
        """Times some distances on this thread in the same way, some 20 ms; changes nothing."""

class PackedMatrix:
    """A weight matrix [rows, cols] in panels of 32 rows, in as many bytes as GGUF takes (rows padded to 32)."""

    @staticmethod
    def pack(pool: Pool, format: str, rows: int, cols: int, raw: Any) -> PackedMatrix:
        """Packs `rows` GGUF rows. raw: C-contiguous uint8 buffer (a read-only memory map will do)."""
    @staticmethod
    def borrow(format: str, rows: int, cols: int, packed: Any) -> PackedMatrix:
        """A matrix whose panels lie in `packed`: a contiguous, 64-byte aligned uint8 buffer, kept alive, not copied."""
    @staticmethod
    def packed_bytes(format: str, rows: int, cols: int) -> int: ...
    @property
    def packed(self) -> np.ndarray:
        """The panels, uint8 [nbytes]: a read-only view that keeps the matrix alive."""
    @property
    def format(self) -> str: ...
    @property
    def rows(self) -> int: ...
    @property
    def cols(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    def dequantize(self) -> _F32:
        """float32 [rows, cols], equal to gguf.quants.dequantize to the last bit."""

def linear(
    pool: Pool, w: PackedMatrix, x_ptr: int, out_ptr: int, tokens: int, bias_ptr: int = 0, exact: bool = False
) -> None:
    """out [tokens, rows] = x [tokens, cols] @ w.T (+ bias [rows]), float32.

    Quantised formats take x as int8 with one scale for 16 values; `exact` (and float formats) computes in float32.
    """

def rms_norm(pool: Pool, x_ptr: int, weight: _F32, eps: float, out_ptr: int, tokens: int) -> None:
    """out = x / sqrt(mean(x^2) + eps) * weight, rows of len(weight); out may be x."""

def cache_row_bytes(kv_dtype: str, width: int) -> int:
    """Bytes of a cached row of `width` values. A "q8" row: int8 codes to a multiple of 32, then a float16 each 32.
    An "i16" row: int16 codes to a multiple of 2, a float32 scale, then of a latent row the rotated part's scale as
    bfloat16, and the largest magnitude among the codes of the first scale as uint16."""

def prefer_huge_pages(ptr: int, bytes: int) -> None:
    """Asks the system for huge pages over this memory, where it holds whole ones. A wish."""

def dequantize_rows(
    format: str, raw_ptr: int, row_bytes: int, num_rows: int, cols: int, ids: _I64, out_ptr: int
) -> None:
    """out [len(ids), cols] = rows `ids` of a GGUF matrix at raw_ptr, dequantised."""

def read_bandwidth(pool: Pool, seconds: float = 0.3) -> float:
    """Bytes a second that the pool's threads read from memory: the best pass over 512 MiB within `seconds`."""

def peak_rate(pool: Pool, kind: str, seconds: float = 0.3) -> float:
    """Operations a second that the pool's threads do without memory: the best pass within `seconds`.

    kind: "int8", "bf16" or "f32"; a multiplication and an addition are two. 0.0 where the instruction set in use has no
    such dot product (bf16).
    """

class Step:
    """A ragged batch, made once for all layers. Arrays are copied.

    Args:
        positions: int32 [T], for RoPE alone.
        q_start: int32 [n + 1], each sequence's first token.
        context_lens: int32 [n], keys of each sequence after this step.
        block_table: int32 [n, max_blocks], pages of each sequence.
    """

    def __init__(self, positions: _I32, q_start: _I32, context_lens: _I32, block_table: _I32) -> None: ...
    @property
    def tokens(self) -> int: ...
    @property
    def sequences(self) -> int: ...

class AttentionBlock:
    """out = (x +) o(attend(rope(norm(q)), cache)) with q, k, v from norm(x). Appends this step's keys and values.

    Args:
        rope_pairing: "half" or "interleaved"; inv_freq: float32 [rotary width / 2], empty for no RoPE.
        rope_scale: factor on cos and sin. softmax_scale: factor on scores.
        norm, q_norm, k_norm: RMSNorm weights [hidden], [head_dim], [head_dim].
        window: a query sees its last `window` keys, itself included; 0 is all.
        residual: add x to the output. exact: no int8 activations.
        chunk: a query sees keys of its own chunk of so many positions; 0 is all.
        sinks: float32 [heads], logits that take part in the softmax and have no value.
        temperature_scale, temperature_span, temperature_offset: queries grow by 1 + scale * ln(1 + floor((position +
            offset) / span)); span 0: they do not.
        norm_after_rope: q_norm and k_norm come after RoPE.
        norm_whole: q_norm is over all heads of q together, [heads * head_dim], and k_norm likewise.
        gate: [heads * value width, hidden] of norm(x), or [heads, hidden]; its sigmoid multiplies what o gets.
        value_dim: width of a value head; 0 for head_dim.
        v_norm: RMSNorm weight [value width], with v_eps. value_scale: multiplies the values.
    """

    def __init__(
        self,
        pool: Pool,
        q: PackedMatrix,
        k: PackedMatrix,
        v: PackedMatrix,
        o: PackedMatrix,
        *,
        heads: int,
        kv_heads: int,
        head_dim: int,
        rope_pairing: str,
        inv_freq: _F32,
        rope_scale: float = 1.0,
        softmax_scale: float,
        norm: _F32 | None = None,
        norm_eps: float = 0.0,
        q_norm: _F32 | None = None,
        k_norm: _F32 | None = None,
        qk_eps: float = 0.0,
        q_bias: _F32 | None = None,
        k_bias: _F32 | None = None,
        v_bias: _F32 | None = None,
        o_bias: _F32 | None = None,
        window: int = 0,
        residual: bool = True,
        exact: bool = False,
        chunk: int = 0,
        sinks: _F32 | None = None,
        temperature_scale: float = 0.0,
        temperature_span: float = 0.0,
        temperature_offset: float = 1.0,
        norm_after_rope: bool = False,
        norm_whole: bool = False,
        gate: PackedMatrix | None = None,
        value_dim: int = 0,
        v_norm: _F32 | None = None,
        v_eps: float = 0.0,
        value_scale: float = 1.0,
    ) -> None: ...
    def forward(
        self,
        x_ptr: int,
        out_ptr: int,
        step: Step,
        k_pages_ptr: int,
        v_pages_ptr: int,
        num_pages: int,
        page_size: int,
        kv_dtype: str,
    ) -> None:
        """x, out: float32 [step.tokens, hidden]; out may be x. Pages [num_pages, kv_heads, page_size] of rows of
        head_dim values in kv_dtype "i16", "f16", "bf16", "f32" or "q8", `cache_row_bytes` each."""

class HyperBlock:
    """Hyper-connections: fn float32 [rows, streams * hidden], base [rows], scale [3], of the formulas of
    `HyperConnectionSpec`; `leaves=False`: [streams] rows, one scale. hidden: a multiple of 16; streams: at most 8."""

    def __init__(
        self,
        pool: Pool,
        fn: _F32,
        *,
        hidden: int,
        streams: int,
        rounds: int,
        eps: float,
        rms_eps: float,
        leaves: bool,
        base: _F32,
        scale: _F32,
    ) -> None: ...
    @property
    def carry(self) -> int:
        """Values of a token that `leave` takes: streams * (1 + streams), or 0."""

    def enter(self, x_ptr: int, out_ptr: int, carry_ptr: int, tokens: int) -> None:
        """x: float32 [tokens, streams * hidden]; out: [tokens, hidden]; carry: [tokens, carry], written."""

    def leave(self, x_ptr: int, y_ptr: int, carry_ptr: int, out_ptr: int, tokens: int) -> None:
        """y: float32 [tokens, hidden]; out: [tokens, streams * hidden], which may be x."""

class GatedStreamsBlock:
    """Gated streams by the formulas of `GatedStreamsSpec`: down [rank, streams * hidden], up [streams * hidden, rank],
    inject [streams, streams * hidden] or None (no `leave`); norm [streams * hidden], as it multiplies."""

    def __init__(
        self,
        pool: Pool,
        down: PackedMatrix,
        up: PackedMatrix,
        inject: PackedMatrix | None,
        *,
        hidden: int,
        streams: int,
        norm: _F32,
        eps: float,
        exact: bool = False,
    ) -> None: ...
    @property
    def carry(self) -> int:
        """Values of a token that `leave` takes: streams, or 0."""

    def enter(self, x_ptr: int, out_ptr: int, carry_ptr: int, tokens: int) -> None:
        """As of `HyperBlock`."""

    def leave(self, x_ptr: int, y_ptr: int, carry_ptr: int, out_ptr: int, tokens: int) -> None:
        """As of `HyperBlock`."""

def delta_rule(pool: Pool, q: _F32, k: _F32, v: _F32, g: _F32, beta: _F32, state: _F32) -> _F32:
    """Gated delta rule: q, k [tokens, heads, key_dim] normalised and scaled, v [tokens, heads, value_dim], g, beta
    [tokens, heads] -> [tokens, heads, value_dim]; state [heads, key_dim, value_dim] is updated in place. Widths are
    multiples of 16. Up to 4 tokens one by one, more by chunks of 16."""

class DeltaBlock:
    """out = (x +) o(out_norm(delta_rule(...)) * silu(z)) with q, k, v = silu(conv(qkv(norm(x)))).

    Args:
        qkv: [channels, hidden], rows of q of all heads, of k, of v; z: [value_heads * value_dim, hidden]; b, a:
            [value_heads, hidden].
        conv: float32 [channels, width], the oldest token's factor first. decay, dt_bias: [value_heads].
        out_norm: [value_dim]; norm: [hidden].
    """

    def __init__(
        self,
        pool: Pool,
        qkv: PackedMatrix,
        z: PackedMatrix,
        b: PackedMatrix,
        a: PackedMatrix,
        o: PackedMatrix,
        *,
        key_heads: int,
        value_heads: int,
        key_dim: int,
        value_dim: int,
        width: int,
        conv: _F32,
        decay: _F32,
        dt_bias: _F32,
        out_norm: _F32 | None,
        out_eps: float,
        norm: _F32 | None = None,
        norm_eps: float = 0.0,
        residual: bool = True,
        exact: bool = False,
        tiled: bool = False,
        sigmoid_gate: bool = False,
    ) -> None: ...
    def forward(
        self,
        x_ptr: int,
        out_ptr: int,
        step: Step,
        slots: Sequence[int],
        conv_ptr: int,
        state_ptr: int,
        num_slots: int,
        kept: Sequence[tuple[int, int]] = (),
    ) -> None:
        """x, out: float32 [step.tokens, hidden]; out may be x. States of slots: conv float32 [num_slots, width - 1,
        channels], state float32 [num_slots, value_heads, key_dim, value_dim]; a sequence that begins with the step
        starts from zeros. kept: of each sequence (slot, tokens), the slot that is given its state after so many of
        its tokens in the step, -1 for none."""

class KimiDeltaBlock:
    """out = (x +) o(out_norm(rule(...)) * sigmoid(g_b(g_a(n)))) with n = norm(x), and q = silu(conv(q(n))), likewise k
    and v.

    Args:
        q, k, v: [heads * dim, hidden]; f_a, g_a: [rank, hidden]; f_b, g_b: [heads * dim, rank]; b: [heads, hidden].
        conv: float32 [3 * heads * dim, width] of q, k and v, the oldest token's factor first.
        rates: [heads], positive; dt_bias: [heads * dim]; bound: of the logarithm of a decay, negative; 0 for none.
        out_norm: [dim]; norm: [hidden].
    """

    def __init__(
        self,
        pool: Pool,
        q: PackedMatrix,
        k: PackedMatrix,
        v: PackedMatrix,
        f_a: PackedMatrix,
        f_b: PackedMatrix,
        b: PackedMatrix,
        g_a: PackedMatrix,
        g_b: PackedMatrix,
        o: PackedMatrix,
        *,
        heads: int,
        dim: int,
        width: int,
        conv: _F32,
        rates: _F32,
        dt_bias: _F32,
        bound: float = 0.0,
        out_norm: _F32 | None,
        out_eps: float,
        norm: _F32 | None = None,
        norm_eps: float = 0.0,
        residual: bool = True,
        exact: bool = False,
    ) -> None: ...
    def forward(
        self,
        x_ptr: int,
        out_ptr: int,
        step: Step,
        slots: Sequence[int],
        conv_ptr: int,
        state_ptr: int,
        num_slots: int,
        kept: Sequence[tuple[int, int]] = (),
    ) -> None:
        """As of `DeltaBlock`, with conv float32 [num_slots, width - 1, 3 * heads * dim] and state float32 [num_slots,
        heads, dim, dim]. `kept` has to be empty."""

class MLABlock:
    """Latent attention: out = (x +) o(attend(...)); absorbed below 128 new tokens of a sequence, else expanded.

    Args:
        q_a: None where q [heads * (nope + rope), hidden] takes the normed input itself.
        kv_a: [latent + rope, hidden].
        k_absorb, k_expand, v: one matrix a head, [latent, nope], [nope, latent] and [value, latent], each head's rows
            padded to a multiple of 32 with zeros.
        temperature_scale, temperature_span, temperature_offset: as of AttentionBlock.
    """

    def __init__(
        self,
        pool: Pool,
        q_a: PackedMatrix | None,
        q: PackedMatrix,
        kv_a: PackedMatrix,
        k_absorb: PackedMatrix,
        k_expand: PackedMatrix,
        v: PackedMatrix,
        o: PackedMatrix,
        *,
        heads: int,
        nope: int,
        rope: int,
        value: int,
        latent: int,
        softmax_scale: float,
        rope_pairing: str,
        inv_freq: _F32 | None,
        rope_scale: float = 1.0,
        norm: _F32 | None = None,
        norm_eps: float = 0.0,
        q_norm: _F32 | None = None,
        q_eps: float = 0.0,
        kv_norm: _F32,
        kv_eps: float,
        residual: bool = True,
        exact: bool = False,
        temperature_scale: float = 0.0,
        temperature_span: float = 0.0,
        temperature_offset: float = 1.0,
    ) -> None: ...
    def forward(
        self, x_ptr: int, out_ptr: int, step: Step, pages_ptr: int, num_pages: int, page_size: int, kv_dtype: str
    ) -> None:
        """x, out: float32 [step.tokens, hidden]; out may be x. Pages [num_pages, page_size, latent + rope] of kv_dtype
        "f16" or "f32"."""
    def forward_sparse(
        self,
        x_ptr: int,
        out_ptr: int,
        step: Step,
        pages_ptr: int,
        num_pages: int,
        page_size: int,
        kv_dtype: str,
        indexer: TokenIndexer | None,
        index_pages_ptr: int,
        chosen_ptr: int,
        top_k: int,
        index_rows_ptr: int = 0,
    ) -> None:
        """The same over chosen tokens: int32 [step.tokens, top_k] at chosen_ptr, positions in a token's sequence,
        rising, then -1. The indexer writes them, where there is one, and its keys into index_pages [num_pages,
        page_size, dim]. Where it pools keys, top_k has pool - 1 more, index_pages is [num_pages, page_size / pool,
        dim], and keys and gates of tokens go into index_rows [num_pages, page_size, 2 * dim].

        Raises:
            ValueError: a choice without an indexer names no token, or one later than its own.
        """

class TokenIndexer:
    """Chooses the tokens that each token attends to: those with the highest sum over heads of weight * relu(q . key).

    Args:
        q, k, weights: [heads * dim, rank], [dim, hidden], [heads, hidden].
        rope: values at the beginning of a head that rotate.
        k_norm, k_bias: of the LayerNorm over keys, [dim].
        inv_freq: None where nothing rotates.
        pool_tokens: tokens whose keys are one; then there are `gate` [dim, hidden] and `ape` [pool, dim].
    """

    def __init__(
        self,
        pool: Pool,
        q: PackedMatrix,
        k: PackedMatrix,
        weights: PackedMatrix,
        gate: PackedMatrix | None = None,
        *,
        heads: int,
        dim: int,
        rope: int,
        top_k: int,
        pool_tokens: int = 0,
        rope_pairing: str,
        inv_freq: _F32 | None,
        rope_scale: float = 1.0,
        k_norm: _F32,
        k_bias: _F32,
        eps: float,
        exact: bool = False,
        ape: _F32 | None = None,
    ) -> None: ...

def choose_highest(scores: _F32, top_k: int) -> _I32:
    """Indices of the `top_k` highest scores, rising, then -1; the earlier one where scores are equal."""

class MLPBlock:
    """out = (x +) down(act(gate(norm(x))) * up(norm(x))); activation "silu", "relu" or "gelu_tanh"."""

    def __init__(
        self,
        pool: Pool,
        gate: PackedMatrix,
        up: PackedMatrix,
        down: PackedMatrix,
        norm: _F32 | None = None,
        norm_eps: float = 0.0,
        activation: str = "silu",
        residual: bool = True,
        exact: bool = False,
        clamp: tuple[float, float, float, bool] | None = None,
    ) -> None: ...
    def forward(self, x_ptr: int, out_ptr: int, tokens: int) -> None:
        """x, out: float32 [tokens, hidden]; out may be x."""

class ExpertBank:
    """All experts of a layer in one area of memory: gate and up [intermediate, hidden], down [hidden, intermediate]."""

    def __init__(
        self, experts: int, hidden: int, intermediate: int, gate_format: str, up_format: str, down_format: str
    ) -> None: ...
    def pack(self, pool: Pool, expert: int, gate: Any, up: Any, down: Any) -> None:
        """Packs one expert from GGUF rows, C-contiguous uint8 buffers; each expert once."""
    def set_biases(self, gate: _F32 | None, up: _F32 | None, down: _F32 | None) -> None:
        """Added to the products: gate, up [experts, intermediate], down [experts, hidden]; ValueError on others."""
    @staticmethod
    def borrow(
        experts: int,
        hidden: int,
        intermediate: int,
        gate_format: str,
        up_format: str,
        down_format: str,
        packed: Any,
    ) -> ExpertBank:
        """Experts that lie packed in `packed`: a contiguous, 64-byte aligned uint8 buffer, kept alive, not copied."""
    @staticmethod
    def expert_bytes(hidden: int, intermediate: int, gate_format: str, up_format: str, down_format: str) -> int: ...
    @property
    def load(self) -> np.ndarray:
        """Tokens that each expert has been given so far, int64 [experts]."""
    @property
    def contents(self) -> np.ndarray:
        """All experts' packed bytes, uint8 [nbytes]: a read-only view that keeps the bank alive."""
    @property
    def experts(self) -> int: ...
    @property
    def packed(self) -> int: ...
    @property
    def nbytes(self) -> int: ...

class RouterBlock:
    """Chooses experts. config: as `ktcore.ops.moe.RouterSpec`, `bias` and `logit_bias` float32 [experts] or None."""

    def __init__(self, pool: Pool, weight: PackedMatrix, config: dict[str, Any]) -> None: ...
    def forward(self, x_ptr: int, ids_ptr: int, weights_ptr: int, tokens: int) -> None:
        """x float32 [tokens, hidden] -> ids int64 [tokens, top_k], weights float32 [tokens, top_k]."""

class ExpertsBlock:
    """Weighted sum of each token's experts; all of the bank must be packed.

    Args:
        clamp: alpha, limit, plus and after of `ktcore.ops.mlp.ClampedGLU` in place of the activation.
    """

    def __init__(
        self,
        pool: Pool,
        bank: ExpertBank,
        activation: str = "silu",
        weight_on_input: bool = False,
        exact: bool = False,
        clamp: tuple[float, float, float, bool] | None = None,
    ) -> None: ...
    def forward(self, x_ptr: int, ids_ptr: int, weights_ptr: int, out_ptr: int, tokens: int, top_k: int) -> None:
        """x float32 [tokens, hidden], ids int64 and weights float32 [tokens, top_k] -> out [tokens, hidden], not x.

        Negative ids are skipped. A token's result depends on neither its batch nor the threads.
        """

class MoEBlock:
    """out = (x +) experts(n, router(n)) + sigmoid(shared_gate(n)) * shared(n), n = norm(x)."""

    def __init__(
        self,
        pool: Pool,
        bank: ExpertBank,
        router: PackedMatrix,
        config: dict[str, Any],
        shared_gate_proj: PackedMatrix | None = None,
        shared_up: PackedMatrix | None = None,
        shared_down: PackedMatrix | None = None,
        shared_gate: PackedMatrix | None = None,
        norm: _F32 | None = None,
        norm_eps: float = 0.0,
        activation: str = "silu",
        weight_on_input: bool = False,
        residual: bool = True,
        exact: bool = False,
        clamp: tuple[float, float, float, bool] | None = None,
        shared_clamp: tuple[float, float, float, bool] | None = None,
    ) -> None: ...
    def forward(self, x_ptr: int, out_ptr: int, tokens: int, before_ptr: int = 0) -> None:
        """x, out: float32 [tokens, hidden]; out may be x. before: what the router sees instead of the normed x."""

class NodeTeam:
    """A pool on each NUMA node, led by a thread of its own that sleeps when idle.

    Args:
        cpus: of each node, one a thread; the leader runs on the first.
        memory: of each node, the physical id of the node that its memory is bound to; -1 leaves it to the system.
            Several may name one (virtual nodes).
    """

    def __init__(self, cpus: list[list[int]], memory: list[int]) -> None: ...
    @property
    def nodes(self) -> int: ...
    def set_few(self, format: str, tokens: int) -> None:
        """As `Pool.set_few`, on every node."""
    def set_ahead(self, format: str, bytes: int) -> None:
        """As `Pool.set_ahead`, on every node."""
    def bind(self, node: int, bank: ExpertBank) -> None:
        """Memory of the bank that nothing has touched yet will come from that node alone; RuntimeError if it cannot."""
    def pack(self, parts: list[tuple[ExpertBank, int, Any, Any, Any] | None]) -> None:
        """Packs (bank, expert, gate, up, down) of each node by that node's threads, all nodes at once."""

def bank_pages(bank: ExpertBank, samples: int = 0) -> dict[int, int]:
    """Physical node -> pages of the bank on it; -1: not touched yet. Looks at `samples` pages spread evenly; 0: all."""

class ShardedExpertsBlock:
    """Routed experts over a team: each node sums what it holds, then the nodes' sums are added in their order.

    Args:
        banks: one a node; each with its columns of all experts, or with all columns of its experts.
        first: of each node, its bank's first expert.
        experts: of the layer.
        slots: where every node holds all: weights by which each token's choices are shared out; else empty.
    """

    def __init__(
        self,
        team: NodeTeam,
        banks: list[ExpertBank],
        first: list[int],
        experts: int,
        slots: list[int] = ...,
        activation: str = "silu",
        weight_on_input: bool = False,
        exact: bool = False,
    ) -> None: ...
    def forward(self, x_ptr: int, ids_ptr: int, weights_ptr: int, out_ptr: int, tokens: int, top_k: int) -> None:
        """As `ExpertsBlock.forward`; a token's result depends on the shares, not on its batch or the threads."""

class Job:
    """One piece of host work; `Lane.start_address` and `Lane.wait_address` take its `address`."""

    @property
    def address(self) -> int: ...
    @property
    def done(self) -> bool: ...
    @property
    def error(self) -> str:
        """What the last run raised, as text; empty when it went well."""
    def start(self) -> None: ...
    def wait(self) -> None: ...

class Lane:
    """One thread that runs jobs in order; spins 40 us between them, then sleeps."""

    @property
    def start_address(self) -> int:
        """C function `void (*)(void *)` that queues the job at its argument."""
    @property
    def wait_address(self) -> int:
        """C function `void (*)(void *)` that blocks until the job at its argument is done."""
    def __init__(self) -> None: ...
    def job(self, work: Callable[[], None]) -> Job: ...
    def experts_job(
        self,
        experts: ExpertsBlock | ShardedExpertsBlock,
        x_ptr: int,
        ids_ptr: int,
        weights_ptr: int,
        out_ptr: int,
        tokens: int,
        top_k: int,
        *,
        owners: object,
    ) -> Job:
        """A job that calls `experts.forward` with these arguments each time it runs, and no Python.

        owners: what the addresses belong to; the job keeps it as long as it lives.
        """
    def close(self) -> None: ...

STAGED_ROWS: int
"""Rows before all others in the memory of `EntryAttention`, for a step's own keys."""

class EntryAttention:
    """Attention over a window of keys and compressed entries, which are rows of one memory.

    Args:
        ratio: tokens an entry; 0: there are none.
        sinks: [heads].
    """

    def __init__(
        self, pool: Pool, *, heads: int, dim: int, window: int, ratio: int, scale: float, sinks: _F32
    ) -> None: ...
    def forward(
        self,
        step: Step,
        slots: Sequence[int],
        q_ptr: int,
        k_ptr: int,
        out_ptr: int,
        base_ptr: int,
        num_slots: int,
        num_pages: int,
        page_size: int,
        kv_dtype: str,
        chosen_ptr: int,
        top_k: int,
    ) -> None:
        """out [T, heads * dim] of q and k [T, dim], rotated; rings of the slots then hold the last keys.

        Args:
            base_ptr: rows of the type: those staged, `window` a slot, entries a page.
            chosen_ptr: int32 [T, top_k], entries that each token sees, then -1; 0: all that have closed.
        """
        ...

def store_rows(
    pool: Pool,
    values_ptr: int,
    count: int,
    dim: int,
    rows: Sequence[int],
    base_ptr: int,
    num_rows: int,
    kv_dtype: str,
) -> None:
    """Write float32 values [count, dim] to rows of a memory."""

def choose_entries(
    pool: Pool,
    step: Step,
    q_ptr: int,
    weights_ptr: int,
    out_ptr: int,
    heads: int,
    dim: int,
    ratio: int,
    top_k: int,
    pages_ptr: int,
    num_pages: int,
    page_size: int,
    kv_dtype: str,
) -> None:
    """out int32 [T, top_k]: the entries that each token sees with the highest scores, rising, then -1.

    q [T, heads, dim] and weights [T, heads], both float32; pages of `page_size` tokens hold whole entries.
    """
