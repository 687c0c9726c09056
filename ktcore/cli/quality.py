"""`ktcore bench --quality`: what a rule file costs in quality, against the same model under the shipped rules."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ktcore.errors import RequestError

if TYPE_CHECKING:
    import torch

    from ktcore.engine.model import Model

POSITIONS = 512


def quality(path: Path, text: Path | None, loading: dict[str, Any]) -> dict[str, Any]:
    """Mean KL divergence and top-1 agreement of the model under `loading["rules"]` from the model without them.

    Args:
        text: a file whose first tokens are predicted; None takes random token ids, which any model takes but which are
            far from what it was made for.

    Raises:
        RequestError: no rule file is given, or the text is too short.
    """
    from ktcore.cli.terminal import opened
    from ktcore.engine.quality import divergence

    if loading["rules"] is None:
        raise RequestError("--quality compares a rule file with the shipped rules", "give one with --rules FILE")
    loading = {**loading, "context": POSITIONS}
    with opened(path, **{**loading, "rules": None}) as (full, _):
        ids = _ids(full, text)
        expected = full.logits(ids)
    with opened(path, **loading) as (other, _):
        found = divergence(expected, other.logits(ids))
        treated = sorted({c.experts.describe() for c in other.plan.choices.values() if c.experts is not None})
    return {
        "mean_kl_nats": found.mean_kl,
        "max_kl_nats": found.max_kl,
        "top1_agreement": found.top1,
        "positions": found.positions,
        "text": str(text) if text else "random token ids",
        "rules": str(loading["rules"]),
        "experts": treated,
        "model": str(path),
    }


def _ids(model: Model, text: Path | None) -> list[int]:
    import torch

    if text is None:
        generator = torch.Generator().manual_seed(0)
        drawn: torch.Tensor = torch.randint(0, model.plan.graph.vocab, (POSITIONS,), generator=generator)
        return [int(i) for i in drawn]
    try:
        ids = model.tokenizer.encode(text.read_text(encoding="utf-8"))[:POSITIONS]
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"{text} cannot be read: {error}") from error
    if len(ids) < 16:
        raise RequestError(f"{text} has {len(ids)} tokens, a comparison needs 16 or more")
    return ids


def show(result: dict[str, Any]) -> None:
    """The comparison in a few lines."""
    from ktcore.cli.terminal import console

    out = console()
    out.print(f"mean KL divergence  {result['mean_kl_nats']:.3e} nats (largest {result['max_kl_nats']:.3e})")
    out.print(f"top-1 agreement     {result['top1_agreement']:.2%} of {result['positions']} positions")
    out.print(f"experts             {'; '.join(result['experts']) or 'as usual'}", markup=False)
    out.print(f"over                {result['text']}", markup=False)
