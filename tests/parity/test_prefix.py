"""Prompts that begin alike: what is reused, from which tier, and that answers stay those of transformers."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import ktcore
from ktcore.engine.prefix.cache import PrefixOptions
from ktcore.engine.schedule.lookahead import PromptLookup
from ktcore.engine.schedule.scheduler import Scheduled
from ktcore.engine.schedule.sequence import Finish, Sequence
from ktcore.ops.sampling import SamplingParams

from .conftest import Tiny

pytestmark = pytest.mark.usefixtures("one_thread")

PAGE = 64  # of the reference cache
NEW = 6
GREEDY = SamplingParams(temperature=0)
MEMORY = PrefixOptions(memory=2**26)
Make = Callable[[str], Tiny]


def _ids(seed: int, length: int) -> list[int]:
    return torch.randint(3, 256, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def _expected(t: Tiny, prompt: list[int], new: int = NEW) -> list[int]:
    return t.generated(torch.tensor([prompt]), new)[0].tolist()


def _open(t: Tiny, **options: Any) -> ktcore.Model:
    given = {"backend": "cpu", "rules": "reference", "context": 1024, **options}
    return ktcore.load(t.folder, **given)


def _ask(model: ktcore.Model, *prompts: list[int], new: int = NEW, params: SamplingParams = GREEDY) -> list[Sequence]:
    """All at once, to their ends."""
    sequences = [Sequence(list(p), params, new) for p in prompts]
    model._run(sequences)
    return sequences


def _computed(model: ktcore.Model) -> list[int]:
    """Grows by the tokens of every step that the model runs from now on."""
    counts: list[int] = []
    plain = model.engine.scheduler.next_batch

    def noted(*limits: int | None) -> Scheduled | None:
        batch = plain(*limits)
        if batch is not None:
            counts.append(batch.step.tokens)
        return batch

    model.engine.scheduler.next_batch = noted  # type: ignore[method-assign]
    return counts


@pytest.mark.parametrize("name", ["llama", "qwen3-moe", "v3", "mistral-window", "glm-dsa-shared"])
@pytest.mark.parametrize("rules", ["reference", None])
def test_a_second_prompt_computes_only_what_differs(tiny: Make, name: str, rules: str | None) -> None:
    t = tiny(name)
    shared = _ids(1, 150)
    prompts = [shared + _ids(2, 9), shared + _ids(3, 20)]
    with _open(t, rules=rules) as model:
        counts = _computed(model)
        (first,) = _ask(model, prompts[0])
        assert first.prefix.reused == 0
        before = sum(counts)
        (second,) = _ask(model, prompts[1])
        assert second.prefix.reused == 150 // PAGE * PAGE
        assert sum(counts) - before == len(prompts[1]) - second.prefix.reused + NEW - 1
        # an answer is part of what can be shared, and at least one token is computed
        again, turn = _ask(model, prompts[1], second.tokens + _ids(4, 40))
        assert again.prefix.reused == 128
        assert turn.prefix.reused == 128
        pages = model.engine.scheduler.pages
        assert pages.free == pages.total
    if rules == "reference":
        assert [first.tokens, second.tokens, again.tokens] == [_expected(t, p) for p in (*prompts, prompts[1])]
    with _open(t, rules=rules, prefix=None) as model:
        assert [s.tokens for p in prompts for s in _ask(model, p)] == [first.tokens, second.tokens]
        assert model.engine.prefix.stats.device == 0


def test_sequences_that_come_together_wait_for_the_one_that_computes_their_prompt(tiny: Make) -> None:
    t = tiny("qwen3-moe")
    prompt = _ids(5, 200)
    with _open(t) as model:
        model.engine.scheduler.chunk = 48
        counts = _computed(model)
        answers = _ask(model, prompt, prompt, prompt, _ids(6, 30))
        assert [s.prefix.reused for s in answers] == [0, 192, 192, 0]
        assert sum(counts) == 200 + 2 * 8 + 30 + 4 * (NEW - 1)
    assert [s.tokens for s in answers] == [_expected(t, s.tokens[: s.prompt_len]) for s in answers]


@pytest.mark.parametrize("name", ["llama", "v3", "v32"])
def test_pages_that_had_to_go_come_back_from_memory(tiny: Make, name: str) -> None:
    t = tiny(name)
    first, other = _ids(7, 180), _ids(8, 250)
    with _open(t, context=256, prefix=MEMORY) as model:
        for prompt in (first, other, first):
            (answer,) = _ask(model, prompt)
            assert answer.tokens == _expected(t, prompt)
        assert answer.prefix.reused == 128
        stats = model.engine.prefix.stats
        assert (stats.memory, stats.device, stats.disk) == (128, 0, 0)
        assert stats.asked == 180 + 250 + 180


@pytest.mark.parametrize("name", ["qwen3-moe", "qwen3-next", "kimi-linear", "v4", "glm5-next", "qwen4-exp"])
def test_pages_survive_a_restart_on_disk_unless_they_are_damaged(tiny: Make, name: str, tmp_path: Path) -> None:
    t = tiny(name)
    prompt = _ids(9, 200)
    options = PrefixOptions(folder=tmp_path)
    with _open(t, prefix=options) as model:
        _ask(model, prompt)
    files = sorted(tmp_path.rglob("*.kv"))
    states = 2 * (name != "qwen3-moe")  # behind the prompt's last full page; and the answer's, which is the same
    assert len(files) >= 3 + (states > 0)
    with _open(t, prefix=options) as model:
        (answer,) = _ask(model, prompt)
        assert answer.tokens == _expected(t, prompt)
        assert answer.prefix.reused == model.engine.prefix.stats.disk == 192
    for number, file in enumerate(files):
        content = bytearray(file.read_bytes())
        if number % 2:
            content[len(content) // 2] ^= 1
            file.write_bytes(content)
        else:
            file.write_bytes(content[: len(content) // 2])
    with _open(t, prefix=options) as model:
        (answer,) = _ask(model, prompt)
        assert answer.tokens == _expected(t, prompt)
        assert answer.prefix.reused == 0
    # written again, since the damaged ones went
    with _open(t, prefix=options) as model:
        assert _ask(model, prompt)[0].prefix.reused == 192


def test_another_model_or_layout_has_files_of_its_own_and_the_bound_is_for_all(tiny: Make, tmp_path: Path) -> None:
    prompt = _ids(10, 200)
    for name in ("qwen3-moe", "llama"):
        with _open(tiny(name), prefix=PrefixOptions(folder=tmp_path)) as model:
            assert _ask(model, prompt)[0].prefix.reused == 0
    with _open(tiny("qwen3-moe"), rules=None, prefix=PrefixOptions(folder=tmp_path)) as model:
        assert _ask(model, prompt)[0].prefix.reused == 0
    sizes = [f.stat().st_size for f in tmp_path.rglob("*.kv")]
    limit = sum(sizes) // 2
    with _open(tiny("qwen3-moe"), prefix=PrefixOptions(folder=tmp_path, disk=limit)) as model:
        assert sum(f.stat().st_size for f in tmp_path.rglob("*.kv")) <= limit
        _ask(model, _ids(11, 300))
    left = sum(f.stat().st_size for f in tmp_path.rglob("*.kv"))
    assert 0 < left <= limit


WRITER = """
import sys, torch, ktcore
from ktcore.engine.prefix.cache import PrefixOptions
from pathlib import Path
prefix = PrefixOptions(folder=Path(sys.argv[2]))
model = ktcore.load(sys.argv[1], backend="cpu", rules="reference", context=1024, prefix=prefix)
print("ready", flush=True)
for seed in range(10**6):
    ids = torch.randint(3, 256, (1, 200), generator=torch.Generator().manual_seed(seed))
    model.generate(ids, max_new_tokens=1, temperature=0)
