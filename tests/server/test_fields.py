"""Every field that OpenAI's, Ollama's, vLLM's, SGLang's and llama.cpp's requests know: served, idle, or refused."""

from __future__ import annotations

import json
import re
import typing
from collections.abc import Callable, Iterator
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="needs the extra `server`")
pytest.importorskip("httpx", reason="the test's HTTP client")
pytest.importorskip("openai", reason="its types are walked")
pytest.importorskip("ollama", reason="its types are walked")

from ollama import _types as ollama
from openai.types import completion_create_params, embedding_create_params
from openai.types.chat import completion_create_params as chat_create_params
from openai.types.chat.chat_completion_assistant_message_param import (
    ChatCompletionAssistantMessageParam,
)
from openai.types.chat.chat_completion_stream_options_param import ChatCompletionStreamOptionsParam
from openai.types.responses import response_create_params
from openai.types.responses.response_text_config_param import ResponseTextConfigParam
from openai.types.shared_params.reasoning import Reasoning
from pydantic import ValidationError

import ktcore
from ktcore.server.api.complaints import complaint
from ktcore.server.api.embeddings import EmbeddingAsk, OllamaEmbedAsk
from ktcore.server.api.fields import IDLE, REFUSED, Body
from ktcore.server.api.ollama.schemas import GenerateAsk, OllamaChatAsk, OllamaMessage, Options
from ktcore.server.api.openai import schemas as openai_schemas
from ktcore.server.api.openai.messages import ChatMessage
from ktcore.server.api.openai.schemas import ChatAsk, CompletionAsk
from ktcore.server.api.responses import schemas as responses_schemas
from ktcore.server.api.responses.schemas import ResponsesAsk, TextSettings
from ktcore.server.http.openapi import BODIES

from .test_http import CHAT, Client, served

PLAIN = "/v1/completions"
SAY = [{"role": "user", "content": "x"}]
LEAST: dict[str, dict[str, Any]] = {
    CHAT: {"model": "tiny", "messages": SAY, "max_tokens": 3},
    PLAIN: {"model": "tiny", "prompt": "x", "max_tokens": 3},
    "/v1/responses": {"model": "tiny", "input": "x"},
    "/v1/embeddings": {"model": "tiny", "input": "x"},
    "/tokenize": {"prompt": "x"},
    "/api/generate": {"model": "tiny", "prompt": "x"},
    "/api/chat": {"model": "tiny", "messages": SAY},
}
# Of vLLM's ChatCompletionRequest and CompletionRequest (November 2026) and of the guided_ fields that came before.
VLLM = """
use_beam_search top_k min_p repetition_penalty watermarking length_penalty stop_token_ids ignore_eos min_tokens
include_stop_str_in_output skip_special_tokens spaces_between_special_tokens truncate_prompt_tokens
truncation_side prompt_logprobs logprob_token_ids allowed_token_ids bad_words echo add_generation_prompt
continue_final_message add_special_tokens documents chat_template chat_template_kwargs media_io_kwargs
mm_processor_kwargs structured_outputs priority request_id session_id return_tokens_as_token_ids
return_token_ids return_token_offsets return_prompt_text routed_experts_prompt_start return_mm_kwargs cache_salt
kv_transfer_params ec_transfer_params vllm_xargs repetition_detection stream_interval logits_processors
prompt_embeds response_format reasoning_effort thinking_token_budget include_reasoning guided_json guided_regex
guided_choice guided_grammar structural_tag guided_decoding_backend guided_whitespace_pattern"""
# Of SGLang's CompletionRequest and ChatCompletionRequest.
SGLANG = """
top_k min_p min_tokens json_schema regex ebnf repetition_penalty stop_token_ids stop_regex no_stop_trim
ignore_eos skip_special_tokens lora_path session_id session_params response_format custom_params
custom_logit_processor images_config bootstrap_host bootstrap_port bootstrap_room routed_dp_rank
disagg_prefill_dp_rank data_parallel_rank rid extra_key cache_salt ngram_corpus_id priority custom_labels
return_hidden_states return_routed_experts routed_experts_start_len return_cached_tokens_details
return_token_ids separate_reasoning stream_reasoning continue_final_message chat_template_kwargs input_ids"""
# What llama.cpp's server reads of a request (tools/server/server-task.cpp).
LLAMA_CPP = """
cache_prompt return_tokens return_progress n_predict max_tokens n_indent n_keep n_discard n_cmpl n_cache_reuse
t_max_predict_ms response_fields top_k top_p min_p top_n_sigma xtc_probability xtc_threshold typical_p
temperature dynatemp_range dynatemp_exponent repeat_last_n repeat_penalty frequency_penalty presence_penalty
dry_multiplier dry_base dry_allowed_length dry_penalty_last_n dry_sequence_breakers mirostat mirostat_tau
mirostat_eta adaptive_target adaptive_decay seed n_probs min_keep backend_sampling post_sampling_probs lora
json_schema grammar grammar_lazy grammar_triggers preserved_tokens chat_format chat_parser reasoning_format
thinking_forced_open parse_tool_calls reasoning_budget_tokens logit_bias ignore_eos stop samplers
timings_per_token id_slot"""


