"""Vectors of texts by the real clients, against transformers' last hidden states."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaModel

pytest.importorskip("uvicorn", reason="needs the extra `server`")
pytest.importorskip("fastapi", reason="needs the extra `server`")
openai = pytest.importorskip("openai", reason="the SDK is what this tests")
ollama = pytest.importorskip("ollama", reason="the client is what this tests")

import ktcore  # noqa: E402
from ktcore.errors import FieldError  # noqa: E402
from ktcore.server.api.embeddings import _own_pooling  # noqa: E402

from .test_clients import Server, listening  # noqa: E402

TEXTS = ["The sky is blue.", "x", "Long: " + "words and more words " * 40]


@pytest.fixture
def server(opened: Callable[..., ktcore.Model]) -> Iterator[Server]:
    model = opened("dense", context=2048)
    model.engine.scheduler.chunk = 64
    with listening(model) as made:
        yield made


def _expected(folder: Path, server: Server, text: str, pooling: str) -> torch.Tensor:
    ids = torch.tensor([server.service.model.tokenizer.encode(text)])
    with torch.inference_mode():
        states = LlamaModel.from_pretrained(folder).eval()(ids).last_hidden_state[0]
    pooled = states.mean(0) if pooling == "mean" else states[-1]
    return pooled / pooled.norm()


@pytest.mark.parametrize("pooling", ["mean", "last"])
@pytest.mark.parametrize("encoding", ["base64", "float"])
def test_vectors_are_transformers_hidden_states(
    server: Server, folders: dict[str, Path], pooling: str, encoding: str
) -> None:
    # the SDK asks for base64 itself, and decodes it, where no encoding is given
    more: dict[str, Any] = {} if encoding == "base64" else {"encoding_format": "float"}
    done = server.sdk().embeddings.create(model="tiny", input=TEXTS, extra_body={"pooling": pooling}, **more)
    assert [d.index for d in done.data] == [0, 1, 2]
    for text, found in zip(TEXTS, done.data, strict=True):
        expected = _expected(folders["dense"], server, text, pooling)
        torch.testing.assert_close(torch.tensor(found.embedding), expected, atol=2e-5, rtol=1e-4)
    assert done.usage.prompt_tokens == sum(map(len, TEXTS))
    pages = server.service.model.engine.scheduler.pages
    assert pages.free == pages.total


def test_ids_dimensions_and_many_inputs(server: Server) -> None:
    sdk = server.sdk()
    ids = server.service.model.tokenizer.encode("The sky is blue.")
    whole = sdk.embeddings.create(model="tiny", input="The sky is blue.").data[0].embedding
    assert sdk.embeddings.create(model="tiny", input=[ids]).data[0].embedding == whole
    short = torch.tensor(sdk.embeddings.create(model="tiny", input=ids, dimensions=8).data[0].embedding)
    expected = torch.tensor(whole)[:8]
    torch.testing.assert_close(short, expected / expected.norm())
    many = sdk.embeddings.create(model="tiny", input=[f"text {i}" for i in range(100)]).data
    assert len({tuple(d.embedding) for d in many}) == 100
    for wrong in ({"dimensions": 65}, {"input": "x" * 3000}, {"input": []}, {"input": [[300]]}):
        with pytest.raises(openai.BadRequestError):
            sdk.embeddings.create(**{"model": "tiny", "input": "x", **wrong})


def test_the_ollama_client_gets_the_same(server: Server) -> None:
    client = ollama.Client(host=server.url, headers={"Authorization": "Bearer right"})
    whole = server.sdk().embeddings.create(model="tiny", input=TEXTS[0]).data[0].embedding
    done = client.embed("tiny", [TEXTS[0], "y" * 3000])
    assert list(done.embeddings[0]) == pytest.approx(whole, abs=1e-6)
    assert done.prompt_eval_count == len(TEXTS[0]) + 2048
    assert list(client.embeddings("tiny", TEXTS[0]).embedding) == pytest.approx(whole, abs=1e-6)
    with pytest.raises(ollama.ResponseError):
        client.embed("tiny", "y" * 3000, truncate=False)


@pytest.mark.parametrize(("kind", "pooling"), [(None, "mean"), (-1, "mean"), (0, "mean"), (1, "mean"), (3, "last")])
def test_a_gguf_file_says_what_its_model_was_trained_for(kind: int | None, pooling: str) -> None:
    config = {"general.architecture": "llama", **({} if kind is None else {"llama.pooling_type": kind})}
    assert _own_pooling(config) == pooling
    assert _own_pooling({}) == "mean"


@pytest.mark.parametrize(("kind", "name"), [(2, "'cls'"), (4, "'rank'"), (9, "9")])
def test_a_pooling_that_is_not_known_is_refused_and_not_replaced(kind: int, name: str) -> None:
    with pytest.raises(FieldError, match=name):
        _own_pooling({"general.architecture": "llama", "llama.pooling_type": kind})
