"""Prompts and options as transformers' users have them, held against transformers' own ids."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
import transformers

import ktcore
from ktcore.engine.options import read_options
from ktcore.engine.prompts import Form, read_prompts
from ktcore.errors import RequestError

NEW = 6
TEXTS = ["The cat sat", "on a mat, a mat of straw", "!"]
GREEDY = {"temperature": 0}


@dataclass(frozen=True)
class Both:
    """A random LLaMA with a byte tokenizer, in ktcore and in transformers."""

    ours: ktcore.Model
    theirs: Any
    tokenizer: Any

    def generated(self, ids: torch.Tensor, mask: torch.Tensor | None = None, **options: Any) -> torch.Tensor:
        """Greedy ids of transformers."""
        with torch.no_grad():
            return self.theirs.generate(
                ids, attention_mask=mask, do_sample=False, **({"max_new_tokens": NEW} | options)
            )


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Both]:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("byte-llama")
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(["</s>", "<pad>"])
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="</s>",
        pad_token="<pad>",
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
        chat_template="{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}",
    )
    tokenizer.save_pretrained(folder)
    config = transformers.LlamaConfig(
        vocab_size=260,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=96,
        eos_token_id=256,
        bos_token_id=None,
        initializer_range=0.4,
    )
    theirs = transformers.LlamaForCausalLM(config).eval()
    theirs.save_pretrained(folder)
    with ktcore.load(folder, backend="cpu", threads=1, context=512) as ours:
        yield Both(ours, theirs, tokenizer)


def one(both: Both, text: str = TEXTS[0]) -> list[int]:
    return both.tokenizer(text)["input_ids"]


FORMS: dict[str, Callable[[Any], Any]] = {
    "tensor": lambda ids: torch.tensor(ids),
    "int32": lambda ids: torch.tensor(ids, dtype=torch.int32),
    "array": lambda ids: np.array(ids),
    "list": lambda ids: ids,
    "tuple": tuple,
    "numbers": lambda ids: list(np.array(ids)),
    "scalars": lambda ids: list(torch.tensor(ids)),
}


class TestForms:
    @pytest.mark.parametrize("form", FORMS)
    def test_one_prompt_comes_back_with_its_answer_in_the_form_it_had(self, both: Both, form: str) -> None:
        ids = one(both)
        want = both.generated(torch.tensor([ids]))[0].tolist()
        assert len(want) == len(ids) + NEW
        given = FORMS[form](ids)
        found = both.ours.generate(given, NEW, **GREEDY)
        if isinstance(given, torch.Tensor):
            assert (found.dtype, found.shape) == (torch.int64, (len(want),))
            found = found.tolist()
        elif isinstance(given, np.ndarray):
            assert (found.dtype, found.shape) == (np.int64, (len(want),))
            found = found.tolist()
        assert found == want
        assert all(type(i) is int for i in found)
        text = both.ours.stream(given, NEW, **GREEDY)
        assert "".join(text) == both.tokenizer.decode(want[len(ids) :], skip_special_tokens=True)
        assert text.ids == want[len(ids) :]

    @pytest.mark.parametrize("form", ["tensor", "array"])
    def test_a_batch_is_padded_on_the_left_as_its_mask_says(self, both: Both, form: str) -> None:
        made = both.tokenizer(TEXTS, padding=True, return_tensors="pt")
        assert made["attention_mask"].min() == 0
        want = both.generated(made["input_ids"], made["attention_mask"])
        given = made if form == "tensor" else both.tokenizer(TEXTS, padding=True, return_tensors="np")
        for found in (
            both.ours.generate(given, NEW, **GREEDY),
            both.ours.generate(**given, max_new_tokens=NEW, **GREEDY),
            both.ours.generate(dict(given), NEW, **GREEDY),
            both.ours.generate(given["input_ids"], NEW, attention_mask=given["attention_mask"], **GREEDY),
            both.ours.generate(given["input_ids"], NEW, attention_mask=given["attention_mask"] == 1, **GREEDY),
            both.ours.generate(given["input_ids"], NEW, pad_token_id=257, **GREEDY),
        ):
            assert isinstance(found, torch.Tensor if form == "tensor" else np.ndarray)
            assert found.tolist() == want.tolist()

    def test_what_a_tokenizer_returns_without_tensors_gives_lists(self, both: Both) -> None:
        each = [both.generated(torch.tensor([one(both, text)]))[0].tolist() for text in TEXTS]
        assert both.ours.generate(both.tokenizer(TEXTS), NEW, **GREEDY) == each
        assert both.ours.generate([one(both, text) for text in TEXTS], NEW, **GREEDY) == each
        assert both.ours.generate([torch.tensor(one(both, text)) for text in TEXTS], NEW, **GREEDY) == each
        assert both.ours.generate(both.tokenizer(TEXTS[0]), NEW, **GREEDY) == each[0]

    def test_texts_give_texts(self, both: Both) -> None:
        want = [
            both.tokenizer.decode(both.generated(torch.tensor([one(both, t)]))[0][len(one(both, t)) :]) for t in TEXTS
        ]
        assert both.ours.generate(TEXTS, NEW, **GREEDY) == want
        assert both.ours.generate(tuple(TEXTS), NEW, **GREEDY) == want
        assert both.ours.generate(TEXTS[1], NEW, **GREEDY) == want[1]
        assert both.ours.generate([TEXTS[1]], NEW, **GREEDY) == [want[1]]
        assert "".join(both.ours.stream([TEXTS[1]], NEW, **GREEDY)) == want[1]

    def test_without_a_mask_every_id_is_a_token(self, both: Both) -> None:
        ids = torch.tensor([[257, 257, 5], [1, 2, 3]])
        want = both.generated(ids, torch.ones_like(ids))
        assert both.ours.generate(ids, NEW, **GREEDY).tolist() == want.tolist()
        # an id that also ends answers cannot be told from padding
        assert both.ours.generate(ids, NEW, pad_token_id=257, eos_token_id=257, **GREEDY).tolist() == (
            both.generated(ids, pad_token_id=257, eos_token_id=257).tolist()
        )

    def test_nothing_of_a_stream_is_for_several(self, both: Both) -> None:
        with pytest.raises(RequestError, match="a stream takes one prompt, and 2 were given"):
            both.ours.stream([[1], [2]])

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            (None, "a prompt cannot be None"),
            (7, "a prompt cannot be of type int"),
            (b"text", "of type bytes\n.*text is str, not bytes"),
            ({"text": "hi"}, "must have input_ids, and this dict has 'text'"),
            ({}, "must have input_ids, and this dict has no key"),
            ({"role": "user", "content": "hi"}, r"must have input_ids.*\n.*chat\(\[message\]\)"),
            ([{"role": "user", "content": "hi"}], r"a list of dict\n.*messages go to chat\(\)"),
            ({"input_ids": [1], "token_type_ids": [0], "pixels": 3}, "token_type_ids, pixels of a prompt cannot"),
            (torch.tensor([0.5]), r"a tensor of torch.float32 \[1\]"),
            (torch.tensor([True]), r"a tensor of torch.bool \[1\]"),
            (torch.zeros(1, 1, 1, dtype=torch.int64), r"a tensor of torch.int64 \[1, 1, 1\]"),
            (torch.tensor(3), r"a tensor of torch.int64 \[\]"),
            (np.array(["hi"]), r"an array of <U2 \[1\]"),
            ([1, "hi"], "a list of int and str"),
            ([1, [2]], "a list of int and list"),
            ([1.0, 2], "a list of float and int"),
            ([True, False], "a list of bool"),
            ([[1], ["hi"]], "a list of list"),
            ([None], "a list of None"),
            ({1, 2}, "of type set"),
            ((i for i in (1, 2)), "of type generator"),
            ([], "the prompt is empty"),
            (torch.zeros(0, 4, dtype=torch.int64), "the prompt is empty"),
            ([[1], []], "holds no token"),
            ([1, 260], "token id 260 is outside of the vocabulary of 260"),
            ([[1], [-1]], "token id -1 is outside"),
        ],
    )
    def test_the_rest_is_refused_by_its_type(self, both: Both, given: Any, message: str) -> None:
        for call in (both.ours.generate, both.ours.stream, both.ours.logits):
            with pytest.raises(RequestError, match=message):
                call(given)

    @pytest.mark.parametrize(
        ("mask", "message"),
        [
            ([[1, 1, 0]], "padded on the right or within.*\n.*padding_side = 'left'"),
            ([[1, 0, 1]], "padded on the right or within"),
            ([[0, 0, 0]], "holds no token but padding"),
            ([[1, 1]], r"shaped \[1 x 2\], the ids \[1 x 3\]"),
            ([1, 1, 1], r"shaped \[3\], the ids \[1 x 3\]"),
            ([[1, 1, 2]], "attention_mask holds 2"),
            ([[0.0, 1.0, 1.0]], "attention_mask cannot be a list of list"),
            ("111", "attention_mask cannot be of type str"),
        ],
    )
    def test_a_mask_that_does_not_fit_is_refused(self, both: Both, mask: Any, message: str) -> None:
        with pytest.raises(RequestError, match=message):
            both.ours.generate([[1, 2, 3]], attention_mask=mask)

    def test_what_is_given_twice_or_is_for_ids_is_refused(self, both: Both) -> None:
        with pytest.raises(RequestError, match="a prompt and input_ids are given both"):
            both.ours.generate("hi", input_ids=[1])
        with pytest.raises(RequestError, match="attention_mask is given twice"):
            both.ours.generate({"input_ids": [1], "attention_mask": [1]}, attention_mask=[1])
        with pytest.raises(RequestError, match="belongs to token ids"):
            both.ours.generate("hi", attention_mask=[1])

    def test_a_mapping_may_say_that_it_has_no_mask(self) -> None:
        found = read_prompts({"input_ids": range(3), "attention_mask": None}, lambda text: [])
        assert (found.rows, found.form, found.many) == (([0, 1, 2],), Form.LIST, False)


class TestLogits:
    def test_a_batch_is_that_of_transformers_and_padding_is_no_number(self, both: Both) -> None:
        made = both.tokenizer(TEXTS, padding=True, return_tensors="pt")
        kept = made["attention_mask"] == 1
        positions = (kept.long().cumsum(-1) - 1).clamp(min=0)
        with torch.no_grad():
            want = both.theirs(**made, position_ids=positions).logits
        found = both.ours.logits(made)
        assert found.shape == want.shape
        torch.testing.assert_close(found[kept], want[kept], rtol=0, atol=0.01 * float(want.std()))
        assert found[~kept].isnan().all()
        as_array = both.ours.logits(both.tokenizer(TEXTS, padding=True, return_tensors="np"))
        assert isinstance(as_array, np.ndarray)
        np.testing.assert_array_equal(as_array, found.numpy())

    def test_one_prompt_gives_its_rows_and_lists_give_lists(self, both: Both) -> None:
        ids = one(both)
        want = both.ours.logits(torch.tensor(ids))
        assert want.shape == (len(ids), 260)
        for given in (ids, TEXTS[0], tuple(ids)):
            assert torch.equal(both.ours.logits(given), want)
        assert both.ours.logits(torch.tensor([ids])).shape == (1, len(ids), 260)
        for several in ([ids, ids[:2]], [TEXTS[0], TEXTS[0][:2]]):
            found = both.ours.logits(several)
            torch.testing.assert_close(found[0], want, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(found[1], want[:2], rtol=1e-4, atol=1e-4)


class TestOptions:
    def test_eos_ends_answers_and_pad_fills_their_rows_as_in_transformers(self, both: Both) -> None:
        ids = torch.tensor([one(both, "abc"), one(both, "xyz")])
        free = both.generated(ids, eos_token_id=None, max_new_tokens=12)
        assert both.ours.generate(ids, 12, eos_token_id=None, **GREEDY).tolist() == free.tolist()
        end = int(free[0, 5])
        assert end not in free[1, 3:8]
        for ends in (end, [end, 4]):
            want = both.generated(ids, eos_token_id=ends, pad_token_id=257, max_new_tokens=5)
            assert 257 in want
            found = both.ours.generate(ids, 5, eos_token_id=ends, pad_token_id=257, **GREEDY)
            assert found.tolist() == want.tolist()
        # without one, the id that ended the row
        assert both.ours.generate(ids, 5, eos_token_id=end, **GREEDY)[0].tolist()[6:] == [end, end]

    def test_do_sample_false_is_greedy(self, both: Both) -> None:
        ids = torch.tensor([one(both)])
        want = both.generated(ids).tolist()
        off = {"temperature": None, "top_k": None, "top_p": None}
        for options in ({}, off, {"num_beams": 1, "use_cache": True, "num_return_sequences": 1}):
            assert both.ours.generate(ids, NEW, do_sample=False, **options).tolist() == want
        drawn = both.ours.generate(ids, NEW, do_sample=True, temperature=1.0, seed=1)
        assert drawn.tolist() == both.ours.generate(ids, NEW, temperature=1.0, seed=1).tolist()

    def test_max_length_counts_the_prompt_and_its_padding(self, both: Both) -> None:
        made = both.tokenizer(TEXTS, padding=True, return_tensors="pt")
        width = made["input_ids"].shape[1]
        want = both.generated(**{"ids": made["input_ids"], "mask": made["attention_mask"]}, max_new_tokens=4)
        assert both.ours.generate(made, max_length=width + 4, **GREEDY).tolist() == want.tolist()
        assert both.ours.stream(TEXTS[2], max_length=3, **GREEDY)._sequence.max_new_tokens == 2
        with pytest.raises(RequestError, match=f"max_length={width} leaves no room.*{width} tokens"):
            both.ours.generate(made, max_length=width)

    def test_a_stop_string_ends_ids_as_in_transformers(self, both: Both) -> None:
        ids = torch.tensor([one(both, "abc"), one(both, "xyz")])
        free = both.generated(ids, eos_token_id=None, max_new_tokens=12)[0, 3:].tolist()
        stop = next(c for c in map(both.tokenizer.decode, free[2:]) if "�" not in c)
        want = both.theirs.generate(
            ids, do_sample=False, max_new_tokens=12, stop_strings=[stop], tokenizer=both.tokenizer, pad_token_id=257
        )
        found = both.ours.generate(ids, 12, stop=stop, pad_token_id=257, **GREEDY)
        assert found.tolist() == want.tolist()

    def test_prompt_lookup_has_transformers_name_too(self, both: Both) -> None:
        assert both.ours.stream("hi", prompt_lookup_num_tokens=3)._sequence.lookup.most == 3  # type: ignore[union-attr]
        with pytest.raises(RequestError, match="are the same"):
            both.ours.stream("hi", prompt_lookup_num_tokens=3, prompt_lookup=3)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"temprature": 1}, r"unknown option temprature \(use temperature\)\n.*known: .*max_new_tokens.*do_sample"),
            ({"max_tokens": 1}, r"max_tokens \(use max_new_tokens\)"),
            ({"n_predict": 1, "zzz": 2}, r"unknown options n_predict \(use max_new_tokens\), zzz\n"),
            ({"stop_strings": ["x"]}, r"stop_strings \(use stop\)"),
            ({"num_beams": 4}, "num_beams=4 cannot be taken\n.*no beam search"),
            ({"num_return_sequences": 2}, r"num_return_sequences=2 cannot.*\n.*\[prompt\] \* 4"),
            ({"streamer": object()}, r"streamer=.*\n.*use stream\(\)"),
            ({"generation_config": object()}, "give its values as options"),
            ({"output_scores": True}, r"output_scores=True.*\n.*logits\(\)"),
            ({"do_sample": False, "temperature": 0.5}, "do_sample=False is greedy, and temperature=0.5 is not"),
            ({"do_sample": True, "temperature": 0}, "do_sample=True draws"),
            ({"do_sample": "yes"}, "do_sample must be True or False, not 'yes'"),
            ({"max_length": 9, "max_new_tokens": 3}, "max_length and max_new_tokens are given both"),
            ({"max_length": 0}, "max_length=0 must be at least 1"),
            ({"max_new_tokens": -1}, "max_new_tokens=-1 must be at least 0"),
            ({"max_new_tokens": 1.5}, "max_new_tokens must be an integer, not 1.5"),
            ({"max_new_tokens": True}, "max_new_tokens must be an integer, not True"),
            ({"temperature": "hot"}, "temperature must be a number, not 'hot'"),
            ({"temperature": None}, "temperature must be a number, not None"),
            ({"temperature": True}, "temperature must be a number, not True"),
            ({"temperature": -1}, "temperature=-1.0 must be 0"),
            ({"temperature": float("inf")}, "temperature=inf must be .* finite"),
            ({"temperature": float("nan")}, "temperature=nan must be"),
            ({"repetition_penalty": float("inf")}, "repetition_penalty=inf must be"),
            ({"top_k": 2.5}, "top_k must be an integer, not 2.5"),
            ({"top_k": -2}, "top_k=-2 must be"),
            ({"top_p": 1.5}, "top_p=1.5 must be from 0 to 1"),
            ({"seed": 1 << 64}, "seed=.* must fit into 64 bits"),
            ({"seed": "one"}, "seed must be an integer"),
            ({"prompt_lookup": 65}, "prompt_lookup=65 must be at least 0 and at most 64"),
            ({"prompt_lookup": -1}, "prompt_lookup=-1 must be"),
            ({"eos_token_id": 260}, "eos_token_id: token id 260 is outside of the vocabulary of 260"),
            ({"eos_token_id": "</s>"}, "eos_token_id must be an integer, not '</s>'"),
            ({"pad_token_id": -100}, "pad_token_id: token id -100 is outside"),
            ({"logit_bias": {260: 1.0}}, "logit_bias: token id 260 is outside"),
            ({"logit_bias": {-1: 1.0}}, "logit_bias: token id -1 is outside"),
            ({"logit_bias": {"5": 1.0}}, "logit_bias must be an integer, not '5'"),
            ({"logit_bias": [5]}, "logit_bias must be a mapping"),
            ({"logit_bias": {5: "x"}}, "logit_bias must be a number, not 'x'"),
            ({"stop": 5}, "stop must be a string or a list of strings, not 5"),
            ({"stop": [5]}, "stop must be a string or a list of strings"),
            ({"stop": ["a", ""]}, "stop holds an empty string"),
        ],
    )
    def test_what_cannot_be_taken_is_named_with_what_to_use(self, both: Both, options: Any, message: str) -> None:
        for prompt in ("hi", [1, 2]):
            with pytest.raises(RequestError, match=message):
                both.ours.generate(prompt, **options)
        with pytest.raises(RequestError, match=message):
            both.ours.chat([{"role": "user", "content": "hi"}], **options)

    def test_a_chat_has_no_length_that_a_caller_could_count(self, both: Both) -> None:
        with pytest.raises(RequestError, match="max_length cannot be given for a chat"):
            both.ours.chat([{"role": "user", "content": "hi"}], max_length=99)

    def test_values_that_are_off_or_at_an_end_are_taken(self) -> None:
        off = dict.fromkeys(("top_k", "top_p", "min_p", "typical_p", "repetition_penalty", "seed"))
        assert read_options(off, None, 9).params == ktcore.SamplingParams()
        taken = read_options({"prompt_lookup": 64, "logit_bias": {0: 1, 8: -1.5}, "eos_token_id": [0, 8]}, 0, 9)
        assert (taken.max_new_tokens, taken.output.prompt_lookup, taken.output.stop_ids) == (0, 64, {0, 8})
        assert taken.params.logit_bias == {0: 1.0, 8: -1.5}
        assert read_options({}, None, 9).max_new_tokens == 64


class TestChat:
    @pytest.mark.parametrize(
        ("messages", "message"),
        [
            ("hi", r"takes messages, not a text\n.*\[\{\"role\": \"user\", \"content\": 'hi'\}\].*generate\(\)"),
            ({"role": "user", "content": "hi"}, r"not one dict\n.*\[message\]"),
            (None, "a list of messages, not NoneType"),
            (b"hi", "a list of messages, not bytes"),
            ([], "the conversation is empty"),
            (["hi"], r"messages\[0\] must be a mapping, not str\n.*'hi'"),
            ([{"role": "user", "content": "a"}, 5], r"messages\[1\] must be a mapping, not int"),
            ([{"content": "hi"}], r"messages\[0\] has no role"),
            ([{"role": 5, "content": "hi"}], r"messages\[0\]: role must be a name, not 5"),
            ([{"role": "user"}], r"messages\[0\] has no content"),
            ([{"role": "user", "name": "x", "content": None}], r"messages\[0\] has no content"),
            ([{"role": "user", "content": 5}], r"messages\[0\]: content must be a text or a list of parts, not int"),
            ([{"role": "user", "content": ["hi"]}], r"messages\[0\].content\[0\] must be a part with a type"),
            ([{"role": "user", "content": [{"type": "text"}]}], r"content\[0\]: a part of type text must have a text"),
            (
                [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {}}]}],
                r"content\[1\]: image_url parts cannot be taken",
            ),
        ],
    )
    def test_what_is_no_conversation_says_what_one_is(self, both: Both, messages: Any, message: str) -> None:
        with pytest.raises(RequestError, match=message):
            both.ours.chat(messages)

    def test_a_call_needs_no_content_and_a_chat_answers(self, both: Both) -> None:
        said = [{"role": "user", "content": "hi"}, {"role": "assistant", "tool_calls": []}]
        stream = both.ours.stream_chat(said, **GREEDY)
        assert stream._sequence.max_new_tokens == 512
        text = "user: hi\n"
        assert both.ours.chat(said[:1], NEW, **GREEDY) == both.ours.generate(text, NEW, **GREEDY)


class TestTurns:
    def test_streams_in_turn_share_the_steps_and_give_what_each_gives_alone(self, both: Both) -> None:
        alone = [list(both.ours.stream(text, 20, **GREEDY)) for text in TEXTS]
        streams = [iter(both.ours.stream(text, 20, **GREEDY)) for text in TEXTS]
        heads = [next(stream) for stream in streams]
        assert both.ours.generate(TEXTS[0], 20, **GREEDY) == "".join(alone[0])
        assert both.ours.generate([1, 2], 3, **GREEDY)[:2] == [1, 2]
        for head, stream, text in zip(heads, streams, alone, strict=True):
            assert head + "".join(stream) == "".join(text)

    def test_a_forgotten_stream_holds_up_nobody(self, both: Both) -> None:
        kept = iter(both.ours.stream(TEXTS[0], 400, eos_token_id=None, **GREEDY))
        next(kept)
        assert both.ours.generate(TEXTS[1], 3, **GREEDY)
        del kept
        gc.collect()
        assert not both.ours.engine.scheduler.running

    def test_a_stream_dropped_in_the_midst_of_a_step_leaves_with_the_next(self, both: Both) -> None:
        stream = both.ours.stream(TEXTS[0], 400, eos_token_id=None, **GREEDY)
        steps = iter(stream)
        next(steps)
        with both.ours._running():
            steps.close()  # type: ignore[attr-defined]
            assert both.ours.engine.scheduler.running
        both.ours.generate([5], 2, **GREEDY)
        assert not both.ours.engine.scheduler.running

    def test_a_stream_may_be_read_from_another_thread(self, both: Both) -> None:
        steps = iter(both.ours.stream(TEXTS[0], 20, **GREEDY))
        found = [next(steps)]
        reader = threading.Thread(target=lambda: found.extend(steps))
        reader.start()
        reader.join(60)
        assert found == list(both.ours.stream(TEXTS[0], 20, **GREEDY))
        both.ours.generate("still there", 1)


def _load(both: Both) -> ktcore.Model:
    return ktcore.load(Path(both.ours.checkpoint.path), backend="cpu", threads=1, context=64)


class TestEnds:
    def test_a_model_says_what_it_took_and_whether_it_is_closed(self, both: Both) -> None:
        model = _load(both)
        assert (model.backend, model.device, model.why) == ("cpu", "cpu:0", "cpu was asked for.")
        assert str(model.taken) in repr(model)
        assert "<ktcore.Model llama from " in repr(model)
        assert "context of 64 tokens" in repr(model)
        model.close()
        assert ", closed. Runs on cpu:0, " in repr(model)

    def test_closing_twice_is_fine_and_use_after_it_is_an_error(self, both: Both) -> None:
        model = _load(both)
        begun = iter(model.stream("hi", 20, eos_token_id=None, **GREEDY))
        next(begun)
        later = model.stream("hi")
        model.close()
        model.close()
        for use in (
            lambda: model.generate("hi"),
            lambda: model.generate([1]),
            lambda: model.stream("hi"),
            lambda: model.logits([1]),
            lambda: model.chat([{"role": "user", "content": "hi"}]),
            lambda: next(begun),
            lambda: next(iter(later)),
            model.__enter__,
        ):
            with pytest.raises(RequestError, match="the model is closed"):
                use()
