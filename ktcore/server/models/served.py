"""A loaded model, as routes see it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

from fastapi import Request as HttpRequest

from ktcore.dialects.dialect import Reader
from ktcore.engine.model import Model
from ktcore.engine.output import Output
from ktcore.engine.service import Request, Service
from ktcore.server.http.metrics import Metrics
from ktcore.server.http.settings import Settings
from ktcore.server.models.answers import Answers


@dataclass(frozen=True)
class Served:
    """What routes need: the running service, what the operator has set, and the counts."""

    service: Service
    settings: Settings
    metrics: Metrics

    @property
    def model(self) -> Model:
        """The model itself."""
        return self.service.model

    def answers(
        self, requests: list[Request], http: HttpRequest, readers: Sequence[Reader | None] | None = None
    ) -> Answers:
        """Begin to answer.

        Args:
            readers: what takes each answer's text apart; without, text is content.

        Raises:
            KtcoreError: what `Service.submit` refuses.
        """
        user = caller(http)
        lookup = self.settings.prompt_lookup
        named = [replace(r, user=f"{user} {r.user}", output=_guessing(r.output, lookup)) for r in requests]
        return Answers(self.service, named, http, self.metrics, readers or [None] * len(requests))


def caller(http: HttpRequest) -> str:
    """Who asks, for fairness: a digest of the key, or the address where no keys are needed."""
    key = http.headers.get("authorization")
    if key is not None:
        return hashlib.blake2b(key.encode(), digest_size=8).hexdigest()
    return http.client.host if http.client is not None else ""


def _guessing(output: Output, lookup: int) -> Output:
    """With the operator's prompt lookup where the request says nothing of it."""
    return output if output.prompt_lookup is not None else replace(output, prompt_lookup=lookup)
