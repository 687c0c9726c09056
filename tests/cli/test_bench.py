"""`ktcore bench`: its JSON, and the bytes that it says a decode step reads."""

from __future__ import annotations

from pathlib import Path

import pytest
from ktcore_cpu import _native
from transformers import AutoModelForCausalLM

from ktcore.cli.measure import Timer, decode_read_bytes, host_runtime, speeds
from ktcore.engine.model import load
from ktcore.engine.stream import Stats
from ktcore.rules.prepare import prepare

from .conftest import SIZES, Run

PROMISED = {"prefill_tok_s", "decode_tok_s", "load_s", "peak_rss_bytes", "read_gb_s", "decode_read_share"}


def test_json_has_the_promised_keys(ktcore: Run, tiny_llama: Path) -> None:
    found = ktcore(
        "bench", tiny_llama, "-p", 24, "-n", 3, "--rounds", 2, "--threads", 1, "--backend", "cpu", "--json"
    ).json
    assert set(found) >= PROMISED
    assert all(found[key] > 0 for key in PROMISED)
    assert len(found["rounds"]) == 2
    assert (found["threads"], found["prompt_tokens"], found["new_tokens"]) == (1, 24, 3)
    assert found["isa"] in _native.isa_supported()
    share = found["decode_read_bytes"] * found["decode_tok_s"] / (found["read_gb_s"] * 1e9)
    assert found["decode_read_share"] == pytest.approx(share)


def test_a_drafter_is_timed_with_the_share_of_its_guesses_that_were_right(ktcore: Run, tiny_llama: Path) -> None:
    words = ("bench", tiny_llama, "-p", 24, "-n", 8, "--rounds", 1, "--backend", "cpu")
    assert ktcore(*words, "--json").json["guesses"] is None
    found = ktcore(*words, "--draft", f"{tiny_llama}:3", "--json").json
    assert found["guesses"]["by"] == "model"
    assert found["guesses"]["share"] == found["guesses"]["right"] / found["guesses"]["tokens"] > 0.9  # it is itself
    assert "guesses right" in ktcore(*words, "--draft", f"{tiny_llama}:3").out
    refused = ktcore(*words, "--draft", "mtp")
    assert refused.code == 1
    assert "is not known to have a layer that predicts further tokens" in refused.err


@pytest.mark.parametrize(
    ("stats", "said"),
    [
        (Stats(31, 0, 12, 0.5, 1.0), "prefill 31 tokens at 62.0 tok/s, decode 12 tokens at 11.0 tok/s"),
        (Stats(31, 30, 12, 0.5, 1.0), "prefill 31 tokens, 30 of them kept from before, at 62.0 tok/s, decode 12"),
        (
            Stats(31, 0, 12, 0.5, 1.0, 9, 6),
            "prefill 31 tokens at 62.0 tok/s, decode 12 tokens at 11.0 tok/s, 6 of 9 gue",
        ),
        (Stats(1, 0, 1, 0.5, 0.0), "prefill 1 token at 2.0 tok/s, 1 token drawn"),
        (Stats(31, 0, 0, 0.5, 0.0), "prefill 31 tokens at 62.0 tok/s, no tokens drawn"),
        (Stats(31, 0, 2, 0.5, 0.0), "prefill 31 tokens at 62.0 tok/s, 2 tokens drawn"),
    ],
)
def test_a_speed_is_told_only_of_what_was_timed(stats: Stats, said: str) -> None:
    assert speeds(stats).startswith(said)


def test_one_token_is_timed_and_a_clock_that_stands_still_divides_by_nothing(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with load(tiny_llama, backend="cpu", context=32) as model:
        monkeypatch.setattr("ktcore.cli.measure.time.perf_counter", lambda: 5.0)
        timed = Timer(model, prompt=1, new=1).round()
    assert timed.prefill_tok_s > 0
    assert timed.decode_tok_s > 0


def test_the_table_names_every_figure(ktcore: Run, tiny_llama: Path) -> None:
    done = ktcore("bench", tiny_llama, "-p", 8, "-n", 2, "--rounds", 1)
    assert done.code == 0
    for word in ("prefill", "decode", "load", "peak memory", "memory reads", "decode's share", "GB/s"):
        assert word in done.out


def test_a_round_draws_exactly_the_tokens_asked_for(tiny_llama: Path) -> None:
    with load(tiny_llama, backend="cpu", context=32) as model:
        drawn = []
        model.engine.scheduler.retire = watching(model.engine.scheduler, drawn)  # type: ignore[method-assign]
        timer = Timer(model, prompt=7, new=5)
        drawn.clear()
        timer.round()
        assert drawn[-1] == 6  # prefill draws the first, decode five
        assert host_runtime(model) is not None


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_moe"])
def test_a_decode_step_reads_the_dense_part_and_the_chosen_experts(name: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(name)
    expected = 0.0
    for key, value in AutoModelForCausalLM.from_pretrained(folder).named_parameters():
        share = 1 / SIZES["vocab_size"] if "embed_tokens" in key else 2 / 8 if ".experts." in key else 1.0
        expected += 4 * value.numel() * share
    prepared = prepare(folder, backend="cpu", rules="reference")
    prepared.checkpoint.close()
    assert decode_read_bytes(prepared.plan, {"cpu:0"}) == pytest.approx(expected, rel=1e-6)
    assert decode_read_bytes(prepared.plan, {"elsewhere:0"}) == 0


def watching(scheduler: object, drawn: list[int]):  # type: ignore[no-untyped-def]
    """The scheduler's `retire`, which notes how many tokens each sequence that ends has drawn."""
    original = scheduler.retire  # type: ignore[attr-defined]

    def retire() -> None:
        drawn.extend(len(s.new_tokens) for s in scheduler.running if s.finish is not None)  # type: ignore[attr-defined]
        original()

    return retire
