"""The arithmetic of an operator: float64 for the truth, or what a backend declares, for torch's own error."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ktcore.conformance.expectations import Precision

_INT_TOP = {"int8": 127.0, "int4": 7.0}


@dataclass(frozen=True)
class Arithmetic:
    """Products, sums and roundings.

    Attributes:
        compute: dtype that values are kept in between operators.
        activations, kv: as in `Precision`.
    """

    compute: torch.dtype = torch.float64
    activations: str | None = None
    kv: torch.dtype | None = None

    @classmethod
    def of(cls, precision: Precision) -> Arithmetic:
        """The arithmetic that a backend declares."""
        kv = None if precision.kv is None else torch_dtype(precision.kv)
        return cls(torch_dtype(precision.compute), precision.activations, kv)

    def cast(self, x: torch.Tensor) -> torch.Tensor:
        """`x` in the working precision."""
        return x.to(self.compute)

    def matmul(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """x [T, in] times weight [out, in] transposed, inputs quantised as declared."""
        x = self.cast(x)
        if self.activations:
            x = self.cast(quantised(x.float(), self.activations))
        return x @ self.cast(weight).T

    def stored(self, x: torch.Tensor) -> torch.Tensor:
        """`x` as a KV cache gives it back."""
        return self.cast(x if self.kv is None else x.to(self.kv))


EXACT = Arithmetic()


def torch_dtype(name: str) -> torch.dtype:
    """torch's dtype of that name.

    Raises:
        ValueError: there is none.
    """
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"{name!r} is no torch dtype")
    return found


def quantised(x: torch.Tensor, scheme: str) -> torch.Tensor:
    """x [T, n] rounded to `scheme` and back: "int8/16", "float8_e4m3fn/row", scaled by the largest magnitude; a float
    dtype alone ("bfloat16") is not scaled.

    Raises:
        ValueError: the scheme is malformed.
    """
    name, _, group = scheme.partition("/")
    if not group and name not in _INT_TOP:
        return x.to(torch_dtype(name)).to(x.dtype)
    width = x.shape[-1] if group in ("", "row") else int(group)
    pad = -x.shape[-1] % width
    grouped = torch.nn.functional.pad(x, (0, pad)).reshape(*x.shape[:-1], -1, width)
    top = _INT_TOP.get(name) or torch.finfo(torch_dtype(name)).max
    scale = grouped.abs().amax(-1, keepdim=True) / top
    scaled = torch.where(scale > 0, grouped / scale, 0.0)
    rounded = scaled.round() if name in _INT_TOP else scaled.to(torch_dtype(name)).float()
    back: torch.Tensor = (rounded * scale).flatten(-2)[..., : x.shape[-1]]
    return back
