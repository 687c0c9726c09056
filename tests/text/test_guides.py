"""Forms of answers, judged by Python's own json and re and by the jsonschema rules they state."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("llguidance", reason="needs the extra `server`")

import ktcore
from ktcore.engine.output import Output
from ktcore.engine.stream import TextStream
from ktcore.errors import RequestError
from ktcore.ops.sampling import SamplingParams
from ktcore.text.guides import Structure, Structures, Thought, _Vocabulary

PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "kind": {"enum": ["alpha", "beta"]},
    },
    "required": ["name", "age", "kind"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def model(smollm2_path: Path) -> Iterator[ktcore.Model]:
    with ktcore.load(smollm2_path, backend="cpu", context=1024) as model:
        yield model


def _walk(model: ktcore.Model, structure: Structure, seed: int, new: int = 60) -> str:
    """Random tokens under a form, drawn from logits that know nothing of it."""
    guide = structure.begin()
    generator = torch.Generator().manual_seed(seed)
    ids: list[int] = []
    vocab = model.plan.graph.vocab
    while len(ids) < new:
        logits = guide.allowed(torch.randn(vocab, generator=generator) * 4)
        token = int(logits.argmax())
        assert logits[token] > float("-inf")
        if token in model.tokenizer.stop_ids:
            break
        ids.append(token)
        if guide.accept(token):
            break
    else:
        pytest.skip("the random answer did not end by itself")
    return model.tokenizer.decode(ids, skip_special=False)


@pytest.mark.parametrize("seed", range(6))
def test_whatever_is_drawn_fits_the_schema(model: ktcore.Model, seed: int) -> None:
    found = json.loads(_walk(model, model.structures.json(PERSON), seed, 300))
    assert set(found) == {"name", "age", "kind"}
    assert isinstance(found["name"], str)
    assert len(found["name"]) <= 20
    assert 0 <= found["age"] <= 150
    assert found["kind"] in ("alpha", "beta")


@pytest.mark.parametrize("pattern", [r"[a-f0-9]{4}-\d{2}", r"(yes|no)/(maybe\n){2}", "Größe: [0-9]+ €"])
def test_whatever_is_drawn_matches_the_expression(model: ktcore.Model, pattern: str) -> None:
    assert re.fullmatch(pattern, _walk(model, model.structures.regex(pattern), 1))


@pytest.mark.parametrize("source", ['root ::= "(" (root | [0-9]) ")"', 'start: "(" (start | /[0-9]/) ")"'])
def test_grammars_count_brackets_in_either_syntax(model: ktcore.Model, source: str) -> None:
    text = _walk(model, model.structures.grammar(source), 3, 200)
    middle = text.strip("()")
    assert re.fullmatch(r"[0-9]", middle)
    assert text == "(" * ((len(text) - 1) // 2) + middle + ")" * ((len(text) - 1) // 2)


@pytest.mark.parametrize("begun", [True, False])
def test_thoughts_before_the_answer_are_free(model: ktcore.Model, begun: bool) -> None:
    structure = model.structures.json(PERSON, Thought("<think>", "</think>", begun))
    said = 'Hm {"no": </thin 3.</think>\n\n{"name": "x", "age": 3, "kind": "beta"}'
    ids = model.tokenizer.encode(said if begun else "<think>" + said, add_special=False)
    guide = structure.begin()
    ended = [guide.accept(token) for token in ids]
    assert ended == [False] * (len(ids) - 1) + [True]
    bare = structure.begin()
    first = model.tokenizer.encode('{"', add_special=False)[0]
    masked = bare.allowed(torch.zeros(model.plan.graph.vocab))
    # thoughts that have begun may hold anything; the answer alone may begin with a brace at once
    assert masked[first] == 0
    other = model.tokenizer.encode("Because", add_special=False)[0]
    assert bool(masked[other] == 0) is begun


@pytest.mark.parametrize(
    ("said", "fits"),
    [
        ("<|channel|>final<|message|>yes", True),
        ("<|channel|>analysis<|message|>Hm.<|end|><|channel|>final<|message|>yes", True),
        ("yes", False),
        ("<|channel|>analysis<|message|>Hm.<|end|>yes", False),
    ],
)
def test_what_opens_the_answer_proper_is_demanded(model: ktcore.Model, said: str, fits: bool) -> None:
    thought = Thought("<|channel|>analysis<|message|>", "<|end|>", False, "<|channel|>final<|message|>")
    guide = model.structures.regex("yes", thought).begin()
    allowed = True
    for token in model.tokenizer.encode(said, add_special=False):
        allowed = bool(guide.allowed(torch.zeros(model.plan.graph.vocab))[token] == 0)
        if not allowed:
            break
        guide.accept(token)
    assert allowed is fits


@pytest.mark.parametrize(
    ("make", "bad", "told"),
    [
        ("json", {"type": "bogus"}, "bogus"),
        ("json", {"type": "array", "uniqueItems": True}, "uniqueItems"),
        ("json", {"$ref": "https://example.com/schema"}, "retriev"),
        ("json", {"type": "string", "pattern": "(a"}, "unclosed"),
        ("json", {"type": "integer", "minimum": 5, "maximum": 3}, "greater"),
        ("json", {"properties": {"\ud800": {}}}, "cannot be used"),
        ("regex", "[a-", "unclosed"),
        ("regex", "(?=a)b", "look-around"),
        ("grammar", 'start: "a" missing', "missing"),
        ("grammar", 'root ::= "a', "cannot be used"),
        ("grammar", "", "cannot be used"),
    ],
)
def test_what_cannot_be_enforced_is_refused_and_says_why(model: ktcore.Model, make: str, bad: Any, told: str) -> None:
    with pytest.raises(RequestError, match=told):
        getattr(model.structures, make)(bad)


def test_a_real_model_answers_in_the_form_and_stops_there(model: ktcore.Model) -> None:
    ids = model.tokenizer.encode_chat([{"role": "user", "content": "Describe a person in JSON."}])
    output = Output(structure=model.structures.json(PERSON))
    answers = ["".join(TextStream(model, ids, 100, SamplingParams(seed=3), (), output)) for _ in range(2)]
    assert set(json.loads(answers[0])) == set(PERSON["required"])
    assert answers[0] == answers[1]


def test_a_form_that_was_left_stays_an_error(model: ktcore.Model) -> None:
    guide = model.structures.regex("ab").begin()
    (wrong,) = model.tokenizer.encode("x", add_special=False)
    with pytest.raises(RequestError, match="cannot be followed further"):
        guide.accept(wrong)
    with pytest.raises(RequestError, match="cannot be followed further"):
        guide.allowed(torch.zeros(model.plan.graph.vocab))


def test_forms_end_where_logits_are_wider_than_the_vocabulary(model: ktcore.Model) -> None:
    wide = Structures(model.tokenizer, model.plan.graph.vocab + 100).regex("ab")
    masked = wide.begin().allowed(torch.zeros(model.plan.graph.vocab + 100))
    assert bool((masked[model.plan.graph.vocab :] == float("-inf")).all())


@pytest.mark.parametrize(("stop", "ends"), [({3}, [3]), ({7, 3, 9}, [3, 7]), ({8}, [7]), (set(), [7])])
def test_forms_end_with_a_stop_token_of_the_vocabulary_or_its_last_one(stop: set[int], ends: list[int]) -> None:
    tokenizer: Any = SimpleNamespace(
        stop_ids=frozenset(stop), bos_id=None, token_bytes=lambda i: b"x", is_control=lambda i: i == 5
    )
    words = _Vocabulary(tokenizer, 8)
    assert (words.ends, words.eos_token_id) == (ends, ends[0])
    assert words.special_token_ids == sorted({5, *ends})


def test_without_the_library_the_error_names_it(model: ktcore.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "llguidance", None)
    with pytest.raises(RequestError, match="llguidance") as error:
        model.structures.json({"type": "object"})
    assert "ktcore[server]" in error.value.hint


def test_json_may_bring_white_space_along_and_ends_without_being_asked_for_it(model: ktcore.Model) -> None:
    structure = model.structures.json({"type": "object", "properties": {}, "additionalProperties": False})
    vocab = model.plan.graph.vocab
    by_bytes = {model.tokenizer.token_bytes(i): i for i in range(vocab)}
    for last in (b"}", b"}\n"):
        guide = structure.begin()
        assert not guide.accept(by_bytes[b"{"])
        if last in by_bytes:
            assert guide.allowed(torch.zeros(vocab))[by_bytes[last]] == 0
            assert guide.accept(by_bytes[last])


def test_the_trailing_zeros_that_the_library_refuses_under_multiple_of_are_known(model: ktcore.Model) -> None:
    """As the guide says: a number of a `multipleOf` is written without zeros at its end."""
    structure = model.structures.json({"type": "number", "multipleOf": 0.5})
    guide = structure.begin()
    for digit in model.tokenizer.encode("0.5", add_special=False):
        guide.accept(digit)
    (zero,) = [i for i in range(model.plan.graph.vocab) if model.tokenizer.token_bytes(i) == b"0"]
    assert guide.allowed(torch.zeros(model.plan.graph.vocab))[zero] < 0
