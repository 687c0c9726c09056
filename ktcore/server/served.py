"""The one model that a server has, as routes see it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone

from fastapi import Request as HttpRequest

from ktcore.engine.model import Model
from ktcore.engine.service import Request, Service
from ktcore.server.answers import Answers
from ktcore.server.dialect import Reader
from ktcore.server.errors import UnknownModelError
from ktcore.server.metrics import Metrics
from ktcore.server.settings import Settings


@dataclass(frozen=True)
class Served:
    """What routes need: the running service, what the operator has set, and the counts."""

    service: Service
    settings: Settings
    metrics: Metrics
    since: datetime = field(default_factory=lambda: datetime.now(timezone.utc))

    @property
    def model(self) -> Model:
        """The model itself."""
        return self.service.model

    def check_model(self, name: str) -> None:
        """Refuse another model's name.

        Raises:
            UnknownModelError: it is not served.
        """
        if name != self.settings.name:
            raise UnknownModelError(
                f"there is no model {name!r} here", f"this server has {self.settings.name!r}; /v1/models lists it"
            )

    def answers(
        self, requests: list[Request], http: HttpRequest, readers: Sequence[Reader | None] | None = None
    ) -> Answers:
        """Begin to answer.

        Args:
            readers: what takes each answer's text apart; without, text is content.

        Raises:
            KtcoreError: what `Service.submit` refuses.
        """
        return Answers(self.service, requests, http, self.metrics, readers or [None] * len(requests))