def _names(kind: Any) -> list[str]:
    if hasattr(kind, "model_fields"):
        return list(kind.model_fields)
    return sorted(typing.get_type_hints(kind) if not hasattr(kind, "__required_keys__") else _keys(kind))


def _keys(kind: Any) -> frozenset[str]:
    return frozenset(kind.__required_keys__ | kind.__optional_keys__)


WALKED: list[tuple[type[Body], Any]] = [
    (ChatAsk, chat_create_params.CompletionCreateParamsStreaming),
    (CompletionAsk, completion_create_params.CompletionCreateParamsStreaming),
    (EmbeddingAsk, embedding_create_params.EmbeddingCreateParams),
    (ResponsesAsk, response_create_params.ResponseCreateParamsStreaming),
    (openai_schemas.StreamOptions, ChatCompletionStreamOptionsParam),
    (responses_schemas.StreamOptions, response_create_params.StreamOptions),
    (responses_schemas.Reasoning, Reasoning),
    (TextSettings, ResponseTextConfigParam),
    (ChatMessage, ChatCompletionAssistantMessageParam),
    (OllamaChatAsk, ollama.ChatRequest),
    (GenerateAsk, ollama.GenerateRequest),
    (OllamaEmbedAsk, ollama.EmbedRequest),
    (OllamaEmbedAsk, ollama.EmbeddingsRequest),
    (Options, ollama.Options),
    (OllamaMessage, ollama.Message),
]


@pytest.mark.parametrize(("ask", "known"), WALKED, ids=lambda each: each.__name__)
def test_every_field_of_the_clients_types_is_served_idle_or_refused(ask: type[Body], known: Any) -> None:
    names = _names(known)
    assert names
    assert [name for name in names if name not in ask.served() | ask.idle.keys() | ask.refused.keys()] == []


@pytest.mark.parametrize("ask", [ChatAsk, CompletionAsk, ResponsesAsk, EmbeddingAsk])
def test_no_field_of_other_servers_is_overlooked(ask: type[Body]) -> None:
    known = {*VLLM.split(), *SGLANG.split(), *LLAMA_CPP.split()}
    assert sorted(known - ask.served() - ask.idle.keys() - ask.refused.keys()) == []


def _complaint(route: str, **more: Any) -> tuple[str | None, str] | None:
    body = {**LEAST[route], **more}
    try:
        BODIES[route].model_validate(body)
    except ValidationError as error:
        return complaint(error.errors(), body)
    return None


@pytest.mark.parametrize("route", list(LEAST))
def test_what_is_refused_is_named_and_asking_for_nothing_is_taken(route: str) -> None:
    kind: Any = BODIES[route]
    for name, rule in kind.refused.items():
        if name in kind.served():
            continue
        told = _complaint(route, **{name: {"what": ["ever"]}})
        assert told is not None, name
        assert told[0] == name
        assert told[1].startswith("is not supported here")
        for nothing in rule.nothing:
            assert _complaint(route, **{name: nothing}) is None, (name, nothing)
    assert _complaint(route, a_word_of_no_server=5, **dict.fromkeys(kind.idle.keys() - kind.served(), 7)) is None


def test_no_number_is_taken_for_false_nor_false_for_a_switch_that_is_on() -> None:
    assert _complaint("/v1/responses", seed=0) == ("seed", "is not supported here")
    assert _complaint(CHAT, skip_special_tokens=False) == ("skip_special_tokens", "is not supported here")
    assert _complaint(CHAT, best_of=True) == ("best_of", "is not supported here")
    assert _complaint(PLAIN, add_special_tokens=False) == ("add_special_tokens", "is not supported here")
    assert _complaint(CHAT, add_special_tokens=True) == (
        "add_special_tokens",
        "is not supported here; templates write what stands before a text",
    )
    assert _complaint(PLAIN, best_of=0) is None  # the least that OpenAI's reference allows


