"""Experts over virtual nodes: several teams' nodes on the CPUs and the one memory node that this machine has."""

from __future__ import annotations

from itertools import accumulate

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ktcore_cpu import _native
from ktcore_cpu.numa.module import slice_expert

from .blocks import random_blocks, reference
from .test_experts import Dense, batch, error, expected, make_bank, run

HIDDEN = 256
Raws = list[list[np.ndarray]]


def team_of(nodes: int) -> _native.NodeTeam:
    """Nodes with one thread, the first with two: uneven ones must not matter."""
    cpus = [[0, 1] if i == 0 else [i % 2] for i in range(nodes)]
    return _native.NodeTeam(cpus, [0] * nodes)


def raw_experts(formats: tuple[str, str, str], experts: int, width: int) -> Raws:
    """The bytes that `make_bank` packs."""
    shapes = ((width, HIDDEN), (width, HIDDEN), (HIDDEN, width))
    return [
        [random_blocks(f, *shape, 10 * e + i) for i, (f, shape) in enumerate(zip(formats, shapes, strict=True))]
        for e in range(experts)
    ]


def spread(
    team: _native.NodeTeam,
    raws: Raws,
    formats: tuple[str, str, str],
    width: int,
    columns: list[tuple[int, int]],
    held: list[tuple[int, int]],
    slots: list[int],
    exact: bool = False,
    activation: str = "silu",
    on_input: bool = False,
) -> tuple[_native.ShardedExpertsBlock, list[_native.ExpertBank]]:
    banks = []
    for node, ((c0, c1), (e0, e1)) in enumerate(zip(columns, held, strict=True)):
        bank = _native.ExpertBank(e1 - e0, HIDDEN, c1 - c0, *formats)
        team.bind(node, bank)
        banks.append(bank)
    block = _native.formats()[formats[2]]
    for e, parts in enumerate(raws):
        team.pack(
            [
                (bank, e - h[0], *slice_expert(parts, c, block)) if h[0] <= e < h[1] else None
                for bank, c, h in zip(banks, columns, held, strict=True)
            ]
        )
    first = [h[0] for h in held]
    made = _native.ShardedExpertsBlock(team, banks, first, len(raws), slots, activation, on_input, exact)
    return made, banks


def cuts(parts: list[int], unit: int = 1) -> list[tuple[int, int]]:
    ends = [unit * n for n in accumulate(parts)]
    return list(zip([0, *ends[:-1]], ends, strict=True))


def bound(x: np.ndarray, ids: np.ndarray, weights: np.ndarray, dense: Dense, nodes: int) -> np.ndarray:
    """How far two orders of the same float32 sum can lie apart.

    Both compute the same terms: gate and up run over all of hidden, a shard begins at a multiple of 32 columns, and
    activations are quantised in groups of 16, so every code and every scale is the same to the last bit. A sum of n
    terms in any order is within (n - 1) u sum|term| (1 + O(n u)) of the exact one, u = 2^-24 (Higham, Accuracy and
    Stability, 4.2); two orders are within twice that. n counts at most a float addition for each column (float formats;
    integer formats add far fewer group sums, each with up to 4 roundings of its own), one for each choice, node and the
    weight's product.
    """
    width, top_k = dense[0].shape[1], ids.shape[1]
    gate, up, down = (d.numpy() for d in dense)
    size = np.zeros((len(x), HIDDEN))
    for t in range(len(x)):
        for j in range(top_k):
            e = ids[t, j]
            if e < 0:
                continue
            g, u = gate[e] @ x[t], up[e] @ x[t]
            mid = np.abs(g / (1 + np.exp(-g)) * u)
            size[t] += np.abs(weights[t, j]) * (np.abs(down[e]) @ mid)
    # 1.1: sizes are those of unquantised activations. Minima (Q4_1, Q4_K ...) would be terms of their own: none in down
    return 2 * (width + top_k + nodes + 4) * 2.0**-24 * size * 1.1


