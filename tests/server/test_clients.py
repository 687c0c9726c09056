"""Real clients over a socket: the openai SDK, and one that hangs up."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest

uvicorn = pytest.importorskip("uvicorn", reason="needs the extra `server`")
pytest.importorskip("fastapi", reason="needs the extra `server`")
httpx = pytest.importorskip("httpx", reason="the test's HTTP client")
openai = pytest.importorskip("openai", reason="the SDK is what this tests")

import ktcore  # noqa: E402
from ktcore.engine.service import Service  # noqa: E402
from ktcore.server.http.app import build_app  # noqa: E402
from ktcore.server.http.settings import Keys, Settings  # noqa: E402

HELLO = [{"role": "user", "content": "Hello"}]


@dataclass
class Server:
    """A server on a free port."""

    url: str
    service: Service

    def sdk(self, key: str = "right") -> Any:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=60)


@contextmanager
def listening(model: ktcore.Model, **settings: Any) -> Iterator[Server]:
    """A server of a model."""
    listener = socket.create_server(("127.0.0.1", 0))
    with Service(model) as service:
        app = build_app(service, Settings("tiny", Keys(("right",)), **settings))
        made = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        thread = threading.Thread(target=made.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        while not made.started:
            time.sleep(0.01)
        yield Server(f"http://127.0.0.1:{listener.getsockname()[1]}", service)
        made.should_exit = True
        thread.join(30)
    listener.close()


@pytest.fixture
def server(opened: Callable[..., ktcore.Model]) -> Iterator[Server]:
    with listening(opened(context=4096)) as made:
        yield made


def test_the_openai_sdk_works_unmodified(server: Server) -> None:
    sdk = server.sdk()
    assert [m.id for m in sdk.models.list()] == ["tiny"]
    ask = {"model": "tiny", "messages": HELLO, "max_tokens": 12, "temperature": 0}
    whole = sdk.chat.completions.create(**ask)
    said = whole.choices[0].message.content
    assert said
    assert whole.usage.completion_tokens == 12
    chunks = list(sdk.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == said
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].usage == whole.usage
    plain = sdk.completions.create(model="tiny", prompt=["one", "two"], max_tokens=4, temperature=0, n=2)
    assert [c.index for c in plain.choices] == [0, 1, 2, 3]
    assert plain.choices[0].text == plain.choices[1].text


def test_the_openai_sdk_reads_logprobs_of_several_choices(server: Server) -> None:
    ask = {"model": "tiny", "messages": HELLO, "max_tokens": 5, "seed": 2, "n": 3, "presence_penalty": 0.5}
    choices = server.sdk().chat.completions.create(**ask, logprobs=True, top_logprobs=2).choices
    assert len({c.message.content for c in choices}) == 3
    for choice in choices:
        told = choice.logprobs.content
        assert b"".join(bytes(t.bytes) for t in told).decode(errors="replace") == choice.message.content
        assert all(len(t.top_logprobs) == 2 and t.top_logprobs[0].logprob >= t.logprob for t in told)


def test_langchains_client_works_unmodified(server: Server) -> None:
    langchain = pytest.importorskip("langchain_openai", reason="optional: pip install langchain-openai")
    chat = langchain.ChatOpenAI(
        model="tiny", base_url=f"{server.url}/v1", api_key="right", temperature=0, max_tokens=9, max_retries=0
    )
    whole = chat.invoke("Hello")
    said = server.sdk().chat.completions.create(model="tiny", messages=HELLO, temperature=0, max_tokens=9)
    assert whole.content == said.choices[0].message.content
    assert "".join(piece.content for piece in chat.stream("Hello")) == whole.content
    embeddings = langchain.OpenAIEmbeddings(
        model="tiny", base_url=f"{server.url}/v1", api_key="right", check_embedding_ctx_length=False
    )
    assert len(embeddings.embed_query("Hello")) == 64


def test_llamaindexs_client_works_unmodified(server: Server) -> None:
    like = pytest.importorskip(
        "llama_index.llms.openai_like", reason="optional: pip install llama-index-llms-openai-like"
    )
    given = {"model": "tiny", "api_base": f"{server.url}/v1", "api_key": "right", "temperature": 0, "max_tokens": 9}
    chat = like.OpenAILike(**given, is_chat_model=True, max_retries=0)
    messages = [like.base.ChatMessage(role="user", content="Hello")]
    said = server.sdk().chat.completions.create(model="tiny", messages=HELLO, temperature=0, max_tokens=9)
    assert chat.chat(messages).message.content == said.choices[0].message.content
    assert "".join(piece.delta for piece in chat.stream_chat(messages)) == said.choices[0].message.content
    plain = like.OpenAILike(**given, is_chat_model=False, max_retries=0)
    text = server.sdk().completions.create(model="tiny", prompt="Hello", temperature=0, max_tokens=9).choices[0].text
    assert plain.complete("Hello").text == text
    assert "".join(piece.delta for piece in plain.stream_complete("Hello")) == text


def test_the_openai_sdk_raises_its_own_errors(server: Server) -> None:
    sdk = server.sdk()
    with pytest.raises(openai.AuthenticationError):
        server.sdk("wrong").models.list()
    with pytest.raises(openai.NotFoundError):
        sdk.chat.completions.create(model="other", messages=HELLO)
    with pytest.raises(openai.BadRequestError, match="context"):
        sdk.completions.create(model="tiny", prompt="x" * 5000)
    with pytest.raises(openai.BadRequestError, match="tools"):
        tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
        sdk.chat.completions.create(model="tiny", messages=HELLO, tools=[tool])


def test_eight_at_once_get_their_own_answers(server: Server) -> None:
    sdk = server.sdk()

    def ask(number: int) -> str:
        messages = [{"role": "user", "content": f"{number}" * (number * 20 + 1)}]
        chunks = sdk.chat.completions.create(model="tiny", messages=messages, max_tokens=20, temperature=0, stream=True)
        return "".join(c.choices[0].delta.content or "" for c in chunks)

    alone = [ask(number) for number in range(8)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ask, range(8))) == alone
    assert len(set(alone)) > 4


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_hangs_up_frees_its_place(server: Server, stream: bool) -> None:
    pages = server.service.model.engine.scheduler.pages
    ask = {"model": "tiny", "messages": HELLO, "max_tokens": 4000, "temperature": 0, "stream": stream}
    headers = {"Authorization": "Bearer right"}
    try:
        with httpx.stream(
            "POST", f"{server.url}/v1/chat/completions", json=ask, headers=headers, timeout=0.5
        ) as response:
            pieces = response.iter_text()  # held, for an iterator that is dropped closes the connection
            assert next(pieces)
            assert server.service.running == 1
    except httpx.ReadTimeout:
        assert not stream
    ends = time.monotonic() + 5
    while pages.free < pages.total:
        assert time.monotonic() < ends, "the answer still runs"
        time.sleep(0.01)
