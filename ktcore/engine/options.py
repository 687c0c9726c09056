"""The options of a generation as Python callers name them, transformers' habits included; none is ever ignored."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from numbers import Real
from typing import Any

from ktcore.engine.draft.asked import MOST
from ktcore.engine.output import PLAIN, Output
from ktcore.errors import RequestError
from ktcore.ops.sampling import SamplingParams

NEW_TOKENS = 64
"""Most new tokens where nobody says."""
LOOKUP = 64
"""Most next tokens that may be guessed."""

_INTEGERS = ("top_k", "seed")
# What transformers takes None for: the step is left out.
_OFF = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "typical_p": 1.0, "repetition_penalty": 1.0}
_SAMPLING = tuple(field.name for field in fields(SamplingParams))
_KNOWN = ("max_new_tokens", *_SAMPLING, "stop", "prompt_lookup", "draft")
_TRANSFORMERS = ("do_sample", "max_length", "eos_token_id", "pad_token_id", "prompt_lookup_num_tokens")
# Names of transformers that change nothing with these values, and what to do for the others.
_NEUTRAL: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "num_beams": ((1,), "there is no beam search: drop it"),
    "num_beam_groups": ((1,), "there is no beam search: drop it"),
    "diversity_penalty": ((0.0,), "there is no beam search: drop it"),
    "length_penalty": ((1.0,), "there is no beam search: drop it"),
    "early_stopping": ((False,), "there is no beam search: drop it"),
    "num_return_sequences": ((1,), "give the prompt as often as answers are wanted: [prompt] * 4"),
    "min_length": ((0,), "an answer cannot be made longer: drop it"),
    "min_new_tokens": ((0, None), "an answer cannot be made longer: drop it"),
    "no_repeat_ngram_size": ((0,), "use repetition_penalty, presence_penalty or frequency_penalty"),
    "encoder_repetition_penalty": ((1.0,), "use repetition_penalty"),
    "epsilon_cutoff": ((0.0,), "use min_p"),
    "eta_cutoff": ((0.0,), "use typical_p"),
    "penalty_alpha": ((None,), "there is no contrastive search: drop it"),
    "bad_words_ids": ((None,), "use logit_bias: {id: -100}"),
    "suppress_tokens": ((None,), "use logit_bias: {id: -100}"),
    "sequence_bias": ((None,), "use logit_bias, which is for single tokens"),
    "logits_processor": ((None,), "use logit_bias, or logits() and a loop of your own"),
    "stopping_criteria": ((None,), "use stop, or stream() and leave the loop"),
    "prefix_allowed_tokens_fn": ((None,), "use model.structures"),
    "generation_config": ((None,), "give its values as options"),
    "streamer": ((None,), "use stream(), an iterator of text pieces"),
    "assistant_model": ((None,), "load the model with draft=, or use prompt_lookup, which needs no second model"),
    "use_cache": ((True, None), "the KV cache cannot be left out: drop it"),
    "return_dict_in_generate": ((False, None), "logits() gives scores; generate() gives ids or text alone"),
    "output_scores": ((False, None), "use logits()"),
    "output_logits": ((False, None), "use logits()"),
    "output_attentions": ((False, None), "they are not kept: drop it"),
    "output_hidden_states": ((False, None), "they are not kept: drop it"),
    "remove_invalid_values": ((False, None), "logits that are no numbers are an error: drop it"),
    "synced_gpus": ((False, None), "drop it"),
}
# Names of other libraries, and those here.
_ELSEWHERE = {
    **dict.fromkeys(("max_tokens", "max_completion_tokens", "max_output_tokens"), "max_new_tokens"),
    **dict.fromkeys(("n_predict", "num_predict"), "max_new_tokens"),
    **dict.fromkeys(("stop_strings", "stop_sequences", "stop_words"), "stop"),
    **dict.fromkeys(("repeat_penalty", "repetition_penality"), "repetition_penalty"),
    **dict.fromkeys(("random_seed", "generator"), "seed"),
    "inputs": "the prompt as the first argument, or input_ids",
    "temp": "temperature",
    "typical": "typical_p",
    "max_time": "stream() and leave the loop",
    "n": "the prompt as often as answers are wanted: [prompt] * n",
}


@dataclass(frozen=True)
class Options:
    """What was asked for, checked.

    Attributes:
        max_length: most tokens of prompt, as it was given, and answer together; None leaves it to `max_new_tokens`.
        pad: what fills rows of ids that ended early; None repeats their last id.
    """

    max_new_tokens: int
    params: SamplingParams
    stop: tuple[str, ...] = ()
    output: Output = PLAIN
    max_length: int | None = None
    pad: int | None = None

    def room(self, given: int) -> int:
        """Most new tokens behind a prompt of so many tokens, padding included.

        Raises:
            RequestError: `max_length` leaves none.
        """
        if self.max_length is None:
            return self.max_new_tokens
        if self.max_length <= given:
            raise RequestError(
                f"max_length={self.max_length} leaves no room for an answer: the prompt has {given} tokens",
                "use max_new_tokens, which counts the answer alone",
            )
        return self.max_length - given


def read_options(
    given: Mapping[str, Any],
    max_new_tokens: int | None,
    vocab: int,
    default: int = NEW_TOKENS,
    counts_prompt: bool = True,
) -> Options:
    """Check options and bring them into one form.

    Args:
        max_new_tokens: None takes `default`, or what `max_length` leaves.
        vocab: number of token ids.
        counts_prompt: `max_length` may be given, which counts the prompt's tokens too.

    Raises:
        RequestError: an option is unknown, of another type, out of range, contradicts another, or is one of
            transformers' that has no equivalent; says what to use.
    """
    rest = dict(given)
    for name in [name for name in rest if name in _NEUTRAL]:
        _refuse_all_but_neutral(name, rest.pop(name))
    unknown = sorted(set(rest) - set(_KNOWN) - set(_TRANSFORMERS))
    if unknown:
        raise _unknown(unknown)
    max_length = _integer("max_length", rest.pop("max_length", None), 1)
    if max_length is not None and max_new_tokens is not None:
        raise RequestError("max_length and max_new_tokens are given both", "give max_new_tokens alone")
    most = default if max_new_tokens is None else _integer("max_new_tokens", max_new_tokens, 0)
    assert most is not None
    if max_length is not None and not counts_prompt:
        raise RequestError(
            "max_length cannot be given for a chat, whose prompt the template makes", "use max_new_tokens"
        )
    pad = _token("pad_token_id", rest.pop("pad_token_id", None), vocab)
    output = _output(rest, vocab)
    stop = _stop(rest.pop("stop", None))
    return Options(most, _params(rest, vocab), stop, output, max_length, pad)


def _refuse_all_but_neutral(name: str, value: Any) -> None:
    neutral, advice = _NEUTRAL[name]
    if not any(value is item or (item is not None and type(value) is not str and value == item) for item in neutral):
        raise RequestError(f"{name}={value!r} cannot be taken", advice)


def _unknown(names: list[str]) -> RequestError:
    said = []
    for name in names:
        near = get_close_matches(name, [*_KNOWN, *_TRANSFORMERS], 1, 0.6)
        meant = _ELSEWHERE.get(name) or (near[0] if near else "")
        said.append(f"{name} (use {meant})" if meant else name)
    return RequestError(
        f"unknown option{'s' * (len(names) > 1)} {', '.join(said)}",
        f"known: {', '.join(sorted(_KNOWN))}; of transformers' also {', '.join(_TRANSFORMERS)}",
    )


def _output(rest: dict[str, Any], vocab: int) -> Output:
    guesses = [(n, rest.pop(n)) for n in ("prompt_lookup", "prompt_lookup_num_tokens") if n in rest]
    if len(guesses) > 1:
        raise RequestError("prompt_lookup and prompt_lookup_num_tokens are the same", "give one of them")
    name, value = guesses[0] if guesses else ("prompt_lookup", 0)
    count = _integer(name, value, 0, LOOKUP) or 0
    output = replace(PLAIN, prompt_lookup=count, draft=_integer("draft", rest.pop("draft", None), 0, MOST))
    if "eos_token_id" not in rest:
        return output
    ends = rest.pop("eos_token_id")
    # as in transformers, None is nothing that ends an answer
    listed = [] if ends is None else ends if isinstance(ends, (list, tuple, set, frozenset)) else [ends]
    return replace(output, stop_ids=frozenset(_required("eos_token_id", i, vocab) for i in listed), ignore_eos=True)


def _stop(given: Any) -> tuple[str, ...]:
    stops = () if given is None else (given,) if isinstance(given, str) else given
    if not isinstance(stops, (list, tuple)) or not all(isinstance(s, str) for s in stops):
        raise RequestError(f"stop must be a string or a list of strings, not {stops!r}")
    if "" in stops:
        raise RequestError("stop holds an empty string, which every text holds", "leave it out")
    return tuple(stops)


def _params(rest: dict[str, Any], vocab: int) -> SamplingParams:
    sampled = rest.pop("do_sample", None)
    if sampled is not None and not isinstance(sampled, bool):
        raise RequestError(f"do_sample must be True or False, not {sampled!r}")
    values: dict[str, Any] = {}
    for name, value in rest.items():
        if value is None and name in _OFF:
            values[name] = _OFF[name]
        elif value is None and (name == "seed" or (name == "temperature" and sampled is False)):
            continue
        elif name == "logit_bias":
            values[name] = _bias(value, vocab)
        else:
            values[name] = _required(name, value) if name in _INTEGERS else _number(name, value)
    if sampled is False:
        if values.get("temperature"):
            raise RequestError(
                f"do_sample=False is greedy, and temperature={values['temperature']} is not", "drop one of the two"
            )
        values["temperature"] = 0.0
    elif sampled and values.get("temperature") == 0:
        raise RequestError("do_sample=True draws, and temperature=0 is greedy", "drop one of the two")
    return SamplingParams(**values)


def _bias(value: Any, vocab: int) -> dict[int, float]:
    if value is None or not isinstance(value, Mapping):
        raise RequestError(f"logit_bias must be a mapping of token ids to numbers, not {value!r}")
    return {_required("logit_bias", i, vocab): _number("logit_bias", bias) for i, bias in value.items()}


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise RequestError(f"{name} must be a number, not {value!r}")
    return float(value)


def _integer(name: str, value: Any, least: int, most: float = math.inf) -> int | None:
    if value is None:
        return None
    number = _required(name, value)
    if not least <= number <= most:
        end = f" and at most {most}" if most < math.inf else ""
        raise RequestError(f"{name}={number} must be at least {least}{end}")
    return number


def _token(name: str, value: Any, vocab: int) -> int | None:
    return None if value is None else _required(name, value, vocab)


def _required(name: str, value: Any, vocab: int | None = None) -> int:
    """An integer, and where `vocab` is given a token id."""
    if isinstance(value, bool):
        raise RequestError(f"{name} must be an integer, not {value!r}")
    try:
        number = operator.index(value)
    except TypeError:
        raise RequestError(f"{name} must be an integer, not {value!r}") from None
    if vocab is not None and not 0 <= number < vocab:
        raise RequestError(f"{name}: token id {number} is outside of the vocabulary of {vocab}")
    return number