@pytest.mark.parametrize("nodes", [1, 2, 4, 8])
@pytest.mark.parametrize(
    ("formats", "exact"),
    [(("Q8_0", "Q8_0", "Q8_0"), False), (("Q4_K", "Q4_K", "Q5_0"), False), (("F16", "Q4_0", "BF16"), True)],
)
def test_shards_sum_to_the_whole_within_the_reordering_bound(
    nodes: int, formats: tuple[str, str, str], exact: bool
) -> None:
    width, experts = 320, 5
    pool = _native.Pool(2)
    bank, dense = make_bank(pool, formats, experts, HIDDEN, width)
    whole = _native.ExpertsBlock(pool, bank, exact=exact)
    columns = cuts({1: [10], 2: [3, 7], 4: [2, 5, 1, 2], 8: [3, 1, 1, 1, 1, 1, 1, 1]}[nodes], 32)
    made, _ = spread(
        team_of(nodes), raw_experts(formats, experts, width), formats, width, columns, [(0, experts)] * nodes, [], exact
    )
    for tokens in (1, 2, 17, 300):
        x, ids, weights = batch(tokens, HIDDEN, experts, 3, masked=0.2)
        one, got = run(whole, x, ids, weights), run(made, x, ids, weights)
        assert (np.abs(got - one) <= bound(x, ids, weights, dense, nodes)).all()
        assert error(got, expected(x, ids, weights, dense)) < (3e-6 if exact else 0.02)
        np.testing.assert_array_equal(run(made, x, ids, weights), got)
        np.testing.assert_array_equal(got[(ids < 0).all(1)], 0)
        if nodes == 1:
            np.testing.assert_array_equal(got, one)


def test_k_quants_are_cut_by_256_columns() -> None:
    formats, width = ("Q4_K", "Q4_K", "Q6_K"), 768
    pool = _native.Pool(2)
    bank, dense = make_bank(pool, formats, 3, HIDDEN, width)
    made, _ = spread(
        team_of(2), raw_experts(formats, 3, width), formats, width, [(0, 512), (512, 768)], [(0, 3)] * 2, []
    )
    x, ids, weights = batch(40, HIDDEN, 3, 2)
    one = run(_native.ExpertsBlock(pool, bank), x, ids, weights)
    assert (np.abs(run(made, x, ids, weights) - one) <= bound(x, ids, weights, dense, 2)).all()
    with pytest.raises(ValueError, match="whole blocks of 256"):
        slice_expert(raw_experts(formats, 1, width)[0], (0, 96), _native.formats()["Q6_K"])


@pytest.mark.parametrize("on_input", [False, True])
@pytest.mark.parametrize(("held", "slots"), [([1, 4, 2], []), ([7, 7, 7], [1, 2, 1]), ([7, 7, 7], [5, 1, 1])])
def test_experts_apart_and_experts_everywhere(held: list[int], slots: list[int], on_input: bool) -> None:
    formats, width, experts = ("Q8_0", "Q8_0", "Q8_0"), 64, 7
    pool = _native.Pool(2)
    bank, dense = make_bank(pool, formats, experts, HIDDEN, width)
    whole = _native.ExpertsBlock(pool, bank, "gelu_tanh", on_input)
    ranges = [(0, experts)] * 3 if slots else cuts(held)
    made, _ = spread(
        team_of(3),
        raw_experts(formats, experts, width),
        formats,
        width,
        [(0, width)] * 3,
        ranges,
        slots,
        activation="gelu_tanh",
        on_input=on_input,
    )
    for tokens, top_k in ((1, 1), (1, 4), (33, 2), (300, 4)):
        x, ids, weights = batch(tokens, HIDDEN, experts, top_k, masked=0.1)
        want = expected(x, ids, weights, dense, "gelu_tanh", on_input)
        one, got = run(whole, x, ids, weights), run(made, x, ids, weights)
        # the same products, added in another order: at most 3 nodes and 4 choices
        assert np.abs(got - one).max() <= 8 * 2.0**-24 * np.abs(want).max() * 4
        assert error(got, want) < 0.02
        np.testing.assert_array_equal(run(made, x, ids, weights), got)
        if top_k == 1:
            np.testing.assert_array_equal(got, one)


