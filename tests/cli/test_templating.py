"""The chat template's options reach the template: variables, tools, documents, and which template it is."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

import ktcore
from ktcore.cli.templating import Templating
from ktcore.errors import RequestError, TokenizerError

from .conftest import Run

SOURCE = (
    "{% for d in documents or [] %}{{ d.text }}\n{% endfor %}{% for t in tools or [] %}{{ t.name }}\n{% endfor %}"
    "{% for m in messages %}{{ m.content }}\n{% endfor %}{% if enable_thinking is false %}no thinking{% endif %}"
)
MESSAGES = [{"role": "user", "content": "Hello"}]
SHAPE = {"tools": [{"name": "clock"}], "documents": [{"text": "A note."}]}


def test_chat_passes_everything_to_the_template(smollm2_path: Path) -> None:
    (want,), _ = render_jinja_template([MESSAGES], chat_template=SOURCE, enable_thinking=False, **SHAPE)
    assert want == "A note.\nclock\nHello\nno thinking"
    with ktcore.load(smollm2_path, backend="cpu", context=256) as model:
        plain = model.generate(want, 4, temperature=0)
        variables = {"enable_thinking": False}
        assert model.chat(MESSAGES, 4, template=SOURCE, variables=variables, temperature=0, **SHAPE) == plain
        stream = model.stream_chat(MESSAGES, 4, template=SOURCE, variables=variables, temperature=0, **SHAPE)
        assert stream.stats.prompt_tokens == len(model.tokenizer.encode(want))
        with pytest.raises(TokenizerError, match="no chat template named 'rag'"):
            model.chat(MESSAGES, 4, template="rag")
        with pytest.raises(RequestError, match="messages cannot be a variable"):
            model.chat(MESSAGES, 4, variables={"messages": []})
        with pytest.raises(RequestError, match="unknown option enable_thinking"):
            model.chat(MESSAGES, 4, enable_thinking=False)


@pytest.mark.parametrize("command", ["run", "chat"])
def test_the_commands_do_too(ktcore: Run, smollm2_path: Path, tmp_path: Path, command: str) -> None:
    (tmp_path / "mine.jinja").write_text(SOURCE)
    (tmp_path / "tools.json").write_text(json.dumps(SHAPE["tools"]))
    (tmp_path / "notes.json").write_text(json.dumps(SHAPE["documents"]))
    shape = ("--template", tmp_path / "mine.jinja", "--set", "enable_thinking=false")
    files = ("--tools", tmp_path / "tools.json", "--documents", tmp_path / "notes.json")
    how = ("--backend", "cpu", "--temperature", 0, "-n", 4, "--context", 256)
    prompt = ("Hello",) if command == "run" else ()
    done = ktcore(command, smollm2_path, *prompt, *shape, *files, *how, stdin="Hello\n")
    plain = ktcore("run", smollm2_path, "A note.\nclock\nHello\nno thinking", "--raw", *how)
    assert (done.code, done.out) == (0, plain.out)


def test_values_are_json_or_text() -> None:
    given = Templating("tool_use", ["enable_thinking=false", "date=1 May", "n=3", 'x="3"']).given()
    assert given == {"template": "tool_use", "variables": {"enable_thinking": False, "date": "1 May", "n": 3, "x": "3"}}
    assert Templating().given() == {}


def test_bad_options_are_one_clear_message(fails: Callable[..., str], tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "one.json").write_text("{}")
    (tmp_path / "none.json").write_text("[")
    assert "not a variable with its value" in fails("run", tiny_llama, "Hi", "--set", "thinking")
    assert "expected a JSON list of objects, found dict" in fails(
        "run", tiny_llama, "Hi", "--tools", tmp_path / "one.json"
    )
    assert "none.json: not JSON" in fails("run", tiny_llama, "Hi", "--tools", tmp_path / "none.json")
    assert "absent.json cannot be read" in fails("chat", tiny_llama, "--documents", tmp_path / "absent.json")
    assert "which --raw leaves out" in fails("run", tiny_llama, "Hi", "--raw", "--set", "a=1")