@pytest.mark.parametrize(
    ("route", "more", "instead"),
    [
        (CHAT, {"options": {"temperature": 1}}, "its fields belong into the request itself"),
        (CHAT, {"n_predict": 5}, "max_tokens bounds an answer"),
        (CHAT, {"repeat_penalty": 1.2}, "it is repetition_penalty"),
        (CHAT, {"think": True}, "reasoning_effort says"),
        ("/v1/responses", {"previous_response_id": "r"}, "send the whole conversation"),
        ("/v1/responses", {"stream_options": {"include_usage": True}}, "a response ends with its usage"),
        ("/api/chat", {"messages": [{**SAY[0], "images": ["x"]}]}, "takes text alone"),
    ],
)
def test_what_is_refused_has_something_in_its_place(route: str, more: dict[str, Any], instead: str) -> None:
    told = _complaint(route, **more)
    assert told is not None
    assert told[1].startswith("is not supported here; ")
    assert instead in told[1]


# What llama.cpp's, vLLM's and OpenAI's own documents give as the value where a request says nothing.
DEFAULTS = {
    **dict.fromkeys(("mirostat", "dynatemp_range", "xtc_probability", "dry_multiplier", "n_probs", "min_p"), 0),
    **dict.fromkeys(("top_n_sigma", "adaptive_target", "t_max_predict_ms", "reasoning_budget_tokens"), -1),
    **dict.fromkeys(("n", "best_of", "n_cmpl", "typical_p", "repeat_penalty", "repetition_penalty"), 1),
    **dict.fromkeys(("echo", "use_beam_search", "ignore_eos", "return_token_ids", "include_stop_str_in_output"), False),
    **dict.fromkeys(("skip_special_tokens", "parse_tool_calls"), True),
    **{"repeat_last_n": -1, "min_tokens": 0, "presence_penalty": 0.0, "frequency_penalty": 0.0, "top_k": -1},
}


@pytest.mark.parametrize("route", [CHAT, PLAIN])
def test_who_writes_other_servers_defaults_out_asks_for_nothing(route: str) -> None:
    for name, value in DEFAULTS.items():
        assert _complaint(route, **{name: value}) is None, name


def test_a_schema_has_no_name_but_the_apis_own() -> None:
    told = _complaint(CHAT, response_format={"type": "json_schema", "made": {}})
    assert told == ("response_format", "json_schema is missing")
    named = {"type": "json_schema", "json_schema": {"name": "n", "made": {}}}
    assert _complaint(CHAT, response_format=named) == ("response_format.json_schema.schema", "is missing")
    text = {"format": {"type": "json_schema", "name": "n", "made": {}}}
    assert _complaint("/v1/responses", text=text) == ("text.format", "schema is missing")


def test_an_assistant_may_have_thought_refused_or_called_without_a_word() -> None:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    for said in ({"reasoning_content": "Hm."}, {"reasoning": "Hm."}, {"refusal": "No."}, {"tool_calls": [call]}):
        assert _complaint(CHAT, messages=[*SAY, {"role": "assistant", **said}]) is None
        for role, more in (("user", said), ("assistant", {})):
            missing = _complaint(CHAT, messages=[*SAY, {"role": role, **more}])
            assert missing == ("messages[1].content", "is missing")


def test_lists_of_fields_do_not_contradict_each_other() -> None:
    assert not IDLE.keys() & REFUSED.keys()


