"""Names for the content of KV pages: equal names mean equal tokens, from the sequence's first to the page's last."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence

SIZE = 16


def extend_digests(digests: list[bytes], tokens: Sequence[int], page_size: int) -> None:
    """Append the digests of full pages of `tokens` that are not in `digests` yet.

    Each is BLAKE2b of the page's tokens and of the digest before, so that it names the whole prefix.
    """
    for page in range(len(digests), len(tokens) // page_size):
        body = array("q", tokens[page * page_size : (page + 1) * page_size]).tobytes()
        digests.append(hashlib.blake2b((digests[-1] if digests else b"") + body, digest_size=SIZE).digest())


def state_digest(page: bytes) -> bytes:
    """The name of the recurrent states behind the prefix that `page` names."""
    return hashlib.blake2b(page, digest_size=SIZE, person=b"ktcore state").digest()
