"""Requests know the fields of other servers: those that they do not serve are refused by name, or change no answer.

A field that neither a request nor a list here knows is ignored, as OpenAI's and Ollama's clients expect of servers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from pydantic import BaseModel, model_validator
from pydantic_core import PydanticCustomError

from ktcore.server.api.complaints import FIELD

_EMPTY: tuple[Any, ...] = (None, False, "", [], {})


@dataclass(frozen=True)
class Refused:
    """A field that would change the answer.

    Attributes:
        nothing: values that ask for nothing.
        instead: what to do.
    """

    nothing: tuple[Any, ...] = _EMPTY
    instead: str = ""


Refusals = Mapping[str, Refused]


class Body(BaseModel):
    """A request, or an object in one.

    Attributes:
        idle: known fields that change no answer, and what they are about.
        refused: known fields that would change it, of which a request may serve some itself.
    """

    idle: ClassVar[Mapping[str, str]] = {}
    refused: ClassVar[Refusals] = {}

    @classmethod
    def served(cls) -> frozenset[str]:
        """The fields that are served, as requests spell them."""
        return frozenset(field.alias or name for name, field in cls.model_fields.items())

    @model_validator(mode="before")
    @classmethod
    def _nothing_is_overlooked(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        for name in sorted(cls.refused.keys() & given.keys() - cls.served()):
            rule, value = cls.refused[name], given[name]
            if not any(value == each and isinstance(value, bool) == isinstance(each, bool) for each in rule.nothing):
                told = "is not supported here" + (f"; {rule.instead}" if rule.instead else "")
                raise PydanticCustomError("refused", "{told}", {FIELD: name, "told": told})
        return given


def _about(groups: Mapping[str, str]) -> dict[str, str]:
    return {name: what for what, names in groups.items() for name in names.split()}


def _all(names: str, *nothing: Any, instead: str = "") -> dict[str, Refused]:
    return dict.fromkeys(names.split(), Refused((*_EMPTY, *nothing), instead))


def _on(names: str) -> dict[str, Refused]:
    """What is so anyway, and cannot be turned off."""
    return dict.fromkeys(names.split(), Refused((None, True)))


IDLE: Mapping[str, str] = _about(
    {
        "the caller's bookkeeping": "metadata safety_identifier request_id rid session_id extra_key custom_labels user",
        "how a service bills, stores and routes": "service_tier store access_programs priority routed_dp_rank "
        "data_parallel_rank disagg_prefill_dp_rank background_options",
        "how prompts are cached, which changes no answer": "prompt_cache_key prompt_cache_retention "
        "prompt_cache_options cache_prompt id_slot n_cache_reuse",
        "how soon an answer comes, not which": "prediction stream_interval backend_sampling guided_decoding_backend",
        "how long a model stays loaded: the operator's choice": "keep_alive",
        "tools that OpenAI's servers run": "max_tool_calls",
        "settings of what is refused itself": "mirostat_tau mirostat_eta min_keep dynatemp_exponent xtc_threshold "
        "dry_base dry_allowed_length dry_penalty_last_n dry_sequence_breakers adaptive_decay length_penalty "
        "early_stopping truncation_side image mm_processor_kwargs media_io_kwargs images_config preserved_tokens "
        "routed_experts_start_len routed_experts_prompt_start return_mm_kwargs",
        "what a full context drops: here nothing is dropped": "n_keep n_discard",
        "spaces between special tokens, which are not told": "spaces_between_special_tokens",
    }
)
"""Fields of the OpenAI API, vLLM, SGLang and llama.cpp's server that change no answer, and what they are about."""

