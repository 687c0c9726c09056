"""Finds the reader for a checkpoint's tokenizer."""

from __future__ import annotations

from ktcore.text.tokenizer import Tokenizer
from ktcore.weights.checkpoint import Checkpoint


def load_tokenizer(checkpoint: Checkpoint) -> Tokenizer | None:
    """The tokenizer that a checkpoint carries, or None when it carries none.

    Raises:
        TokenizerError: it has one, but of a kind that cannot be rebuilt; the message names the kind.
    """
    if checkpoint.kind == "gguf":
        from ktcore.text.from_gguf import tokenizer_from_metadata

        return tokenizer_from_metadata(checkpoint.config, str(checkpoint.path))
    from ktcore.text.from_folder import tokenizer_from_folder

    return tokenizer_from_folder(checkpoint.path, checkpoint.config)