@pytest.mark.parametrize(
    ("route", "more", "param", "told"),
    [
        (CHAT, {"messages": [*SAY, {"role": "wizard"}]}, "messages[1].role", "should be 'system', 'developer', 'user'"),
        (CHAT, {"messages": [{"role": "user"}]}, "messages[0].content", "is missing"),
        (CHAT, {"messages": [{"role": "user", "content": [5]}]}, "messages[0].content[0]", "should be an object"),
        (CHAT, {"messages": [{"role": "assistant", "tool_calls": [{}]}]}, "messages[0].tool_calls[0].function", "is m"),
        (CHAT, {"stop": 5}, "stop", "should be text or a list"),
        (CHAT, {"temperature": -1}, "temperature", "should be at least 0"),
        (CHAT, {"tools": [{"type": "bogus"}]}, "tools[0].type", "should be 'function', 'custom'"),
        (CHAT, {"tools": [{}]}, "tools[0].type", "is missing"),
        (CHAT, {"tool_choice": {"type": "function", "function": {}}}, "tool_choice.function.name", "is missing"),
        (CHAT, {"response_format": {"type": "json_schema"}}, "response_format", "json_schema is missing"),
        (CHAT, {"guided_json": "{"}, "guided_json", "should be an object, or a text that holds one"),
        (CHAT, {"structured_outputs": {"regex": 5}}, "structured_outputs.regex", "should be text"),
        (PLAIN, {"prompt": ["a", 5]}, "prompt[1]", "should be text"),
        (PLAIN, {"prompt": [1, "a"]}, "prompt[1]", "should be a whole number"),
        ("/v1/responses", {"input": [{"type": "fucntion_call"}]}, "input[0].type", "should be 'message'"),
        ("/v1/responses", {"input": [{"type": "function_call", "call_id": "x"}]}, "input[0].name", "is missing"),
        ("/v1/responses", {"tool_choice": {"type": "mcp"}}, "tool_choice.type", "should be 'function'"),
        ("/v1/responses", {"include": ["message.output_text.logprobs"]}, "include[0]", "should be 'reasoning."),
        ("/api/chat", {"options": {"top_p": "x"}}, "options.top_p", "should be a number"),
        ("/api/generate", {"keep_alive": "x"}, "keep_alive", "should match"),
    ],
)
def test_the_field_is_named_as_the_user_wrote_it_and_in_plain_words(
    route: str, more: dict[str, Any], param: str, told: str
) -> None:
    found = _complaint(route, **more)
    assert found is not None
    assert found[0] == param
    assert found[1].startswith(told)
    assert not any(word in found[1] for word in ("Input", "Value error", "valid", "validation", "dictionary"))


@pytest.mark.parametrize("repeat", [{"repeat_penalty": 1.2}, {"presence_penalty": 0.5}, {"frequency_penalty": 0.5}])
def test_a_window_of_penalties_is_refused_only_beside_one(repeat: dict[str, float]) -> None:
    assert _complaint("/api/chat", options={"repeat_last_n": 64}) is None
    assert _complaint("/api/chat", options={"repeat_last_n": -1, **repeat}) is None
    told = _complaint("/api/chat", options={"repeat_last_n": 64, **repeat})
    assert told is not None
    assert told[0] == "options.repeat_last_n"
    assert not Options.model_validate({"repeat_last_n": 0, **repeat}).penalises


@pytest.mark.parametrize("kind", ["image_url", "input_image", "input_audio", "file", "input_file", "video_url"])
def test_media_are_refused_by_place_and_kind(kind: str) -> None:
    part = {"type": kind, kind: {"url": "data:"}}
    text = {"type": "text", "text": "Look:"}
    told = "is (an image|audio|a file|a video), and this model takes text alone"
    found = _complaint(CHAT, messages=[*SAY, {"role": "user", "content": [text, part]}])
    assert found is not None
    assert found[0] == "messages[1].content[1]"
    assert re.fullmatch(told, found[1])
    found = _complaint("/v1/responses", input=[{"role": "user", "content": [part]}])
    assert found is not None
    assert found[0] == "input[0].content[0]"
    result = {"type": "function_call_output", "call_id": "c", "output": [part]}
    found = _complaint("/v1/responses", input=[result])
    assert found is not None
    assert found[0] == "input[0].output[0]"


def test_ollamas_images_are_refused_where_they_are() -> None:
    told = "is not supported here; this model takes text alone"
    assert _complaint("/api/chat", messages=[{**SAY[0], "images": ["aGk="]}]) == ("messages[0].images", told)
    assert _complaint("/api/generate", images=["aGk="]) == ("images", told)
    assert _complaint("/api/chat", messages=[{**SAY[0], "images": []}]) is None


def test_what_is_null_in_ollamas_requests_is_not_there() -> None:
    for kind, nulls in (
        (GenerateAsk, {"stream": None, "prompt": None, "system": None, "raw": None, "options": None, "context": None}),
        (OllamaChatAsk, {"messages": [{"role": "user", "content": None, "tool_calls": None}], "tools": None}),
        (OllamaEmbedAsk, {"input": None, "truncate": None, "dimensions": None}),
    ):
        made: Any = kind.model_validate({"model": "m", **nulls})
        assert (
            made.model_dump()
            == kind.model_validate(
                {"model": "m", **({"messages": [{"role": "user"}]} if kind is OllamaChatAsk else {})}
            ).model_dump()
        )


@pytest.fixture
def client(opened: Callable[..., ktcore.Model]) -> Iterator[Client]:
    with served(opened("dense")) as made:
        yield made


