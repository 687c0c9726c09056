"""Token ids against llama.cpp's; folders and chats against transformers; streaming against decoding at once."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import transformers
from transformers.integrations.gguf import gguf_tokenizer_mapping

from ktcore.errors import TokenizerError
from ktcore.text.from_gguf import tokenizer_from_metadata
from ktcore.text.open import load_tokenizer
from ktcore.text.pre_tokenizers import PRE_TOKENIZERS
from ktcore.text.tokenizer import Tokenizer
from ktcore.weights import Checkpoint, open_checkpoint

from .tokenizer_corpus import corpus

DATA = Path(__file__).parent / "data"
SPLITS: dict[str, str] = getattr(gguf_tokenizer_mapping, "GGUF_PRE_TOKENIZER_SPLITS", {})
NO_SPLITS = pytest.param(
    "", marks=pytest.mark.skip(reason=f"transformers {transformers.__version__} has no table of splits")
)
CHAT = [
    {"role": "user", "content": "What is 12 + 30?"},
    {"role": "assistant", "content": "42, naturally."},
    {"role": "user", "content": "Schön! 😀"},
]


def fixture(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((DATA / name).read_text(encoding="utf-8"))
    return content


PRE = fixture("tokenizer_pre.json")
SPM = fixture("tokenizer_spm.json")
LINES = corpus(1000)
SMOLLM2_CASES = fixture("tokenizer_smollm2.json")["cases"]

# Where llama.cpp departs from the pattern that a model was trained with. GPT-4o's upper and lower case letters are
# ASCII only there, Kimi's words do not break at capitals, and spaces beyond ASCII are no letters of the CJK class.
_CASES = {"สวัสดีชาวโลก", "नमस्ते दुनिया १२३", "MiXeD CaSe WORDS and ÜBER straße"}
_SPACES = {text for text in PRE["texts"] if "\u3000" in text}
DEPARTURES = {
    **dict.fromkeys(("gpt-4o", "llama4", "kanana2", "minimax-m2", "talkie", "tekken"), _CASES),
    "kimi-k2": _CASES | {text for text in PRE["texts"] if text.startswith("camelCase")},
    **dict.fromkeys(("deepseek-llm", "deepseek-coder"), _SPACES),
}


def metadata(**changes: Any) -> dict[str, Any]:
    """A tiny byte-level vocabulary; changes are keys below tokenizer.ggml, None to take one away."""
    count = len(PRE["tokens"])
    entries = {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": PRE["tokens"],
        "merges": PRE["merges"],
        "token_type": PRE["token_type"],
        "bos_token_id": count - 3,
        "eos_token_id": count - 2,
        **changes,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in entries.items() if value is not None}


def spm_metadata(**changes: Any) -> dict[str, Any]:
    entries = {"model": "llama", **{key: SPM[key] for key in ("tokens", "scores", "token_type")}, **changes}
    return {f"tokenizer.ggml.{key}": value for key, value in entries.items() if value is not None}


def build(entries: dict[str, Any]) -> Tokenizer:
    tokenizer = tokenizer_from_metadata(entries, "model.gguf")
    assert tokenizer is not None
    return tokenizer


@pytest.fixture(scope="module")
def smollm2(smollm2_path: Path) -> Iterator[Checkpoint]:
    with open_checkpoint(smollm2_path) as checkpoint:
        yield checkpoint


@pytest.fixture(scope="module")
def smollm2_tokenizer(smollm2: Checkpoint) -> Tokenizer:
    tokenizer = load_tokenizer(smollm2)
    assert tokenizer is not None
    return tokenizer


class TestSmolLM2:
    @pytest.mark.parametrize(("text", "ids"), SMOLLM2_CASES, ids=range(len(SMOLLM2_CASES)))
    def test_ids_are_llama_cpps(self, smollm2_tokenizer: Tokenizer, text: str, ids: list[int]) -> None:
        assert smollm2_tokenizer.encode(text) == ids
        assert smollm2_tokenizer.decode(ids, skip_special=False) == text

    def test_special_tokens(self, smollm2_tokenizer: Tokenizer) -> None:
        assert smollm2_tokenizer.vocab_size == 49152
        assert (smollm2_tokenizer.bos_id, smollm2_tokenizer.eos_id) == (1, 2)
        assert smollm2_tokenizer.stop_ids == {0, 2}  # <|endoftext|>, <|im_end|>
        assert smollm2_tokenizer.token_id("<|im_start|>") == 1
        assert smollm2_tokenizer.decode([1, 19556, 2]) == "Hello"

    def test_chats_are_written_as_transformers_writes_them(
        self, smollm2_tokenizer: Tokenizer, smollm2_path: Path
    ) -> None:
        reference = transformers.PreTrainedTokenizerFast.from_pretrained(
            str(smollm2_path.parent), gguf_file=smollm2_path.name
        )
        for prompt in (True, False):
            text = reference.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=prompt)
            assert smollm2_tokenizer.apply_chat_template(CHAT, add_generation_prompt=prompt) == text
            assert smollm2_tokenizer.encode_chat(CHAT, add_generation_prompt=prompt) == smollm2_tokenizer.encode(text)


class TestPreTokenizers:
    @pytest.mark.parametrize("name", PRE_TOKENIZERS)
    def test_ids_are_llama_cpps(self, name: str) -> None:
        tokenizer = build(metadata(pre=name))
        (expected,) = [row["ids"] for row in PRE["rows"] if name in row["pre"]]
        different = set()
        for text, ids in zip(PRE["texts"], expected, strict=True):
            if tokenizer.encode(text, add_special=False) != ids:
                different.add(text)
        assert different == DEPARTURES.get(name, set())

    @pytest.mark.parametrize("name", sorted(set(PRE_TOKENIZERS) & set(SPLITS)) or [NO_SPLITS])
    def test_pieces_are_those_of_transformers_pattern(self, name: str) -> None:
        from tokenizers import Regex, pre_tokenizers

        reference = pre_tokenizers.Split(Regex(SPLITS[name]), "isolated")
        ours = pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in PRE_TOKENIZERS[name].patterns]
        )
        for text in [*PRE["texts"], *LINES]:
            assert ours.pre_tokenize_str(text) == reference.pre_tokenize_str(text)

    def test_kimis_pieces_are_those_of_its_tiktoken_pattern(self) -> None:
        # tokenization_kimi.py of moonshotai/Kimi-K2-Instruct, run by the regex module, which has set operations.
        regex = pytest.importorskip("regex")
        upper = r"[[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]&&[^\p{Han}]]"
        lower = r"[[\p{Ll}\p{Lm}\p{Lo}\p{M}]&&[^\p{Han}]]"
        end = "(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
        pattern = (
            rf"[\p{{Han}}]+|[^\r\n\p{{L}}\p{{N}}]?{upper}*{lower}+{end}|[^\r\n\p{{L}}\p{{N}}]?{upper}+{lower}*{end}"
            r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        )
        from tokenizers import Regex, pre_tokenizers

        (ours,) = PRE_TOKENIZERS["kimi-k2"].patterns
        split = pre_tokenizers.Split(Regex(ours), "isolated")
        for text in [*PRE["texts"], *LINES]:
            pieces = [piece for piece, _ in split.pre_tokenize_str(text)]
            assert pieces == regex.findall(pattern, text, flags=regex.V1)

    def test_the_texts_tell_the_patterns_apart(self) -> None:
        patterns = {name: row.patterns for name, row in PRE_TOKENIZERS.items()}
        outcomes = {}
        for name in patterns:
            tokenizer = build(metadata(pre=name))
            outcomes[name] = tuple(tuple(tokenizer.encode(text, add_special=False)) for text in PRE["texts"])
        # these say what qwen2 and llama-bpe say, in other words
        merged_alike = {"bailingmoe", "bailingmoe2", "llada-moe", "minicpm5"}
        for name in set(patterns) - merged_alike:
            for other in set(patterns) - merged_alike:
                if outcomes[name] == outcomes[other]:
                    assert patterns[name] == patterns[other], (name, other)

    def test_an_unknown_name_is_refused_with_the_known_ones(self) -> None:
        with pytest.raises(TokenizerError, match=r"pre-tokenizer 'brandnew' is unknown[\s\S]*qwen2"):
            build(metadata(pre="brandnew"))

    def test_none_means_default(self) -> None:
        text = PRE["texts"][6]
        assert build(metadata(pre=None)).encode(text) == build(metadata(pre="default")).encode(text)


class TestSentencePiece:
    @pytest.mark.parametrize(("prefix", "key"), [(None, "ids"), (True, "ids"), (False, "ids_without_prefix")])
    def test_ids_are_llama_cpps(self, prefix: bool | None, key: str) -> None:
        tokenizer = build(spm_metadata(add_space_prefix=prefix))
        for text, ids in zip(SPM["texts"], SPM[key], strict=True):
            assert tokenizer.encode(text, add_special=False) == ids, text

    def test_text_survives(self) -> None:
        tokenizer = build(spm_metadata())
        for text in PRE["texts"]:
            assert tokenizer.decode(tokenizer.encode(text)) == text

    def test_bos_is_the_default_and_follows_the_flags(self) -> None:
        plain = build(spm_metadata()).encode("hi", add_special=False)
        assert build(spm_metadata()).encode("hi") == [1, *plain]
        assert build(spm_metadata(add_bos_token=False)).encode("hi") == plain
        assert build(spm_metadata(add_eos_token=True)).encode("hi") == [1, *plain, 2]

    def test_scores_are_needed(self) -> None:
        with pytest.raises(TokenizerError, match="without a score for each token"):
            build(spm_metadata(scores=[0.0]))


class TestSpecialTokens:
    def test_control_and_user_tokens_are_matched_whole(self) -> None:
        tokenizer = build(metadata())
        bos, eos, think = range(len(PRE["tokens"]) - 3, len(PRE["tokens"]))
        ids = tokenizer.encode("<s>a<think>b</s>")
        assert [i for i in ids if i >= bos] == [bos, think, eos]
        assert tokenizer.decode(ids) == "a<think>b"
        assert tokenizer.decode(ids, skip_special=False) == "<s>a<think>b</s>"

    @pytest.mark.parametrize(
        ("pre", "adds"), [("gpt-2", False), ("llama-bpe", True), ("tekken", True), ("qwen2", False)]
    )
    def test_the_vocabularys_family_decides_about_bos_unless_the_file_does(self, pre: str, adds: bool) -> None:
        bos = len(PRE["tokens"]) - 3
        assert (build(metadata(pre=pre)).encode("x")[0] == bos) == adds
        assert build(metadata(pre=pre, add_bos_token=True)).encode("x")[0] == bos
        assert build(metadata(pre=pre, add_bos_token=False)).encode("x")[0] != bos

    def test_stop_tokens_come_from_ids_and_from_known_names(self) -> None:
        count = len(PRE["tokens"])
        added = ["<|eot_id|>", "<|user|>", "<|im_end|>"]
        entries = {
            "tokens": PRE["tokens"] + added,
            "token_type": [*PRE["token_type"], 3, 3, 1],
            "eom_token_id": 7,
        }
        # eos, eom and two by name, though one is typed as text; <|user|> ends a turn only for GLM
        assert build(metadata(**entries)).stop_ids == {count - 2, 7, count, count + 2}
        assert build(metadata(pre="glm4", **entries)).stop_ids == {count - 2, 7, count, count + 1, count + 2}

    def test_an_id_outside_the_vocabulary_means_none(self) -> None:
        tokenizer = build(metadata(bos_token_id=2**32 - 1, eos_token_id=2**32 - 1))
        assert (tokenizer.bos_id, tokenizer.eos_id) == (None, None)
        assert tokenizer.stop_ids == {len(PRE["tokens"]) - 2}  # </s>, by its name
        with pytest.raises(TokenizerError, match="add_bos_token is set, but there is no bos_token_id"):
            build(metadata(bos_token_id=2**32 - 1, add_bos_token=True))


class TestBadMetadata:
    def test_no_tokenizer_is_none(self) -> None:
        assert tokenizer_from_metadata({"general.architecture": "llama"}, "x") is None
        assert tokenizer_from_metadata({"tokenizer.ggml.model": "none"}, "x") is None

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"model": "bert"}, "tokenizer model 'bert' is not supported"),
            ({"tokens": None}, r"has no tokenizer\.ggml\.tokens"),
            ({"tokens": 7}, r"has no tokenizer\.ggml\.tokens"),
            ({"tokens": ["a", "b", "a"], "token_type": None}, "tokens 0 and 2 are both 'a'"),
            ({"tokens": ["a", 3]}, "must hold strings"),
            ({"token_type": [1]}, "does not give a type for each of"),
            ({"merges": None}, r"without tokenizer\.ggml\.merges"),
            ({"merges": ["ab"]}, "merge 'ab' is not two tokens"),
            ({"merges": ["notatoken alsonot"]}, "do not fit together"),
            ({"pre": ["qwen2"]}, "pre-tokenizer"),
        ],
    )
    def test_errors_name_the_cause(self, changes: dict[str, Any], message: str) -> None:
        with pytest.raises(TokenizerError, match=message) as error:
            build(metadata(**changes))
        assert "model.gguf" in str(error.value)

    @pytest.mark.parametrize("whole", ['{"cut": ', "{}", ""])
    def test_a_damaged_tokenizer_of_hugging_face_is_named(self, whole: str) -> None:
        with pytest.raises(TokenizerError, match=r"^model\.gguf: tokenizer\.huggingface\.json cannot be read: "):
            build(metadata() | {"tokenizer.huggingface.json": whole})

    def test_a_tokenizer_of_hugging_face_goes_first(self) -> None:
        whole = build(metadata(pre="qwen2"))._backend
        found = build(metadata(pre="no such split") | {"tokenizer.huggingface.json": whole.to_str()})
        for text in PRE["texts"]:
            assert found.encode(text, add_special=False) == whole.encode(text, add_special_tokens=False).ids


class TestStreaming:
    @pytest.mark.parametrize("kind", ["byte level", "sentencepiece"])
    def test_pieces_make_up_the_whole_text_and_are_whole_characters(self, kind: str) -> None:
        tokenizer = build(metadata() if kind == "byte level" else spm_metadata())
        for text in PRE["texts"]:
            ids = tokenizer.encode(text)
            stream = tokenizer.stream_decoder()
            pieces = [stream.push(i) for i in ids]
            assert not any("\ufffd" in piece for piece in pieces)
            assert "".join(pieces) + stream.flush() == tokenizer.decode(ids) == text

    def test_real_tokens_stream(self, smollm2_tokenizer: Tokenizer) -> None:
        for text, ids in SMOLLM2_CASES:
            stream = smollm2_tokenizer.stream_decoder(skip_special=False)
            assert "".join(stream.push(i) for i in ids) + stream.flush() == text

    def test_a_character_is_held_until_complete(self, smollm2_tokenizer: Tokenizer) -> None:
        ids = smollm2_tokenizer.encode("漢")
        assert len(ids) == 3
        stream = smollm2_tokenizer.stream_decoder()
        assert [stream.push(i) for i in ids] == ["", "", "漢"]

    def test_control_tokens_inside_a_character_do_not_break_it(self, smollm2_tokenizer: Tokenizer) -> None:
        first, second, third = smollm2_tokenizer.encode("漢")
        stream = smollm2_tokenizer.stream_decoder()
        pushed = [1, 1, 1, first, 2, 2, second, 0, third]
        assert "".join(stream.push(i) for i in pushed) == "漢"

    def test_an_unfinished_character_comes_out_on_flush(self, smollm2_tokenizer: Tokenizer) -> None:
        first, *_ = smollm2_tokenizer.encode("漢")
        stream = smollm2_tokenizer.stream_decoder()
        assert stream.push(first) == ""
        assert stream.flush() == "\ufffd"
        assert stream.flush() == ""

    def test_broken_bytes_do_not_hold_text_back_for_ever(self, smollm2_tokenizer: Tokenizer) -> None:
        first, *_ = smollm2_tokenizer.encode("漢")
        stream = smollm2_tokenizer.stream_decoder()
        assert "".join(stream.push(first) for _ in range(20)).count("\ufffd") >= 15

    def test_random_ids_give_what_decoding_at_once_gives(self, smollm2_tokenizer: Tokenizer) -> None:
        draw = random.Random(5)
        for _ in range(20):
            ids = [draw.randrange(49152) for _ in range(60)]
            stream = smollm2_tokenizer.stream_decoder()
            streamed = "".join(stream.push(i) for i in ids) + stream.flush()
            assert streamed == smollm2_tokenizer.decode(ids)


def test_text_that_is_no_unicode_is_mended_not_refused() -> None:
    tokenizer = build(metadata())
    assert tokenizer.decode(tokenizer.encode("a\ud83d\ude00b")) == "a😀b"
    assert tokenizer.decode(tokenizer.encode("a\ud83db")) == "a\ufffdb"


def test_ids_outside_the_vocabulary_decode_to_nothing() -> None:
    tokenizer = build(metadata())
    assert tokenizer.decode([-1, *tokenizer.encode("x"), 10**6, 10**12]) == "x"


class TestFolders:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        tokenizer = build(metadata(pre="qwen2"))
        transformers.PreTrainedTokenizerFast(
            tokenizer_object=tokenizer._backend,
            bos_token="<s>",
            eos_token="</s>",
            chat_template="{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}"
            "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}",
        ).save_pretrained(tmp_path)
        (tmp_path / "config.json").write_text('{"eos_token_id": 3}')
        return tmp_path

    def load(self, folder: Path) -> Tokenizer:
        from ktcore.text.from_folder import tokenizer_from_folder

        tokenizer = tokenizer_from_folder(folder, json.loads((folder / "config.json").read_text()))
        assert tokenizer is not None
        return tokenizer

    def test_ids_text_and_chats_are_transformers(self, folder: Path) -> None:
        ours, reference = self.load(folder), transformers.AutoTokenizer.from_pretrained(str(folder))
        for text in PRE["texts"]:
            ids = reference.encode(text)
            assert ours.encode(text) == ids
            assert ours.decode(ids) == reference.decode(ids, skip_special_tokens=True)
        assert ours.vocab_size == len(reference)
        chat = reference.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
        assert ours.apply_chat_template(CHAT) == chat

    def test_the_configurations_flags_decide_about_bos_and_eos(self, folder: Path) -> None:
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        settings.update(add_bos_token=True, add_eos_token=False)
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        ours = self.load(folder)
        assert ours.encode("hi") == [ours.bos_id, *ours.encode("hi", add_special=False)]

    @pytest.mark.parametrize("stored", [True, False])
    @pytest.mark.parametrize("flags", [{}, {"bos": True}, {"bos": False}, {"eos": True}, {"eos": False}])
    def test_a_flag_overrules_tokenizer_json_and_an_absent_one_leaves_it(
        self, folder: Path, stored: bool, flags: dict[str, bool]
    ) -> None:
        import tokenizers

        path, bos, eos = str(folder / "tokenizer.json"), "<s>", "</s>"
        backend = tokenizers.Tokenizer.from_file(path)
        ids = [(name, backend.token_to_id(name)) for name in (bos, eos)]
        template = f"{bos} $A" if stored else "$A"
        backend.post_processor = tokenizers.processors.TemplateProcessing(single=template, special_tokens=ids)
        backend.save(path)
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        settings = {key: value for key, value in settings.items() if not key.startswith("add_")}
        settings |= {"bos_token": bos, "eos_token": eos} | {f"add_{name}_token": value for name, value in flags.items()}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        ours = self.load(folder)
        want = [ids[0][1]] * flags.get("bos", stored) + ours.encode("hi", add_special=False)
        assert ours.encode("hi") == want + [ids[1][1]] * flags.get("eos", False)

    def test_stop_tokens_are_those_of_the_generation_config(self, folder: Path) -> None:
        (folder / "generation_config.json").write_text('{"eos_token_id": [5, 9]}')
        ours = self.load(folder)
        assert ours.stop_ids == {3, 5, 9, ours.token_id("</s>")}

    def test_a_template_file_beats_the_configuration(self, folder: Path) -> None:
        (folder / "chat_template.jinja").write_text("from file: {{ messages[0].content }}")
        assert self.load(folder).apply_chat_template(CHAT) == "from file: What is 12 + 30?"

    def test_a_list_of_templates_gives_its_default(self, folder: Path) -> None:
        (folder / "chat_template.jinja").unlink(missing_ok=True)
        templates = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
        (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": templates}))
        assert self.load(folder).apply_chat_template(CHAT) == "plain"

    def test_templates_without_a_name_or_a_text_are_left_out(self, folder: Path) -> None:
        (folder / "chat_template.jinja").unlink(missing_ok=True)
        templates = [
            {"name": "default", "template": "plain"},
            {"name": "empty", "template": None},
            {"name": None, "template": "nameless"},
            "no entry",
        ]
        (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": templates}))
        ours = self.load(folder)
        assert ours.apply_chat_template(CHAT) == "plain"
        assert set(ours.chat_templates) == {"default"}

    def test_no_tokenizer_is_none(self, tmp_path: Path) -> None:
        from ktcore.text.from_folder import tokenizer_from_folder

        assert tokenizer_from_folder(tmp_path, {}) is None

    @pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "generation_config.json"])
    def test_a_damaged_file_is_named(self, folder: Path, name: str) -> None:
        (folder / name).write_text('{"cut": ')
        with pytest.raises(TokenizerError, match=name.replace(".", r"\.")):
            self.load(folder)

    def test_a_kind_that_cannot_be_converted_says_what_to_fetch(self, folder: Path) -> None:
        (folder / "tokenizer.json").unlink()
        (folder / "tokenizer.model").write_bytes(b"not a model")
        with pytest.raises(TokenizerError, match=r"cannot be converted[\s\S]*fetch tokenizer\.json"):
            self.load(folder)