_LENGTH = "max_tokens bounds an answer, in responses max_output_tokens"
REFUSED: Refusals = (
    # the answer and the prompt
    _all("echo suffix best_of", 0, 1)
    | _all("no_stop_trim include_stop_str_in_output use_beam_search continue_final_message stop_regex")
    | _all("system documents chat_template input_ids input_embeds prompt_embeds cache_salt truncate_prompt_tokens")
    | _all("add_special_tokens", instead="templates write what stands before a text")
    | _on("skip_special_tokens add_generation_prompt include_reasoning parse_tool_calls normalize stream_reasoning")
    | _all("reasoning_format chat_format chat_parser")
    | _all("modalities", ["text"])
    | _all("audio moderation web_search_options context_management repetition_detection")
    | _all("function_call", "none", "auto", instead="tool_choice names a tool")
    | _all("functions", instead="offer them as tools")
    # more than the answer
    | _all("return_token_ids return_tokens_as_token_ids return_hidden_states return_routed_experts return_tokens")
    | _all("return_progress timings_per_token post_sampling_probs return_prompt_text return_cached_tokens_details")
    | _all("return_token_offsets response_fields logprob_token_ids")
    | _all("prompt_logprobs n_probs", 0)
    # how tokens are drawn
    | _all("bad_words allowed_token_ids logits_processors custom_logit_processor custom_params samplers watermarking")
    | _all("min_tokens n_indent mirostat dynatemp_range xtc_probability dry_multiplier", 0)
    | _all("top_n_sigma adaptive_target t_max_predict_ms reasoning_budget_tokens", -1)
    | _all("thinking_token_budget")
    # forms that no answer can be bound to
    | _all("structural_tag guided_whitespace_pattern grammar_lazy grammar_triggers thinking_forced_open")
    # other weights, other machines
    | _all("lora lora_path vllm_xargs session_params ngram_corpus_id kv_transfer_params ec_transfer_params")
    | _all("bootstrap_host bootstrap_port bootstrap_room")
    # the same under other names
    | _all("n_predict max_new_tokens max_tokens max_completion_tokens max_output_tokens", instead=_LENGTH)
    | _all("repeat_penalty", 1, instead="it is repetition_penalty")
    | _all("repeat_last_n", -1, instead="penalties are over the whole text")
    | _all("n_cmpl", 1, instead="it is n")
    | _all("format", instead="it is response_format")
    | _all("think enable_thinking thinking", instead="reasoning_effort says how much is thought")
    | _all("options", instead="its fields belong into the request itself")
    # what other routes serve
    | _all("ebnf regex grammar json_schema guided_json guided_regex guided_choice guided_grammar structured_outputs")
    | _all("response_format", {"type": "text"})
    | _all("messages prompt input instructions tools chat_template_kwargs reasoning text logit_bias stream_options")
    | _all("tool_choice", "none", "auto")
    | _all("parallel_tool_calls separate_reasoning", True)
    | _all("reasoning_effort verbosity timeout seed stop stop_token_ids ignore_eos dimensions encoding_format pooling")
    | _all("presence_penalty frequency_penalty min_p prompt_lookup draft logprobs top_logprobs", 0)
    | _all("n typical_p repetition_penalty", 1)
    | _all("top_k", 0, -1)
    | _all("temperature top_p stream")
)
"""Fields of the same servers that would change an answer; a route refuses those that it does not serve."""

OLLAMA_IDLE: Mapping[str, str] = _about(
    {
        "whether long prompts are cut: they are refused": "truncate shift",
        "how images are made, which they are not": "width height steps",
    }
)
OLLAMA_REFUSED: Refusals = _all("suffix template context images _debug_render_only")

OPTIONS_IDLE: Mapping[str, str] = _about(
    {
        "how the model is loaded and computed: the operator's choice": "num_ctx num_batch num_gpu main_gpu low_vram "
        "f16_kv logits_all use_mmap use_mlock numa num_thread vocab_only embedding_only",
        "settings of what is refused itself": "mirostat_tau mirostat_eta",
        "what a full context drops: here nothing is dropped": "num_keep",
    }
)
OPTIONS_REFUSED: Refusals = _all("mirostat", 0) | _all("tfs_z", 1) | _on("penalize_newline")
"""Options of Ollama's that would change an answer."""
