"""How the stand-ins for torch_npu's operators refuse what the documents exclude, and tags for storage formats."""

from __future__ import annotations

from typing import Any

import torch

ND, NZ = 2, 29
HALVES = (torch.float16, torch.bfloat16)
FLOATS = (*HALVES, torch.float32)


class Refused(RuntimeError):
    """As aclnn's parameter checks fail: at once here, at the next synchronisation with the task queue on."""


def check(operator: str, rule: bool, words: str) -> None:
    """Refuse unless `rule` holds.

    Raises:
        Refused: it does not.
    """
    if not rule:
        raise Refused(f"call aclnn{operator} failed, error code is 161002: {words}")


def dtype(operator: str, name: str, tensor: torch.Tensor, *allowed: torch.dtype) -> None:
    """Refuse another type."""
    check(operator, tensor.dtype in allowed, f"{name} is {tensor.dtype}, which is none of {allowed}")


def shape(operator: str, name: str, tensor: torch.Tensor, *wanted: int) -> None:
    """Refuse another shape."""
    check(operator, tuple(tensor.shape) == wanted, f"{name} has shape {list(tensor.shape)}, expected {list(wanted)}")


def contiguous(operator: str, **tensors: torch.Tensor | None) -> None:
    """Refuse views with gaps."""
    for name, tensor in tensors.items():
        check(operator, tensor is None or tensor.is_contiguous(), f"{name} is not contiguous")


def storage(tensor: torch.Tensor) -> int:
    """ND or NZ: the tag that `npu_format_cast` left; a view loses it, as on the device."""
    return int(getattr(tensor, "npu_format", ND))


def tagged(tensor: torch.Tensor, acl_format: int) -> torch.Tensor:
    """The same values with a tag."""
    made: Any = tensor.detach()
    made.npu_format = acl_format
    return made  # type: ignore[no-any-return]
