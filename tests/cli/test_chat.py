"""`ktcore chat`: scripted conversations, Ctrl-C, and conversations that outgrow the context."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ktcore.cli.conversation import Conversation
from ktcore.cli.interrupt import noticing_interrupts
from ktcore.engine.stream import Stats
from ktcore.errors import RequestError

from .conftest import Run


class FakeModel:
    """Counts words as tokens and answers with what it was shown."""

    def __init__(self, context: int = 1000, presses: int = 0) -> None:
        self.context = context
        self.presses = presses
        self.quantization_error: dict[str, float] = {}
        self.taken = "Runs on an abacus. It was asked for."
        self.seen: list[list[dict[str, str]]] = []
        self.tokenizer = SimpleNamespace(chat_template="yes", encode_chat=self._words)

    def stream_chat(self, messages: list[dict[str, str]], max_new_tokens: int, **options: Any) -> Any:
        self.seen.append([dict(message) for message in messages])
        count = len(self._words(messages))
        if count > self.context:
            raise RequestError(f"the prompt has {count} tokens, the context holds {self.context}")
        return FakeStream(self.presses)

    def _words(self, messages: list[dict[str, str]]) -> list[str]:
        return [word for message in messages for word in message["content"].split()]

    def __enter__(self) -> FakeModel:
        return self

    def __exit__(self, *error: object) -> None:
        pass


class FakeStream:
    """Two pieces, Ctrl-C after the first, and a third that nobody should see then."""

    def __init__(self, presses: int) -> None:
        self.presses = presses
        self.stats = Stats(5, 0, 3, 0.5, 2.0)

    def __iter__(self) -> Iterator[str]:
        yield "one "
        for _ in range(self.presses):
            signal.raise_signal(signal.SIGINT)
        yield "two "
        yield "three"


def talk(ktcore: Run, monkeypatch: pytest.MonkeyPatch, model: FakeModel, *lines: str, system: str = "") -> Any:
    monkeypatch.setattr("ktcore.engine.model.load", lambda path, **options: model)
    words = ("chat", "model.gguf", "-n", 4, *(("--system", system) if system else ()))
    return ktcore(*words, stdin="".join(f"{line}\n" for line in lines))


@pytest.mark.parametrize("tty", [False, True])
def test_speeds_and_the_hint_of_help_are_for_people(ktcore: Run, monkeypatch: pytest.MonkeyPatch, tty: bool) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: tty, raising=False)
    done = talk(ktcore, monkeypatch, FakeModel(), "Hello")
    assert ("prefill 5 tokens at 10.0 tok/s, decode 3 tokens at 1.0 tok/s" in done.err) is tty
    assert "/help lists the commands" not in done.err


def test_what_renders_templates_is_fetched_for_a_model_that_is_there(
    ktcore: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fetched: list[str] = []
    model = FakeModel()
    model.tokenizer.chat_template = None
    monkeypatch.setattr("ktcore.cli.terminal.fetched", fetched.append)
    monkeypatch.setattr("ktcore.engine.model.load", lambda path, **options: model)
    there = tmp_path / "model.gguf"
    there.touch()
    assert "has no chat template" in ktcore("chat", there).err
    assert fetched == ["transformers.utils.chat_template_utils"]
    assert ktcore("chat", there, "--template", "{{ messages }}").code == 0
    assert len(fetched) == 2
    ktcore("chat", "absent.gguf")
    assert len(fetched) == 2
    monkeypatch.setattr("ktcore.engine.model.load", missing)
    ktcore("run", there, "Hi")
    assert len(fetched) == 3
    ktcore("run", there, "Hi", "--raw")
    ktcore("run", "absent.gguf", "Hi")
    assert len(fetched) == 3


def missing(path: Path, **options: Any) -> None:
    raise RequestError("not now")


def contents(messages: list[dict[str, str]]) -> list[str]:
    return [message["content"] for message in messages]


def test_the_model_sees_the_history(ktcore: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    model = FakeModel()
    done = talk(ktcore, monkeypatch, model, "Hello", "", "Again")
    assert done.code == 0
    assert done.out == "one two three\none two three\n"
    assert contents(model.seen[1]) == ["Hello", "one two three", "Again"]
    assert [message["role"] for message in model.seen[1]] == ["user", "assistant", "user"]


def test_commands(ktcore: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    model = FakeModel()
    lines = ("Hello", "/clear", "/system Be brief.", "Again", "/system", "More", "/help", "/nonsense", "/exit", "Never")
    done = talk(ktcore, monkeypatch, model, *lines, system="Be kind.")
    assert [contents(seen) for seen in model.seen] == [
        ["Be kind.", "Hello"],
        ["Be brief.", "Again"],
        ["Again", "one two three", "More"],
    ]
    assert done.err.count("/system TEXT") == 2
    said = done.err.splitlines()
    assert said[0] == model.taken
    assert said[1:4] == [
        "The conversation is forgotten.",
        "The system message is set.",
        "There is no system message now.",
    ]
    assert "/nonsense is no command" in done.err


@pytest.mark.parametrize(("presses", "kept"), [(1, "one two "), (2, "one ")])
def test_ctrl_c_stops_the_answer_and_not_the_program(
    ktcore: Run, monkeypatch: pytest.MonkeyPatch, presses: int, kept: str
) -> None:
    model = FakeModel(presses=presses)
    done = talk(ktcore, monkeypatch, model, "Hello", "Again")
    assert done.code == 0
    assert "three" not in done.out
    assert done.err.count("(stopped)") == 2
    assert contents(model.seen[1]) == ["Hello", kept, "Again"]


def test_the_oldest_turns_go_when_the_context_is_full(ktcore: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    model = FakeModel(context=16)
    done = talk(ktcore, monkeypatch, model, "a b c d", "e f", "g h i", system="Be kind.")
    assert contents(model.seen[1]) == ["Be kind.", "a b c d", "one two three", "e f"]
    assert contents(model.seen[2]) == ["Be kind.", "e f", "one two three", "g h i"]
    assert "the 2 oldest messages were dropped" in done.err
    assert "context of 16 tokens" in done.err


def test_a_message_that_cannot_fit_is_an_error_that_forgets_nothing(
    ktcore: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = FakeModel(context=16)
    done = talk(ktcore, monkeypatch, model, "a b", "w " * 20, "c")
    assert done.code == 0
    assert "error: the prompt has" in done.err
    assert contents(model.seen[2]) == ["a b", "one two three", "c"]


def test_the_demo_model_remembers_a_name(ktcore: Run, smollm2_path: Path) -> None:
    words = ("chat", smollm2_path, "--backend", "cpu", "--temperature", 0, "-n", 40)
    told = ktcore(*words, stdin="My name is Zebulon. Say hello to me by name.\nWhat is my name?\n/exit\n")
    assert told.code == 0
    assert "Zebulon" in told.out.split("\n", 1)[1]


def test_shorten_drops_a_question_with_its_answer() -> None:
    talked = Conversation("be kind", [])
    for i in range(3):
        talked.add("user", f"q{i}")
        talked.add("assistant", f"a{i}")
    talked.add("user", "q3")
    assert talked.shorten(len, 100) == 0
    assert talked.shorten(len, 5) == 4
    assert contents(talked.messages) == ["be kind", "q2", "a2", "q3"]
    assert talked.shorten(len, 0) == 2
    assert contents(talked.messages) == ["be kind", "q3"]


def test_the_handler_of_ctrl_c_is_put_back() -> None:
    before = signal.getsignal(signal.SIGINT)
    with noticing_interrupts() as interrupted:
        assert not interrupted
        signal.raise_signal(signal.SIGINT)
        assert interrupted
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
