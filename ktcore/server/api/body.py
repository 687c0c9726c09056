"""Reads a request's body: JSON, whatever type it claims to have; what is wrong with it is told in the user's words."""

from __future__ import annotations

import json
from typing import Any, NoReturn, TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError

from ktcore.errors import FieldError, RequestError
from ktcore.server.api.complaints import complaint

Ask = TypeVar("Ask", bound=BaseModel)
_KINDS = {list: "a list", str: "a text", bool: "true or false", int: "a number", float: "a number", type(None): "null"}
_HINT = "send a JSON object, with the header Content-Type: application/json"


async def read(http: Request, kind: type[Ask]) -> Ask:
    """The body as a request of this kind.

    `curl -d` claims that it sends a form, and others claim nothing: llama-server and Ollama take JSON all the same. A
    page of another site cannot make use of that, its origin being refused by the gate.

    Raises:
        RequestError: it is empty, compressed, no JSON or no object.
        FieldError: a field is not as it should be.
    """
    packed = http.headers.get("content-encoding", "identity")
    if packed.strip().lower() != "identity":
        raise RequestError(f"the body is compressed ({packed}), which is not supported", "send it as it is")
    given = _object(await http.body())
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        param, told = complaint(error.errors(include_url=False), given)
        raise (FieldError(param, told) if param else RequestError(told)) from error


def _object(body: bytes) -> dict[str, Any]:
    if not body.strip():
        raise RequestError("the body is empty", _HINT)
    try:
        given = json.loads(body, parse_constant=_no_json)
    except RecursionError as error:
        raise RequestError("the body is nested too deeply") from error
    except json.JSONDecodeError as error:
        told = f"the body is no JSON: {error.msg} in line {error.lineno}, column {error.colno}"
        raise RequestError(told, _HINT) from error
    except UnicodeDecodeError as error:
        raise RequestError("the body is no JSON: it is not written in UTF-8", _HINT) from error
    except ValueError as error:
        raise RequestError(f"the body is no JSON: {error}", _HINT) from error
    if not isinstance(given, dict):
        raise RequestError(f"the body is {_KINDS[type(given)]}, and not an object", _HINT)
    return given


def _no_json(spelling: str) -> NoReturn:
    raise ValueError(f"{spelling} is no number there")