"""


def test_a_killed_process_leaves_only_valid_pages(tiny: Make, tmp_path: Path) -> None:
    t = tiny("llama")
    for wait in (0.05, 0.3):
        process = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(t.folder), str(tmp_path)], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        assert process.stdout.readline().strip() == "ready"
        ends = time.monotonic() + 60
        while not list(tmp_path.rglob("*.kv")):
            assert time.monotonic() < ends
            time.sleep(0.01)
        time.sleep(wait)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
    with _open(t, prefix=PrefixOptions(folder=tmp_path)) as model:
        assert not list(tmp_path.rglob("*.partial"))
        prompt = _ids(0, 200)
        (answer,) = _ask(model, prompt)
        assert answer.prefix.reused == model.engine.prefix.stats.disk > 0
        assert answer.tokens == _expected(t, prompt)


@pytest.mark.parametrize("name", ["qwen3-next", "v4", "qwen4-exp"])
def test_recurrent_states_are_kept_behind_what_prompts_share(tiny: Make, name: str) -> None:
    t = tiny(name)
    shared = _ids(12, 150)
    prompts = [shared + _ids(20 + i, 100) for i in range(3)]
    with _open(t, prefix=MEMORY) as model:
        reused = []
        for prompt in prompts:
            (answer,) = _ask(model, prompt)
            assert answer.tokens == _expected(t, prompt)
            reused.append(answer.prefix.reused)
        # the second finds pages but no state behind them, and leaves one there for the third
        assert reused == [0, 0, 128]
        (turn,) = _ask(model, answer.tokens + _ids(30, 30))
        assert turn.tokens == _expected(t, answer.tokens + _ids(30, 30))
        assert turn.prefix.reused == 192
    with _open(t) as model:
        assert "recurrent states" in model.engine.prefix.off
        assert [_ask(model, prompts[0])[0].prefix.reused for _ in range(2)] == [0, 0]


@pytest.mark.parametrize(
    ("name", "prefix"),
    [
        ("qwen3-moe", None),
        ("qwen3-moe", MEMORY),
        ("qwen3-next", MEMORY),
        ("qwen4-exp", MEMORY),
        ("v4", MEMORY),
        ("v32", MEMORY),
    ],
)
def test_answers_that_outgrow_the_pages_make_room_and_come_back(
    tiny: Make, name: str, prefix: PrefixOptions | None
) -> None:
    t = tiny(name)
    prompts = [_ids(40 + i, 60) for i in range(4)]
    with _open(t, context=5 * PAGE, prefix=prefix) as model:
        sequences = [Sequence(list(p), GREEDY, 120, user=str(i)) for i, p in enumerate(prompts)]
        sampled = Sequence(_ids(50, 30), SamplingParams(temperature=1, seed=3), 100, top_logprobs=1)
        model._run([*sequences, sampled])
        assert model.engine.scheduler.preemptions > 0
        for prompt, sequence in zip(prompts, sequences, strict=True):
            assert sequence.tokens[:60] == prompt
            assert sequence.new_tokens == t.likeliest(sequence.tokens)[59:-1]
            assert len(sequence.new_tokens) == 120
        pages = model.engine.scheduler.pages
        assert pages.free == pages.total
        alone = Sequence(_ids(50, 30), SamplingParams(temperature=1, seed=3), 100, top_logprobs=1)
        model._run([alone])
        assert sampled.tokens == alone.tokens
        assert [c.token for c in sampled.chosen] == [c.token for c in alone.chosen] == alone.new_tokens


def test_what_a_failed_step_has_written_is_not_shared(tiny: Make) -> None:
    t = tiny("qwen3-moe")
    prompt = _ids(60, 200)
    with _open(t) as model:
        plain = model.engine.model.head

        def broken(*words: Any) -> torch.Tensor:
            raise ArithmeticError("broken on purpose")

        object.__setattr__(model.engine.model, "head", broken)
        with pytest.raises(ArithmeticError):
            _ask(model, prompt)
        object.__setattr__(model.engine.model, "head", plain)
        (answer,) = _ask(model, prompt)
        assert answer.prefix.reused == 0
        assert answer.tokens == _expected(t, prompt)


def test_logits_are_computed_for_every_token(tiny: Make) -> None:
    t = tiny("llama")
    with _open(t) as model:
        for _ in range(2):
            torch.testing.assert_close(model.logits(t.ids), t.logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("callback", ["none", "eager", "capturable"])
def test_pages_go_to_a_device_and_come_back(tiny: Make, callback: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ktcore_sim._C", reason="the simulated accelerator is not built: pip install ./backends/sim")
    monkeypatch.setenv("KTCORE_SIM_HOST_CALLBACK", callback)
    monkeypatch.setenv("KTCORE_SIM_DELAY_US", "100")
    t = tiny("v3")
    first, other = _ids(70, 180), _ids(71, 250)
    with ktcore.load(t.folder, backend="sim", context=256, prefix=MEMORY) as model:
        for prompt in (first, other, first):
            (answer,) = _ask(model, prompt)
            assert answer.tokens == _expected(t, prompt)
        assert model.engine.prefix.stats.memory == 128


@pytest.mark.parametrize("params", [GREEDY, SamplingParams(temperature=0.8, top_p=0.9, seed=5)])
@pytest.mark.parametrize("name", ["llama", "v3", "v32", "v4"])
def test_guesses_change_no_answer_and_save_steps(tiny: Make, name: str, params: SamplingParams) -> None:
    t = tiny(name)
    prompt = _ids(80, 40)
    bias = {int(i): 8.0 for i in _ids(81, 4)}  # few tokens, so that the answer repeats itself
    params = SamplingParams(**{**params.__dict__, "logit_bias": bias})
    with _open(t, prefix=None) as model:
        counts = _computed(model)
        (plain,) = _ask(model, prompt, new=80, params=params)
        steps = len(counts)
        guessed = [Sequence(list(prompt), params, 80, lookup=PromptLookup(4)), Sequence(_ids(82, 10), GREEDY, 40)]
        model._run(guessed)
        assert guessed[0].tokens == plain.tokens
        assert guessed[1].tokens == _expected(t, _ids(82, 10), 40)
        assert guessed[0].finish is Finish.LENGTH
        assert len(counts) - steps < steps
        pages = model.engine.scheduler.pages
        assert pages.free == pages.total
    assert len(set(plain.new_tokens)) < 20


def test_prompt_lookup_is_an_option_of_generate(tiny: Make) -> None:
    t = tiny("llama")
    prompt = torch.tensor([_ids(83, 20)])
    with _open(t) as model:
        out = model.generate(prompt, max_new_tokens=12, temperature=0, prompt_lookup=3)
        assert out.tolist() == t.generated(prompt, 12).tolist()
