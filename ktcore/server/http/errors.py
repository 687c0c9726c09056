"""Errors as HTTP answers: a status for every kind, in the shape that the API asked for knows."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import Response

from ktcore.engine.service import ClosingError, DeadlineError, QueueFullError
from ktcore.errors import ContextError, FieldError, KtcoreError, LogitsError, RequestError, TokenizerError

log = logging.getLogger(__name__)


class UnknownModelError(RequestError):
    """A request names a model that is not served here."""


class NoRoomError(RequestError):
    """A model cannot be loaded now, because others that answer take the memory."""


@dataclass(frozen=True)
class Problem:
    """An error as clients see it, in OpenAI's terms.

    Attributes:
        again: whether the same request may fare better when it is asked again at once.
    """

    status: int
    message: str
    kind: str = "invalid_request_error"
    code: str | None = None
    param: str | None = None
    again: bool = True

    @property
    def openai(self) -> dict[str, Any]:
        """The error object that OpenAI's clients know."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}

    def response(self, path: str) -> Response:
        """The whole answer to a request for `path`."""
        headers = {"Retry-After": "1"} if self.status in (429, 503) else {}
        if not self.again:
            # OpenAI's clients would ask twice more for what has been computed in vain already
            headers["x-should-retry"] = "false"
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        body = {"error": self.message} if path.startswith("/api/") else self.openai
        return json_response(body, self.status, headers)


_KINDS: tuple[tuple[type[KtcoreError], int, str, str | None], ...] = (
    (UnknownModelError, 404, "invalid_request_error", "model_not_found"),
    (QueueFullError, 429, "rate_limit_error", "queue_full"),
    (NoRoomError, 503, "server_error", "no_room"),
    (DeadlineError, 504, "timeout_error", "deadline"),
    (LogitsError, 500, "server_error", "not_numbers"),
    (ContextError, 400, "invalid_request_error", "context_length_exceeded"),
    (ClosingError, 503, "server_error", "closing"),
    (RequestError, 400, "invalid_request_error", None),
    (TokenizerError, 400, "invalid_request_error", None),
)


def problem_of(error: Exception) -> Problem:
    """How an error is told; what is not the caller's doing is told without details, which go to the log."""
    for kind, status, name, code in _KINDS:
        if isinstance(error, kind):
            assert isinstance(error, KtcoreError)
            param = error.param if isinstance(error, FieldError) else None
            again = not isinstance(error, DeadlineError | LogitsError)
            told = error.message + (f" ({error.hint})" if error.hint else "")
            return Problem(status, told, name, code, param, again)
    log.error("a request failed", exc_info=error)
    return Problem(500, "the server failed to answer this; its log says why", "server_error")


def json_response(body: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """JSON in ASCII: text may hold what UTF-8 cannot, such as half of a surrogate pair."""
    return Response(dumps(body), status, headers, media_type="application/json")


def dumps(body: Any) -> str:
    """JSON as RFC 8259 has it.

    Raises:
        ValueError: it holds NaN or an infinity, which JSON does not know.
    """
    return json.dumps(body, allow_nan=False)


def add_handlers(app: FastAPI) -> None:
    """Let `app` answer errors of every kind as `Problem` tells them."""

    def known(request: Request, error: Exception) -> Response:
        return problem_of(error).response(request.url.path)

    def http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return Problem(error.status_code, str(error.detail)).response(request.url.path)

    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(KtcoreError, known)
    app.add_exception_handler(Exception, known)
