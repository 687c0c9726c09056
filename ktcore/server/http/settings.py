"""What an operator decides about a server, and the keys that open it."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
from dataclasses import dataclass, field
from pathlib import Path

from ktcore.errors import RequestError

MAX_BODY = 4 * 2**20


class Keys:
    """API keys, kept as digests; with none, everybody may ask.

    Args:
        keys: each as clients send it.
    """

    def __init__(self, keys: tuple[str, ...] = ()) -> None:
        self._digests = tuple(_digest(key.encode()) for key in keys)

    def __bool__(self) -> bool:
        return bool(self._digests)

    def admit(self, given: bytes) -> bool:
        """Whether `given` is one of the keys; the time it takes tells nothing about how far it is right."""
        digest = _digest(given)
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        return any(matches)


def read_keys(path: Path) -> Keys:
    """Keys from a file, one a line; empty lines and lines that begin with # count for nothing.

    Raises:
        RequestError: the file cannot be read, holds no key, or one that no header can carry.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"{path} cannot be read: {error}") from error
    keys = tuple(line.strip() for line in lines if line.strip() and not line.strip().startswith("#"))
    if not keys:
        raise RequestError(f"{path} holds no API key", "write one key a line")
    if not all(key.isascii() and key.isprintable() and " " not in key for key in keys):
        raise RequestError(f"{path}: a key is printable ASCII without spaces", "write one key a line")
    return Keys(keys)


@dataclass(frozen=True)
class Settings:
    """Attributes:
    name: what clients call the model.
    max_body: bytes of a request's body.
    default_tokens: longest answer where a request names none.
    timeout_s: most seconds an answer may take; None sets no bound, and requests may set their own below it.
    prompt_lookup: most next tokens to guess where a request says nothing of it.
    origins: other sites ("https://chat.example") whose pages may ask from a browser (CORS).
    """

    name: str
    keys: Keys = field(default_factory=Keys)
    max_body: int = MAX_BODY
    default_tokens: int = 1024
    timeout_s: float | None = None
    origins: tuple[str, ...] = ()
    prompt_lookup: int = 0

    def timeout(self, asked: float | None) -> float | None:
        """The bound for a request that asks for one, or for none."""
        given = [seconds for seconds in (asked, self.timeout_s) if seconds is not None]
        return min(given, default=None)


def is_loopback(host: str) -> bool:
    """Whether only this machine's own programs reach `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
