"""What is known of a model from its header: facts for lists of models, and the memory it will take."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ktcore.engine.draft.asked import read_draft
from ktcore.rules.prepare import prepare
from ktcore.text.open import load_tokenizer
from ktcore.weights.checkpoint import Checkpoint
from ktcore.weights.open import open_checkpoint


@dataclass(frozen=True)
class Facts:
    """Attributes:
    size: bytes of its tensors.
    format: "gguf" or "safetensors".
    changed: when the file was.
    context: tokens that it will hold once loaded; None where nobody asked.
    memory: device -> bytes that it takes when it is loaded, by its plan; empty where nobody asked.
    """

    size: int
    format: str
    family: str
    changed: datetime
    memory: Mapping[str, int]
    context: int | None = None


def facts_of(checkpoint: Checkpoint, memory: Mapping[str, int], context: int | None = None) -> Facts:
    """Facts of an open checkpoint."""
    config = checkpoint.config
    return Facts(
        size=checkpoint.nbytes,
        format="gguf" if checkpoint.kind == "gguf" else "safetensors",
        family=str(config.get("general.architecture") or config.get("model_type") or ""),
        changed=datetime.fromtimestamp(checkpoint.path.stat().st_mtime, timezone.utc),
        memory=memory,
        context=context,
    )


def planned_facts(path: Path, loading: Mapping[str, Any]) -> Facts:
    """Facts of a model that is not loaded, with the memory of its plan.

    Args:
        loading: options of `ktcore.load`.

    Raises:
        KtcoreError: the model could not be loaded with these options.
    """
    context = loading.get("context")
    drafts = read_draft(loading.get("draft"))
    prepared = prepare(
        path,
        backend=loading.get("backend", "auto"),
        rules=loading.get("rules"),
        memory=loading.get("memory"),
        context=context,
        experts_from=loading.get("experts_from"),
        packing=loading.get("packing"),
        further=drafts is not None and drafts.path is None,
    )
    try:
        memory = {device: m.total for device, m in prepared.plan.memory(context).items()}
        if drafts is not None and drafts.path is not None:
            more = _memory(drafts.path, prepared.plan.backend, context or prepared.plan.default_context())
            memory = {device: memory.get(device, 0) + more.get(device, 0) for device in {**memory, **more}}
        return facts_of(prepared.checkpoint, memory, context or prepared.plan.default_context())
    finally:
        prepared.checkpoint.close()


def _memory(path: Path, backend: str, context: int) -> dict[str, int]:
    """Bytes by device of the plan of a model that drafts."""
    prepared = prepare(path, backend=backend, context=context)
    with prepared.checkpoint:
        return {device: m.total for device, m in prepared.plan.memory(context).items()}


def chat_template(path: Path) -> str | None:
    """The chat template of a model that is not loaded."""
    checkpoint = open_checkpoint(path)
    try:
        tokenizer = load_tokenizer(checkpoint)
        return None if tokenizer is None else tokenizer.chat_template
    finally:
        checkpoint.close()
