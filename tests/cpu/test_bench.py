"""The bench command: what it counts, and the limits it measures against. No figure here is a speed to keep."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
from ktcore_cpu import _native, bench, bench_table
from ktcore_cpu.bench_parts import routing

SMALL = [
    "--hidden",
    "256",
    "--intermediate",
    "256",
    "--experts",
    "8",
    "--top-k",
    "2",
    "--tokens",
    "1,4",
    "--rounds",
    "1",
]


@pytest.mark.parametrize("fmt", ["Q4_K/Q6_K", "INT4_G64", "F8_E4M3_G128", "BF16/F16/F32", "MXFP4"])
def test_any_format_is_timed(fmt: str, capsys: pytest.CaptureFixture[str]) -> None:
    bench.main([*SMALL, "--format", fmt, "--json"])
    report = json.loads(capsys.readouterr().out)
    assert [r["tokens"] for r in report["rows"]] == [1, 4]
    assert all(report["limits"][k] > 0 for k in ("read", "int8", "f32"))
    for row in report["rows"]:
        seconds = row["tokens"] / row["tokens_per_second"]
        assert row["tops"] == pytest.approx(2 * 3 * 256 * 256 * 2 * row["tokens"] / seconds / 1e12)
        assert row["read_share"] == pytest.approx(row["gb_per_second"] * 1e9 / report["limits"]["read"])
        # the time the three matrices' arithmetic takes at its limits, over the time taken: a share above 1 is no error
        # of this count, only of a machine that was slower while its limits were measured than afterwards
        limits = bench.Limits(**report["limits"])
        least = sum(2 * row["tokens"] * 2 * 256 * 256 / limits.of(f) for f in bench.parse_formats(fmt))
        assert row["arithmetic_share"] == pytest.approx(least / seconds)
    # one token reads the bytes of two experts
    one = report["rows"][0]
    formats = bench.parse_formats(fmt)
    stored = sum(256 * 256 // _native.formats()[f][0] * _native.formats()[f][1] for f in formats)
    assert one["gb_per_second"] * 1e9 / one["tokens_per_second"] == pytest.approx(2 * stored, rel=0.15)


def test_a_table_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    bench.main([*SMALL, "--format", "Q8_0", "--routing", "zipf"])
    out = capsys.readouterr().out
    assert "8 experts of 256 x 256, top 2, Q8_0/Q8_0/Q8_0, zipf" in out
    assert "limits: read" in out
    assert len(out.splitlines()) == 5


def test_a_drop_is_marked(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = bench.Shape(32, 32, 4, 2, ("Q8_0",) * 3)
    layer = bench.random_layer(shape, bench.ExpertPool(1))
    monkeypatch.setattr(bench, "seconds", lambda layer, x, *rest: {1: 1.0, 2: 2.1, 4: 5.0}[len(x)])
    rows = bench.measure(layer, shape, [1, 2, 4], bench.Limits(), 1)
    assert [r.drop for r in rows] == [False, False, True]
    assert [r.tokens_per_second for r in rows] == pytest.approx([1, 2 / 2.1, 0.8])


@pytest.mark.parametrize("kind", ["uniform", "zipf"])
def test_routing_chooses_each_expert_once_a_token(kind: str) -> None:
    shape = bench.Shape(32, 32, 64, 8, ("Q8_0",) * 3, kind)
    ids = routing(shape, 2000, np.random.default_rng(0))
    assert all(len(set(row)) == 8 for row in ids.tolist())
    shares = np.sort(np.bincount(ids.reshape(-1), minlength=64) / ids.size)[::-1]
    if kind == "uniform":
        assert shares[0] < 1.4 / 64
    else:
        assert shares[0] > 4 * shares[20]


def test_the_table_has_every_format_on_every_instruction_set_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    isas = _native.isa_supported()[:2]
    bench.main([*SMALL, "--all", "--format", "Q4_K/F16", "--isa", ",".join(isas), "--json"])
    report = json.loads(capsys.readouterr().out)
    rows = report["rows"]
    assert [(r["format"], r["isa"]) for r in rows] == [(f, i) for f in ("Q4_K", "F16") for i in isas]
    for row in rows:
        # 4.5 and 16 bits in the file, and as many packed
        assert row["bits"] == pytest.approx({"Q4_K": 4.5, "F16": 16}[row["format"]])
        assert row["one_gb_per_second"] * 8 == pytest.approx(row["one_gw_per_second"] * row["bits"])
        assert row["many_tops"] * 1000 == pytest.approx(2 * row["many_gw_per_second"])
        assert min(row["read_share"], row["peak_share"]) > 0


def test_the_table_for_people_has_a_line_for_each(capsys: pytest.CaptureFixture[str]) -> None:
    bench.main([*SMALL, "--all", "--format", "Q8_0"])
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("8 experts of 256 x 256, top 2; ")
    assert out[1] == bench_table.HEADER
    assert [line.split()[2] for line in out[2:]] == bench_table.known_isas(None)


def test_a_table_leaves_the_instruction_set_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    for before in ("scalar", None):
        monkeypatch.delenv("KTCORE_ISA", raising=False)
        if before is not None:
            monkeypatch.setenv("KTCORE_ISA", before)
        with bench_table.forced("avx2"):
            assert os.environ["KTCORE_ISA"] == "avx2"
        assert os.environ.get("KTCORE_ISA") == before


@pytest.mark.parametrize("isa", _native.isa_supported() + _native.isa_emulated())
def test_peaks_of_every_instruction_set(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KTCORE_ISA", isa)
    pool = _native.Pool(1)
    rates = {kind: _native.peak_rate(pool, kind, 0.02) for kind in ("int8", "bf16", "f32")}
    assert min(rates["int8"], rates["f32"]) > 0
    assert (rates["bf16"] > 0) == (isa in ("avx512_bf16", "amx", "amx_emulated"))


def test_misuse_is_told() -> None:
    pool = _native.Pool(1)
    with pytest.raises(ValueError, match="int8, bf16, f32"):
        _native.peak_rate(pool, "int4")
    with pytest.raises(ValueError, match="seconds"):
        _native.peak_rate(pool, "int8", 0)
    for wrong, text in (
        (["--format", "Q9"], "unknown format Q9"),
        (["--format", "Q8_0/Q8_0/Q8_0/Q8_0"], "more than three"),
        (["--format", "Q4_K", "--hidden", "100"], "multiple of Q4_K's block of 256"),
        (["--top-k", "9"], "top-k"),
        (["--isa", "avx2"], "--all"),
        (["--all", "--isa", "sse9"], "does not run sse9"),
        (["--all", "--format", "Q9"], "unknown format Q9"),
        (["--all", "--format", "Q8_0", "--top-k", "9"], "top-k"),
    ):
        with pytest.raises(SystemExit, match=text):
            bench.main([*SMALL, *wrong])
