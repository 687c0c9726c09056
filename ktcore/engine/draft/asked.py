"""What a caller asks for as a drafter, in words: "mtp:2", or a model's path."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ktcore.errors import RequestError

MTP = "mtp"
MOST = 16
"""Most tokens that are drafted at once."""
FURTHER_TOKENS = 1
PAIR_TOKENS = 4
"""Tokens drafted at once where nobody says."""
_FORM = f'give "{MTP}:2", "{MTP}", the path of a model, or that with ":4" behind it'


@dataclass(frozen=True)
class Draft:
    """Attributes:
    most: tokens drafted at once.
    path: the model that drafts; None: the model itself does, by its layer for further tokens.
    """

    most: int
    path: Path | None = None


def read_draft(given: Any) -> Draft | None:
    """The drafter that a word or path names; None for None.

    Raises:
        RequestError: it is of another type, or the count is out of range.
    """
    if given is None:
        return None
    if not isinstance(given, (str, os.PathLike)) or isinstance(given, bytes) or not str(given):
        raise RequestError(f"draft cannot be {given!r} ({type(given).__name__})", _FORM)
    name, _, count = str(given).rpartition(":")
    if not name or not count.lstrip("-").isdigit():
        name, count = str(given), ""
    if name == MTP:
        return Draft(_count(given, count or str(FURTHER_TOKENS)))
    return Draft(_count(given, count or str(PAIR_TOKENS)), Path(name))


def _count(given: Any, count: str) -> int:
    most = int(count)
    if not 1 <= most <= MOST:
        raise RequestError(f"draft={str(given)!r}: from 1 to {MOST} tokens can be drafted, not {most}", _FORM)
    return most
