"""Requests made up from the OpenAPI description: whatever a client sends, no answer blames the server."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="needs the extra `server`")
schemathesis = pytest.importorskip("schemathesis", reason="makes up the requests")

from hypothesis import HealthCheck, given, settings  # noqa: E402

import ktcore  # noqa: E402
from ktcore.engine.service import Service  # noqa: E402
from ktcore.server.http.app import build_app  # noqa: E402
from ktcore.server.http.settings import Keys, Settings  # noqa: E402

EXAMPLES = 20
KEY = {"Authorization": "Bearer right"}
# A few tokens say as much as many, and a bound of the client's own is answered with 504.
LENGTHS = ("max_tokens", "max_completion_tokens", "max_output_tokens")


@pytest.fixture(scope="module")
def described(folders: dict[str, Path]) -> Iterator[Any]:
    with (
        ktcore.load(folders["thinks"], backend="cpu", rules="reference", context=192) as model,
        Service(model) as service,
    ):
        app = build_app(service, Settings("tiny", Keys(("right",)), default_tokens=3))
        yield schemathesis.openapi.from_asgi("/openapi.json", app, headers=KEY)


def test_no_request_makes_the_server_fail(described: Any) -> None:
    """Its own pytest integration does not know the newest pytest, so operations are walked through here."""
    seen: Counter[int] = Counter()
    paths = []
    for operation in (result.ok() for result in described.get_all_operations()):
        paths.append(operation.path)

        @settings(max_examples=EXAMPLES, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
        @given(case=operation.as_strategy())
        def try_out(case: Any) -> None:
            done = _shortened(case).call(headers=KEY)
            seen[done.status_code] += 1
            assert done.status_code < 500, (case.path, case.body, done.text)

        try_out()
    assert {"/v1/chat/completions", "/v1/responses", "/api/chat", "/v1/embeddings", "/tokenize"} <= set(paths)
    # both what is refused and what is answered was tried
    assert seen[400] > 20, seen
    assert seen[200] > 20, seen


def _shortened(case: Any) -> Any:
    body = case.body
    if isinstance(body, dict):
        # a model that is not there would end most requests too early to learn anything
        body |= {"model": "tiny"} if "model" in body else {}
        for name in LENGTHS:
            if isinstance(body.get(name), int):
                body[name] = min(body[name], 3)
        body.pop("timeout", None)
        if isinstance(body.get("options"), dict):
            body["options"].pop("num_predict", None)
    return case
