"""Drafts of checkpoints' own layers for further tokens, beside transformers'; answers are those without drafts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import ktcore
from ktcore.engine.prefix.cache import PrefixOptions
from ktcore.engine.schedule.sequence import Sequence
from ktcore.engine.step.runner import LoadedModel
from ktcore.ops.batch import StepBatch
from ktcore.ops.sampling import SamplingParams

from .further import Further, further_folder

pytestmark = pytest.mark.usefixtures("one_thread")

GREEDY = SamplingParams(temperature=0)
FAMILIES = ["v3", "glm4-moe", "glm4-lite", "hy3", "v32", "glm-dsa", "qwen3-next", "qwen3.5", "qwen3.5-moe"]
Make = Callable[[str], Further]


@pytest.fixture(scope="module")
def further(tmp_path_factory: pytest.TempPathFactory) -> Make:
    made: dict[str, Further] = {}

    def get(name: str) -> Further:
        if name not in made:
            made[name] = further_folder(name, tmp_path_factory.mktemp(name))
        return made[name]

    return get


def _ids(seed: int, length: int) -> list[int]:
    return torch.randint(3, 256, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def _open(folder: Path, **options: Any) -> ktcore.Model:
    given = {"backend": "cpu", "rules": "reference", "context": 1024, **options}
    return ktcore.load(folder, **given)


def _drafted(model: ktcore.Model) -> list[torch.Tensor]:
    """Grows by the logits [n, vocab] of every draft that the model makes from now on."""
    found: list[torch.Tensor] = []
    head, propose = model.engine.model.head, model.engine.drafter._propose  # type: ignore[union-attr]

    def noted(*args: Any) -> None:
        def heard(x: torch.Tensor) -> torch.Tensor:
            found.append(head(x).clone())
            return found[-1]

        object.__setattr__(model.engine.model, "head", heard)
        propose(*args)
        object.__setattr__(model.engine.model, "head", head)

    model.engine.drafter._propose = noted  # type: ignore[union-attr]
    return found


@pytest.mark.parametrize("name", FAMILIES)
def test_drafts_are_those_of_the_formula_with_transformers_layers(further: Make, name: str) -> None:
    made, prompt = further(name), _ids(1, 40)
    with _open(made.folder, draft="mtp:3") as model:
        model.engine.scheduler.chunk = 17
        drafted = _drafted(model)
        sequence = Sequence(list(prompt), GREEDY, 8, drafts=model.engine.drafts(None))
        model.engine.add(sequence)
        while not sequence.new_tokens:
            model.engine.step()
        first = [*prompt, sequence.new_tokens[0]]
        assert sequence.drafts is not None
        chain = list(sequence.drafts.ids)
        assert len(chain) == len(drafted) == 3
        torch.testing.assert_close(drafted[0], made.logits(first)[-1:], rtol=0, atol=1e-4)
        torch.testing.assert_close(torch.cat(drafted[1:]), made.logits(first, chain[:2]), rtol=0, atol=1e-4)
        while sequence.finish is None:
            count = len(drafted)
            model.engine.step()
            if len(drafted) > count:  # behind right and wrong guesses alike
                torch.testing.assert_close(drafted[count], made.logits(sequence.tokens)[-1:], rtol=0, atol=1e-4)


def _hidden_first(model: LoadedModel, normed: torch.Tensor, step: StepBatch) -> torch.Tensor:
    further, project = model.further, model.further.project  # type: ignore[union-attr]
    turned = replace(further, project=lambda x: project(torch.cat(x.chunk(2, -1)[::-1], -1)))  # type: ignore[type-var]
    return LoadedModel.further_states(replace(model, further=turned), normed, step)


def _model_norm_last(model: LoadedModel, normed: torch.Tensor, step: StepBatch) -> torch.Tensor:
    turned = replace(model.further, norm=model.norm)  # type: ignore[type-var]
    return LoadedModel.further_states(replace(model, further=turned), normed, step)


def _unnormed(model: LoadedModel, normed: torch.Tensor, step: StepBatch) -> torch.Tensor:
    turned = replace(model.further, hidden_norm=lambda x: x)  # type: ignore[type-var]
    return LoadedModel.further_states(replace(model, further=turned), normed, step)


def _own_token(model: LoadedModel, normed: torch.Tensor, step: StepBatch) -> torch.Tensor:
    return LoadedModel.further_states(model, normed, replace(step, token_ids=torch.roll(step.token_ids, 1)))


@pytest.mark.parametrize("wrong", [_hidden_first, _model_norm_last, _unnormed, _own_token])
@pytest.mark.parametrize("name", ["v3", "qwen3.5"])
def test_each_part_of_the_formula_moves_the_drafts(further: Make, name: str, wrong: Any) -> None:
    made, prompt = further(name), _ids(1, 40)
    with _open(made.folder, draft="mtp:1") as model:
        drafted = _drafted(model)
        loaded = model.engine.model
        object.__setattr__(loaded, "further_states", lambda normed, step: wrong(loaded, normed, step))
        sequence = Sequence(list(prompt), GREEDY, 4, drafts=model.engine.drafts(None))
        model._run([sequence])
        wanted = made.logits([*prompt, sequence.new_tokens[0]])[-1:]
        assert (drafted[0] - wanted).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["v3", "glm4-moe"])
def test_drafts_are_those_of_transformers_own_layer(further: Make, name: str) -> None:
    made, prompt = further(name), _ids(2, 33)
    main, layer = made.oracle()
    with torch.no_grad():
        out = main(torch.tensor([prompt]), output_hidden_states=True)
        shifted = torch.tensor([[*prompt[1:], int(out.logits[0, -1].argmax())]])
        positions = torch.arange(1, len(prompt) + 1)[None]
        wanted, logits, _ = layer(shifted, out.hidden_states[-1], None, positions, None)
        plain = main.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=None)
        theirs = main.generate(
            torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=None, use_mtp=True
        )
    with _open(made.folder, draft="mtp:1") as model:
        drafted = _drafted(model)
        sequence = Sequence(list(prompt), GREEDY, 12, drafts=model.engine.drafts(None))
        model._run([sequence])
        torch.testing.assert_close(drafted[0], logits[0, :1], rtol=0, atol=1e-4)
        assert int(drafted[0].argmax()) == int(wanted)
    assert sequence.tokens == plain[0].tolist() == theirs[0].tolist()


@pytest.mark.parametrize("name", ["v3", "glm-dsa", "qwen3.5-moe"])
@pytest.mark.parametrize(
    "params",
    [
        GREEDY,
        SamplingParams(temperature=0, repetition_penalty=1.3, presence_penalty=0.5),
        SamplingParams(temperature=1.2, seed=5),
        SamplingParams(temperature=0.8, top_k=9, seed=6, frequency_penalty=0.4),
    ],
)
def test_answers_are_those_without_drafts_whoever_runs_beside(further: Make, name: str, params: SamplingParams) -> None:
    prompts = [_ids(3, 50), _ids(4, 7), _ids(5, 90), _ids(4, 7)]
    with _open(further(name).folder) as model:
        plain = [Sequence(list(p), params, 20 + i) for i, p in enumerate(prompts)]
        for sequence in plain:
            model._run([sequence])
    with _open(further(name).folder, draft="mtp:2") as model:
        model.engine.scheduler.chunk = 33
        some = [
            Sequence(list(p), params, 20 + i, drafts=model.engine.drafts(most))
            for i, (p, most) in enumerate(zip(prompts, (2, None, 1, 0), strict=True))
        ]
        model._run(some)
        pages = model.engine.scheduler.pages
        assert pages.free == pages.total
        assert model.engine.guesses["mtp"].guessed == sum(s.guessed for s in some) > 0
    assert [s.new_tokens for s in some] == [s.new_tokens for s in plain]
    assert some[3].guessed == 0


def _forced(model: ktcore.Model, text: list[int], share: int = 1) -> None:
    """Has the drafter propose what `text` says, wrongly in every `share`-th place where that is not 1."""
    drafter = model.engine.drafter
    assert drafter is not None
    follow = drafter.follow

    def forced(batch: Any, hidden: torch.Tensor, ends: Any) -> None:
        follow(batch, hidden, ends)
        for sequence in batch.sequences:
            if sequence.drafts is not None and sequence.drafts.ids:
                begin = len(sequence.tokens)
                known = text[begin : begin + len(sequence.drafts.ids)]
                wrong = [share > 1 and (begin + i) % share == 0 for i in range(len(known))]
                ids = [(t + 1) % 256 if w else t for t, w in zip(known, wrong, strict=True)]
                sequence.drafts.propose(ids, begin)

    drafter.follow = forced  # type: ignore[method-assign]


@pytest.mark.parametrize("name", ["v3", "qwen3.5-moe"])
@pytest.mark.parametrize("share", [1, 3])
def test_right_drafts_save_steps_and_wrong_ones_cost_no_token(further: Make, name: str, share: int) -> None:
    prompt, steps = _ids(6, 20), 0
    with _open(further(name).folder) as model:
        text = model.generate(prompt, 30, temperature=0, eos_token_id=None)
    with _open(further(name).folder, draft="mtp:2") as model:
        _forced(model, text, share)
        sequence = Sequence(list(prompt), GREEDY, 30, drafts=model.engine.drafts(None))
        model.engine.add(sequence)
        while sequence.finish is None:
            model.engine.step()
            steps += 1
    assert sequence.tokens == text
    assert sequence.right == {1: sequence.guessed}.get(share, sequence.right)
    assert steps == (11 if share == 1 else 1 + 29 - sequence.right)


@pytest.mark.parametrize("name", ["v3", "qwen3.5"])
def test_pages_that_are_short_and_prompts_that_begin_alike_change_no_answer(further: Make, name: str) -> None:
    shared = _ids(7, 130)
    prompts = [shared + _ids(8, 9), shared + _ids(9, 20), _ids(10, 60)]
    with _open(further(name).folder) as model:
        plain = [model.generate(p, 110, temperature=0, eos_token_id=None) for p in prompts]
    kept = PrefixOptions(memory=2**26)
    with _open(further(name).folder, draft="mtp:2", context=384, prefix=kept) as model:
        for _ in range(2):
            some = [Sequence(list(p), GREEDY, 110, drafts=model.engine.drafts(None)) for p in prompts]
            model._run(some)
            assert [s.tokens for s in some] == plain
        assert model.engine.scheduler.preemptions > 0
        assert some[0].prefix.reused == 128


def test_what_a_shared_page_holds_gives_the_drafts_that_computing_it_gives(further: Make) -> None:
    prompt = _ids(11, 100)
    found = []
    for first in ([], [prompt[:90]]):
        with _open(further("v3").folder, draft="mtp:2") as model:
            for text in first:
                model.generate(text, 1, temperature=0)
            drafted = _drafted(model)
            sequence = Sequence(list(prompt), GREEDY, 4, drafts=model.engine.drafts(None))
            model._run([sequence])
            assert sequence.prefix.reused == (64 if first else 0)
            found.append(drafted[0])
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-5)


def test_stop_strings_guides_and_lookup_go_with_drafts(further: Make) -> None:
    prompt = _ids(12, 30)
    with _open(further("glm4-moe").folder) as model:
        plain = model.generate(prompt, 20, temperature=0, eos_token_id=None)
        ended = model.generate(prompt, 20, temperature=0, eos_token_id=plain[37])
    with _open(further("glm4-moe").folder, draft="mtp:2") as model:
        _forced(model, plain)
        assert model.generate(prompt, 20, temperature=0, eos_token_id=plain[37]) == ended
        assert model.generate(prompt, 20, temperature=0, eos_token_id=None, prompt_lookup=3) == plain
        assert model.generate(prompt, 20, temperature=0, eos_token_id=None, draft=0) == plain
        with pytest.raises(ktcore.KtcoreError, match=r"draft=3: this model drafts 2 tokens"):
            model.generate(prompt, 20, draft=3)


def test_a_sampled_token_is_drawn_as_without_drafts_so_its_distribution_is(further: Make) -> None:
    prompt, params = _ids(13, 12), {"temperature": 1.0, "top_k": 4}
    counts = []
    for draft in (None, "mtp:1"):
        with _open(further("v3").folder, draft=draft) as model:
            drawn = [model.generate(prompt, 3, seed=seed, **params)[-1] for seed in range(150)]
            counts.append(torch.bincount(torch.tensor(drawn), minlength=256))
    assert torch.equal(counts[0], counts[1])


@pytest.mark.parametrize(
    ("name", "gone", "message"),
    [
        ("v3", "model.layers.4.eh_proj.weight", r"tensor 'model.layers.4.eh_proj.weight' is missing"),
        ("qwen3.5", "mtp.fc.weight", r"tensor 'mtp.fc.weight' is missing"),
        ("v3", "model.layers.4.enorm.weight", r"model.layers.4.enorm.weight"),
    ],
)
def test_a_layer_that_the_checkpoint_lacks_is_an_error_that_names_it(
    further: Make, tmp_path: Path, name: str, gone: str, message: str
) -> None:
    made = further(name)
    left = {key: value for key, value in made.tensors.items() if key != gone}
    (tmp_path / "config.json").write_text((made.folder / "config.json").read_text())
    save_file(left, tmp_path / "model.safetensors")
    with pytest.raises(ktcore.KtcoreError, match=message):
        _open(tmp_path, draft="mtp:2")


def test_a_family_without_the_layer_is_an_error_that_says_so(tiny: Callable[[str], Any]) -> None:
    with pytest.raises(ktcore.KtcoreError, match=r"architecture 'llama' is not known to have a layer that predicts"):
        _open(tiny("llama").folder, draft="mtp:2")
