"""`ktcore run` on the demo model."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import ktcore as package

from .conftest import Run

QUESTION = "Why is the sky blue?"
STORY = "Once upon a time"
KEYS = {
    "text",
    "prompt_tokens",
    "new_tokens",
    "guessed_tokens",
    "right_tokens",
    "prefill_tok_s",
    "decode_tok_s",
    "load_s",
    "finish",
}


@pytest.fixture(scope="module")
def answers(smollm2_path: Path) -> dict[str, str]:
    """What the Python API says to the same prompts."""
    user = {"role": "user", "content": QUESTION}
    system = {"role": "system", "content": "Answer in French."}
    with package.load(smollm2_path, backend="cpu") as model:
        return {
            "chat": model.chat([user], 12, temperature=0),
            "system": model.chat([system, user], 12, temperature=0),
            "raw": model.generate(STORY, 12, temperature=0),
        }


def test_text_goes_to_stdout_and_speeds_to_stderr(ktcore: Run, smollm2_path: Path, answers: dict[str, str]) -> None:
    done = ktcore("run", smollm2_path, QUESTION, "--temperature", 0, "-n", 12)
    assert done.code == 0
    assert done.out == answers["chat"] + "\n"
    assert done.out.startswith("The sky is blue")
    assert "prefill" in done.err
    assert "decode 12 tokens at" in done.err


def test_json_has_text_counts_and_speeds(ktcore: Run, smollm2_path: Path, answers: dict[str, str]) -> None:
    found = ktcore("run", smollm2_path, QUESTION, "--temperature", 0, "-n", 12, "--json").json
    assert set(found) == KEYS
    assert found["text"] == answers["chat"]
    assert found["finish"] in ("stop", "length")
    assert 0 < found["new_tokens"] <= 12
    assert min(found["prompt_tokens"], found["prefill_tok_s"], found["decode_tok_s"], found["load_s"]) > 0


def test_a_system_message_and_a_prompt_from_stdin(ktcore: Run, smollm2_path: Path, answers: dict[str, str]) -> None:
    words = ("run", smollm2_path, "-", "--system", "Answer in French.", "--temperature", 0, "-n", 12)
    assert ktcore(*words, stdin=QUESTION).out == answers["system"] + "\n"


def test_raw_leaves_the_chat_template_out(ktcore: Run, smollm2_path: Path, answers: dict[str, str]) -> None:
    assert len(answers["raw"]) > 10
    done = ktcore("run", smollm2_path, STORY, "--raw", "--temperature", 0, "-n", 12)
    assert done.out == answers["raw"] + "\n"
    assert ktcore("run", smollm2_path, QUESTION, "--raw", "--system", "Be kind.").code == 1


def test_stop_strings_end_the_answer(ktcore: Run, smollm2_path: Path, answers: dict[str, str]) -> None:
    words = ("run", smollm2_path, QUESTION, "--temperature", 0, "-n", 12, "--stop", "Nowhere", "--stop", "blue")
    done = ktcore(*words, "--json").json
    assert done["finish"] == "stop"
    assert done["text"] == answers["chat"].partition("blue")[0]


def test_one_token_has_no_speed_of_decode(ktcore: Run, smollm2_path: Path) -> None:
    words = ("run", smollm2_path, STORY, "--raw", "--temperature", 0, "-n", 1)
    found = ktcore(*words, "--json").json
    assert (found["new_tokens"], found["decode_tok_s"]) == (1, None)
    assert ", 1 token drawn, loaded in" in ktcore(*words).err


def test_what_it_runs_on_is_said_once_and_not_to_scripts(ktcore: Run, smollm2_path: Path) -> None:
    words = ("run", smollm2_path, STORY, "--raw", "-n", 1)
    assert ktcore(*words, "--backend", "cpu").err.count("Runs on cpu:0, ") == 1
    assert "cpu is used" in ktcore(*words).err
    assert ktcore(*words, "--json").err == ""


LAZY = """
import sys
from ktcore.cli.main import main
try:
    main(sys.argv[1:])
except SystemExit as left:
    assert left.code == 0, left.code
unwanted = "transformers gguf sympy triton llguidance fastapi uvicorn openai torch._dynamo torch._inductor"
print(*sorted(set(unwanted.split()) & sys.modules.keys()), file=sys.stderr)
"""


def test_an_answer_to_a_plain_prompt_imports_nothing_that_it_does_not_need(smollm2_path: Path) -> None:
    words = ("run", str(smollm2_path), STORY, "--raw", "-n", "1", "--json", "--backend", "cpu")
    environment = {**os.environ, "KTCORE_PLUGINS": "cpu", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", LAZY, *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert (done.returncode, done.stderr) == (0, "\n")
