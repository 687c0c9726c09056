"""Logprobs as clients know them: OpenAI's two shapes, of chats and of completions, and Ollama's."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import Any

from ktcore.engine.schedule.sequence import Chosen
from ktcore.text.tokenizer import Tokenizer

# JSON knows no infinity; so low that no client takes it for a chance.
_LOWEST = -9999.0


def chat_logprobs(tokenizer: Tokenizer, chosen: Seq[Chosen]) -> dict[str, Any]:
    """The object of a chat's choice."""
    return {"content": [_entry(tokenizer, one) for one in chosen], "refusal": None}


def ollama_logprobs(tokenizer: Tokenizer, chosen: Seq[Chosen]) -> dict[str, Any]:
    """The field of an Ollama answer; nothing where nothing was asked for."""
    return {"logprobs": [_entry(tokenizer, one) for one in chosen]} if chosen else {}


def plain_logprobs(tokenizer: Tokenizer, chosen: Seq[Chosen]) -> dict[str, Any]:
    """The object of a completion's choice."""
    return {
        "tokens": [_spelled(tokenizer, one.token) for one in chosen],
        "token_logprobs": [_finite(one.logprob) for one in chosen],
        "top_logprobs": [
            {_spelled(tokenizer, token): _finite(logprob) for token, logprob in (*one.top, (one.token, one.logprob))}
            for one in chosen
        ],
        "text_offset": [one.offset for one in chosen],
    }


def _entry(tokenizer: Tokenizer, one: Chosen) -> dict[str, Any]:
    top = [_token(tokenizer, token, logprob) for token, logprob in one.top]
    return {**_token(tokenizer, one.token, one.logprob), "top_logprobs": top}


def _token(tokenizer: Tokenizer, token: int, logprob: float) -> dict[str, Any]:
    data = tokenizer.token_bytes(token)
    return {"token": data.decode(errors="replace"), "logprob": _finite(logprob), "bytes": list(data)}


def _spelled(tokenizer: Tokenizer, token: int) -> str:
    """As OpenAI's completions spell what is no whole character, so that different tokens stay different keys."""
    data = tokenizer.token_bytes(token)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def _finite(logprob: float) -> float:
    return max(logprob, _LOWEST)