def test_a_result_depends_on_neither_batch_nor_earlier_calls() -> None:
    formats, experts, width = ("Q4_0",) * 3, 6, 96
    raws = raw_experts(formats, experts, width)
    x, ids, weights = batch(2500, HIDDEN, experts, 3, masked=0.1)
    for columns, held, slots in (
        (cuts([1, 2], 32), [(0, experts)] * 2, []),
        ([(0, width)] * 2, cuts([2, 4]), []),
        ([(0, width)] * 2, [(0, experts)] * 2, [1, 2]),
    ):
        made, _ = spread(team_of(2), raws, formats, width, columns, held, slots)
        whole = run(made, x, ids, weights)
        for part in (slice(0, 1), slice(7, 300), slice(2040, 2060)):
            alone = run(made, *(np.ascontiguousarray(a[part]) for a in (x, ids, weights)))
            np.testing.assert_array_equal(alone, whole[part])


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_cut_computes_the_layer(data: st.DataObject) -> None:
    experts = data.draw(st.integers(2, 6))
    pieces = data.draw(st.lists(st.integers(1, 3), min_size=1, max_size=4))
    format = data.draw(st.sampled_from(["Q8_0", "Q4_1", "BF16"]))
    tokens, top_k = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 4))
    width = 32 * sum(pieces)
    formats = (format,) * 3
    _, dense = make_bank(_native.Pool(1), formats, experts, HIDDEN, width)
    n = len(pieces)
    made, _ = spread(
        team_of(n), raw_experts(formats, experts, width), formats, width, cuts(pieces, 32), [(0, experts)] * n, [], True
    )
    x, ids, weights = batch(tokens, HIDDEN, experts, top_k, masked=data.draw(st.sampled_from([0.0, 0.5, 1.0])))
    want = expected(x, ids, weights, dense)
    np.testing.assert_allclose(run(made, x, ids, weights), want, atol=3e-6 * max(1e-30, np.abs(want).max()) * 4, rtol=0)


def test_pages_are_bound_and_found() -> None:
    formats = ("Q8_0",) * 3
    team = team_of(2)
    bank = _native.ExpertBank(64, HIDDEN, 256, *formats)
    team.bind(0, bank)
    assert set(_native.bank_pages(bank)) == {-1}
    pages = -(-bank.nbytes // 4096)
    (raws,) = raw_experts(formats, 1, 256)
    for e in range(64):
        team.pack([(bank, e, *raws), None])
    assert _native.bank_pages(bank) == {0: pages}
    assert _native.bank_pages(bank, 100) == {0: 100}


def test_a_node_that_is_not_there_is_refused() -> None:
    bank = _native.ExpertBank(2, HIDDEN, 64, "Q8_0", "Q8_0", "Q8_0")
    team = _native.NodeTeam([[0], [1]], [0, 999])
    with pytest.raises(RuntimeError, match="NUMA node 999"):
        team.bind(1, bank)
    with pytest.raises(ValueError, match="no such node"):
        team.bind(2, bank)
    free = _native.NodeTeam([[0]], [-1])
    free.bind(0, bank)


def test_misuse_is_refused() -> None:
    formats, raws = ("Q8_0",) * 3, raw_experts(("Q8_0",) * 3, 2, 64)
    with pytest.raises(ValueError, match="needs a node"):
        _native.NodeTeam([], [])
    with pytest.raises(ValueError, match="needs a CPU"):
        _native.NodeTeam([[]], [0])
    with pytest.raises(ValueError, match="may use"):
        _native.NodeTeam([[0], [100000]], [0, 0])
    team = team_of(2)
    with pytest.raises(ValueError, match="bytes"):
        bank = _native.ExpertBank(1, HIDDEN, 64, *formats)
        team.pack([(bank, 0, raws[0][0], raws[0][1], raws[0][2][:5]), None])
    with pytest.raises(ValueError, match="without a gap"):
        spread(team, raws, formats, 64, [(0, 64)] * 2, [(0, 1), (0, 1)], [])
    with pytest.raises(ValueError, match="1 of 2"):
        spread(_native.NodeTeam([[0]], [0]), raws, formats, 64, [(0, 64)], [(0, 1)], [])
    with pytest.raises(ValueError, match="hold all"):
        spread(team, raws, formats, 64, [(0, 64)] * 2, [(0, 1), (1, 2)], [1, 1])
    made, _ = spread(team, raws, formats, 64, [(0, 32), (32, 64)], [(0, 2)] * 2, [])
    x, ids, weights = batch(2, HIDDEN, 2, 2)
    ids[1, 1] = 2
    with pytest.raises(ValueError, match="expert 2"):
        run(made, x, ids, weights)


def test_reference_of_a_column_slice_is_the_slice_of_the_reference() -> None:
    for format in ("Q4_0", "Q8_0", "BF16", "F32"):
        raws = [random_blocks(format, 96, 64, 1), random_blocks(format, 96, 64, 2), random_blocks(format, 64, 96, 3)]
        gate, up, down = slice_expert(raws, (32, 96), _native.formats()[format])
        np.testing.assert_array_equal(reference(format, gate, 64, 64), reference(format, raws[0], 96, 64)[32:])
        np.testing.assert_array_equal(reference(format, up, 64, 64), reference(format, raws[1], 96, 64)[32:])
        np.testing.assert_array_equal(reference(format, down, 64, 64), reference(format, raws[2], 64, 96)[:, 32:])