FORMS: list[dict[str, Any]] = [
    {"guided_choice": ["ab", "cd"]},
    {"guided_regex": "ab|cd"},
    {"guided_grammar": 'root ::= "ab" | "cd"'},
    {"regex": "ab|cd"},
    {"grammar": 'root ::= "ab" | "cd"'},
    {"ebnf": 'root ::= "ab" | "cd"'},
    {"structured_outputs": {"choice": ["ab", "cd"]}},
    {"structured_outputs": {"regex": "ab|cd"}},
    {"structured_outputs": {"grammar": 'root ::= "ab" | "cd"'}},
]
ENUM = {"enum": ["ab", "cd"]}
JSON_FORMS: list[dict[str, Any]] = [
    {"guided_json": ENUM},
    {"guided_json": '{"enum": ["ab", "cd"]}'},
    {"json_schema": ENUM},
    {"json_schema": '{"enum": ["ab", "cd"]}'},
    {"structured_outputs": {"json": ENUM}},
    {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": ENUM}}},
    {"response_format": {"type": "json_schema", "schema": ENUM}},
    {"response_format": {"type": "json_object", "schema": ENUM}},
]


def test_forms_of_every_name_bind_chats_and_completions(client: Client) -> None:
    pytest.importorskip("llguidance", reason="needs the extra `server`")
    for route in (CHAT, PLAIN):
        ask = {**LEAST[route], "temperature": 1.0, "seed": 1, "max_tokens": 12}
        for form, answers in [(f, ("ab", "cd")) for f in FORMS] + [(f, ('"ab"', '"cd"')) for f in JSON_FORMS]:
            done = client("POST", route, json={**ask, **form})
            assert done.status_code == 200, (form, done.text)
            choice = done.json()["choices"][0]
            assert (choice["text"] if route == PLAIN else choice["message"]["content"]) in answers, form
    both = client("POST", PLAIN, json={**LEAST[PLAIN], "regex": "a", "structured_outputs": {"json_object": True}})
    assert (both.status_code, both.json()["error"]["param"]) == (400, "regex")
    wrong = client("POST", PLAIN, json={**LEAST[PLAIN], "structured_outputs": {"regex": "(a"}})
    assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "structured_outputs.regex")


TYPES = ["application/json", "application/json; charset=utf-8", "application/x-www-form-urlencoded", "text/plain", None]


@pytest.mark.parametrize("kind", TYPES)
def test_json_is_taken_whatever_it_claims_to_be(client: Client, kind: str | None) -> None:
    headers = {} if kind is None else {"Content-Type": kind}
    for route, least in LEAST.items():
        done = client("POST", route, content=json.dumps({**least, "stream": False}).encode(), headers=headers)
        assert done.status_code == 200, (route, done.text)


@pytest.mark.parametrize(
    ("body", "told"),
    [
        (b"", "the body is empty"),
        (b" \n", "the body is empty"),
        (b"[1]", "the body is a list, and not an object"),
        (b'"x"', "the body is a text, and not an object"),
        (b"null", "the body is null, and not an object"),
        (b"model=tiny&prompt=x", "the body is no JSON: Expecting value in line 1, column 1"),
        (b'{"model": "tiny",\n "prompt": }', "the body is no JSON: Expecting value in line 2, column 12"),
        (b'{"model": "\xff"}', "the body is no JSON: it is not written in UTF-8"),
        (b'{"temperature": NaN}', "the body is no JSON: NaN is no number there"),
        (b"[" * 15_000, "the body is nested too deeply"),
    ],
)
def test_what_is_no_request_is_told_so_on_every_route(client: Client, body: bytes, told: str) -> None:
    for route in BODIES:
        done = client("POST", route, content=body)
        assert done.status_code == 400, route
        error = done.json()["error"]
        message = error if route.startswith("/api/") else error["message"]
        assert message.startswith(told), (route, message)
        assert ("Content-Type: application/json" in message) == ("nested" not in told)


def test_compressed_bodies_are_refused(client: Client) -> None:
    done = client("POST", CHAT, json=LEAST[CHAT], headers={"Content-Encoding": "gzip"})
    assert (done.status_code, "compressed (gzip)" in done.text) == (400, True)


def test_every_route_that_takes_a_body_is_described(client: Client) -> None:
    paths = client("GET", "/openapi.json").json()["paths"]
    assert {path for path, does in paths.items() if "post" in does} == set(BODIES)
