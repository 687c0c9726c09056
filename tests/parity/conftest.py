"""Tiny models, built and run through transformers once a session."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from .models import save, tiny_model

LENGTH = 96  # longer than the trained context of 64, no multiple of the page size away from it


@dataclass(frozen=True)
class Tiny:
    """A tiny model with its folder and what transformers computes from it."""

    model: PreTrainedModel
    folder: Path
    ids: torch.Tensor
    logits: torch.Tensor

    def generated(self, prompts: torch.Tensor, new_tokens: int) -> torch.Tensor:
        """What transformers generates greedily: prompts [n, T] and their answers, [n, T + new_tokens]."""
        with torch.no_grad():
            return self.model.generate(prompts, max_new_tokens=new_tokens, do_sample=False, eos_token_id=None)

    def likeliest(self, tokens: list[int]) -> list[int]:
        """The token that transformers finds likeliest after each: in one pass, where generate() takes one for each."""
        with torch.no_grad():
            found: list[int] = self.model(torch.tensor([tokens])).logits[0].argmax(-1).tolist()
        return found


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Tiny]:
    made: dict[str, Tiny] = {}

    def get(name: str) -> Tiny:
        if name not in made:
            model = tiny_model(name)
            folder = save(model, tmp_path_factory.mktemp(name))
            ids = torch.randint(3, 256, (LENGTH,), generator=torch.Generator().manual_seed(1))
            with torch.no_grad():
                logits = model(ids[None]).logits[0]
            made[name] = Tiny(model, folder, ids, logits)
        return made[name]

    return get
