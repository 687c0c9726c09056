"""A step's logits where the model left them; ids or a few candidates come to the host where rows are not needed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

_LOW = (1 << 32) - 1
_NAN = 0x7FC00000
_SPARE = 64
"""Candidates beyond the asked for: a division by the temperature can make equals of what was not."""


@dataclass(frozen=True)
class Scores:
    """Logits float32 [n, vocab] on the device of the output head; valid until the next step.

    Attributes:
        check: raises what host experts of the step raised; called when anything of it has reached the host.
    """

    logits: torch.Tensor
    check: Callable[[], None]

    @property
    def on_host(self) -> bool:
        """Whether rows cost nothing."""
        return self.logits.device.type == "cpu"

    def rows(self, which: Sequence[int] | None = None) -> torch.Tensor:
        """Rows, all by default, on the CPU."""
        if which is None or len(which) == len(self.logits):
            found = self.logits.cpu()
        else:
            found = torch.stack([self.logits[i] for i in which]).cpu()
        self.check()
        return found

    def likeliest(self) -> list[tuple[int, float]]:
        """Each row's highest logit behind its id, the lowest of equals, as `torch.argmax` has it on the CPU.

        A row that holds NaN has NaN for its highest.
        """
        ids = self.logits.argmax(-1, keepdim=True)
        highest = self.logits.gather(-1, ids).float()
        # one copy to the host for both
        found = torch.cat([ids.int(), highest.view(torch.int32)], dim=-1).cpu()
        self.check()
        return list(zip(found[:, 0].tolist(), found[:, 1].view(torch.float32).tolist(), strict=True))

    def candidates(self, which: Sequence[int], count: int) -> torch.Tensor:
        """Rows on the CPU that hold at least the `count` highest logits and -inf elsewhere.

        Of equal logits those with lower ids are held: sampling from them with top_k of `count` or less is sampling
        from the whole row.
        """
        n, vocab = len(which), self.logits.shape[1]
        logits = torch.stack([self.logits[i] for i in which])
        found = order_keys(logits).topk(min(count + _SPARE, vocab)).values.cpu()
        self.check()
        values, ids = from_keys(found)
        return torch.full((n, vocab), float("-inf")).scatter_(1, ids, values)


def order_keys(logits: torch.Tensor) -> torch.Tensor:
    """int64 keys, none alike in a row, in the order of float32 logits [n, vocab], falling ids among equals.

    NaN is above all numbers, whatever its sign: what is not a number must not vanish.
    """
    numbers = logits.float() + 0.0  # a zero has no sign
    bits = torch.where(numbers.isnan(), _NAN, numbers.view(torch.int32))
    rising = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    ids = torch.arange(logits.shape[1], dtype=torch.int64, device=logits.device)
    return rising.long() * (_LOW + 1) + (_LOW - ids)


def from_keys(keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits float32 and ids int64 of `order_keys`' keys."""
    rising = (keys >> 32).int()
    return (rising ^ ((rising >> 31) & 0x7FFFFFFF)).view(torch.float32), _LOW - (keys & _LOW)
