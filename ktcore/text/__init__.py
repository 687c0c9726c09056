"""Text and token ids: tokenizers of every checkpoint, chat templates, text as it streams, guided answers."""
