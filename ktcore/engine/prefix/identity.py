"""What must be the same for KV pages to mean the same: model, plan and layout."""

from __future__ import annotations

from ktcore.engine.load.convert import plan_digest
from ktcore.rules.plan import Plan
from ktcore.weights.checkpoint import Checkpoint
from ktcore.weights.packed.container import canonical, digest
from ktcore.weights.packed.fingerprint import files_fingerprint, model_fingerprint


def prefix_identity(checkpoint: Checkpoint, plan: Plan) -> str:
    """Hexadecimal name of a model under a plan: its files, the implementations and options that run it, page size."""
    parts = [model_fingerprint(checkpoint), files_fingerprint(checkpoint), plan_digest(plan), plan.page_size]
    return digest(canonical(parts))[:32]
