"""Sampling fields and logprobs through the routes, against what transformers computes from the same model's logits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, LlamaForCausalLM

pytest.importorskip("fastapi", reason="needs the extra `server`")
pytest.importorskip("httpx", reason="the test's HTTP client")

import ktcore

from .test_http import CHAT, Client, _events, served

Opened = Callable[..., ktcore.Model]
PLAIN = "/v1/completions"
PROMPT = list(b"The sky is blue")


@pytest.fixture
def model(opened: Opened) -> ktcore.Model:
    return opened("dense")


@pytest.fixture
def client(model: ktcore.Model) -> Iterator[Client]:
    with served(model) as made:
        yield made


def _ask(client: Client, **fields: Any) -> Any:
    ask = {"model": "tiny", "prompt": PROMPT, "max_tokens": 16, "temperature": 0, **fields}
    done = client("POST", PLAIN, json=ask)
    assert done.status_code == 200, done.text
    return done.json()["choices"][0]


def test_penalties_and_biases_give_what_transformers_generates(
    client: Client, model: ktcore.Model, folders: dict[str, Any]
) -> None:
    theirs = LlamaForCausalLM.from_pretrained(folders["dense"]).eval()
    bias = {97: -100.0, 101: 3.0}
    config = GenerationConfig(
        max_new_tokens=16,
        do_sample=False,
        repetition_penalty=1.4,
        sequence_bias=[[[i], b] for i, b in bias.items()],
        eos_token_id=256,
        pad_token_id=256,
    )
    expected = theirs.generate(torch.tensor([PROMPT]), generation_config=config)[0, len(PROMPT) :].tolist()
    found = _ask(client, repetition_penalty=1.4, logit_bias={str(i): b for i, b in bias.items()})
    assert found["text"] == model.tokenizer.decode([i for i in expected if i != 256])


def test_presence_and_frequency_follow_their_formula(client: Client, opened: Opened) -> None:
    other = opened("dense")
    answer: list[int] = []
    for _ in range(16):
        logits = other.logits(PROMPT + answer)[-1]
        logits[65] += 20
        for token in set(answer):
            logits[token] -= 2 * answer.count(token) + 0.5
        answer.append(int(logits.argmax()))
    assert 2 < answer.count(65) < 14
    found = _ask(client, frequency_penalty=2, presence_penalty=0.5, ignore_eos=True, logit_bias={"65": 20})
    assert found["text"] == other.tokenizer.decode(answer)


@pytest.mark.parametrize("path", [CHAT, PLAIN])
def test_logprobs_are_those_of_the_models_logits(client: Client, opened: Opened, path: str) -> None:
    ask: dict[str, Any] = {"model": "tiny", "max_tokens": 6, "temperature": 0, "logit_bias": {"101": 5}}
    if path == CHAT:
        ask |= {"messages": [{"role": "user", "content": "Hello"}], "logprobs": True, "top_logprobs": 3}
    else:
        ask |= {"prompt": PROMPT, "logprobs": 3}
    other = opened("dense")
    ids = PROMPT if path == PLAIN else other.tokenizer.encode_chat(ask.get("messages", []))
    (choice,) = client("POST", path, json=ask).json()["choices"]
    if path == CHAT:
        entries = choice["logprobs"]["content"]
        assert b"".join(bytes(e["bytes"]) for e in entries).decode(errors="replace") == choice["message"]["content"]
        drawn = [_id(other, e["bytes"]) for e in entries]
        told = [e["logprob"] for e in entries]
        top = [[(_id(other, t["bytes"]), t["logprob"]) for t in e["top_logprobs"]] for e in entries]
    else:
        found = choice["logprobs"]
        drawn = [_id(other, t) for t in found["tokens"]]
        told = found["token_logprobs"]
        top = [[(_id(other, t), p) for t, p in each.items()] for each in found["top_logprobs"]]
        assert all(len(each) in (3, 4) for each in top)
    expected = other.logits(ids + drawn).log_softmax(-1)[len(ids) - 1 :]
    assert len(drawn) == 6
    for place, token in enumerate(drawn):
        assert told[place] == pytest.approx(float(expected[place, token]), abs=1e-4)
        for likely, logprob in top[place]:
            assert logprob == pytest.approx(float(expected[place, likely]), abs=1e-4)


def _id(model: ktcore.Model, spelled: str | list[int]) -> int:
    """The token of one byte, as completions or chats spell it."""
    if isinstance(spelled, list):
        wanted = bytes(spelled)
    else:
        prefix = "bytes:\\x"
        wanted = bytes.fromhex(spelled.removeprefix(prefix)) if spelled.startswith(prefix) else spelled.encode()
    return next(i for i in range(264) if model.tokenizer.token_bytes(i) == wanted)


@pytest.mark.parametrize("path", [CHAT, PLAIN])
def test_streamed_logprobs_add_up_and_leave_a_stop_string_out(client: Client, path: str) -> None:
    ask: dict[str, Any] = {"model": "tiny", "max_tokens": 24, "temperature": 0}
    if path == CHAT:
        ask |= {"messages": [{"role": "user", "content": "Hello"}], "logprobs": True}
    else:
        ask |= {"prompt": PROMPT, "logprobs": 1}

    def text(choice: Any) -> str:
        return choice["message"]["content"] if path == CHAT else choice["text"]

    def entries(choice: Any) -> list[Any]:
        if choice["logprobs"] is None:
            return []
        told = choice["logprobs"]
        if path == CHAT:
            return [(e["token"], e["logprob"]) for e in told["content"]]
        return list(zip(told["tokens"], told["token_logprobs"], told["text_offset"], strict=True))

    whole = client("POST", path, json=ask).json()["choices"][0]
    pieces = _events(client("POST", path, json={**ask, "stream": True}).text)
    assert [e for p in pieces for c in p["choices"] for e in entries(c)] == entries(whole)
    said = text(whole)
    stop = said[9:12]
    cut = client("POST", path, json={**ask, "stop": [stop]}).json()["choices"][0]
    assert text(cut) == said[: said.index(stop)]
    kept = entries(cut)
    assert kept == entries(whole)[: len(kept)]
    assert len(kept) > 3
    if path == PLAIN:
        assert all(offset < len(text(cut)) for *_, offset in kept)


def test_token_ids_end_answers_and_the_models_own_need_not(client: Client, model: ktcore.Model) -> None:
    whole = _ask(client, logprobs=0)
    letter = whole["logprobs"]["tokens"][5]
    first = whole["logprobs"]["tokens"].index(letter)
    cut = _ask(client, stop_token_ids=[_id(model, letter)], logprobs=0)
    assert cut["finish_reason"] == "stop"
    assert cut["logprobs"]["tokens"] == whole["logprobs"]["tokens"][:first]
    ended = _ask(client, logit_bias={"256": 100})
    assert (ended["text"], ended["finish_reason"]) == ("", "stop")
    assert _ask(client, logit_bias={"256": 100}, ignore_eos=True)["finish_reason"] == "length"
