"""Prompts in every form that Python callers have them: text, lists, tensors, arrays, and what tokenizers return."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np
import torch

from ktcore.errors import RequestError

TAKEN = (
    "text, a list of texts, a list of token ids, a list of such lists, an integer tensor or array [seq] or "
    "[batch, seq], or what a tokenizer returns: a mapping with input_ids and perhaps attention_mask"
)
HOST = torch.device("cpu")
_KEYS = ("input_ids", "attention_mask")


class Form(Enum):
    """What prompts came in, and results go out."""

    TEXT = "text"
    LIST = "list"
    TENSOR = "tensor"
    ARRAY = "array"


@dataclass(frozen=True)
class Prompts:
    """Prompts as token ids, with the form that their caller gave them.

    Attributes:
        rows: ids of each prompt, without padding.
        given: ids of each prompt as they came, with the padding in front.
        form: what they came in.
        many: a batch, not one prompt alone.
        device: of tensors.
    """

    rows: tuple[list[int], ...]
    given: tuple[list[int], ...]
    form: Form
    many: bool
    device: torch.device = HOST

    def one(self) -> list[int]:
        """The only prompt.

        Raises:
            RequestError: there are several.
        """
        if len(self.rows) != 1:
            raise RequestError(
                f"a stream takes one prompt, and {len(self.rows)} were given", "call generate(), or stream each"
            )
        return self.rows[0]

    def continued(self, answers: Sequence[list[int]], pad: int | None) -> Any:
        """Prompts, as they were given, with their answers behind: in the form that they came in.

        Args:
            answers: new ids of each prompt.
            pad: fills rows of a tensor or an array that ended early; None repeats a row's last id.
        """
        rows = [[*given, *answer] for given, answer in zip(self.given, answers, strict=True)]
        if self.form is not Form.LIST:
            width = max(map(len, rows))
            rows = [row + [row[-1] if pad is None else pad] * (width - len(row)) for row in rows]
        whole: Any = rows if self.many else rows[0]
        if self.form is Form.TENSOR:
            return torch.tensor(whole, dtype=torch.int64, device=self.device)
        return np.array(whole, dtype=np.int64) if self.form is Form.ARRAY else whole

    def scored(self, logits: Sequence[torch.Tensor]) -> Any:
        """Logits float32 [tokens, vocab] of each prompt, in the form that the prompts came in.

        Returns:
            [tokens, vocab] for one prompt. For several: a list of these; of a tensor or an array [batch, seq] one of
            [batch, seq, vocab], whose rows of padding are NaN.
        """
        if self.form is Form.ARRAY:
            return self._padded(logits).numpy()
        if self.form is Form.TENSOR:
            return self._padded(logits).to(self.device)
        return list(logits) if self.many else logits[0]

    def _padded(self, logits: Sequence[torch.Tensor]) -> torch.Tensor:
        whole = [
            torch.cat([torch.full((len(given) - len(found), found.shape[1]), torch.nan), found])
            for given, found in zip(self.given, logits, strict=True)
        ]
        return torch.stack(whole) if self.many else whole[0]


def read_prompts(prompt: Any, encode: Callable[[str], list[int]], mask: Any = None, pad: int | None = None) -> Prompts:
    """Token ids of whatever holds prompts.

    Args:
        prompt: see `TAKEN`.
        encode: makes ids of a text.
        mask: 0 where a batch is padded on the left, else 1; shaped like the ids. A mapping may bring its own.
        pad: id that stands for padding where there is no mask, as in transformers.

    Raises:
        RequestError: it is of another type, has other keys or a mask that does not fit, or holds no token.
    """
    if isinstance(prompt, Mapping):
        prompt, mask = _of_mapping(prompt, mask)
    if _is_text(prompt):
        if mask is not None:
            raise RequestError("attention_mask belongs to token ids, and the prompt is text")
        texts = [prompt] if isinstance(prompt, str) else list(prompt)
        rows = tuple(encode(text) for text in texts)
        return Prompts(rows, rows, Form.TEXT, not isinstance(prompt, str))
    found = _ids(prompt)
    if found is None:
        raise RequestError(f"a prompt cannot be {_described(prompt)}", f"give {TAKEN}{_advice(prompt)}")
    form, many, given = found
    masks = _masks(given, mask, many, pad)
    rows = tuple(_unpadded(row, kept) for row, kept in zip(given, masks, strict=True))
    device = prompt.device if isinstance(prompt, torch.Tensor) else HOST
    return Prompts(rows, tuple(given), form, many, device)


def _of_mapping(prompt: Mapping[Any, Any], mask: Any) -> tuple[Any, Any]:
    if "input_ids" not in prompt:
        keys = ", ".join(map(repr, prompt)) or "no key"
        raise RequestError(
            f"a prompt that is a mapping must have input_ids, and this {type(prompt).__name__} has {keys}",
            "a message goes to chat([message])" if "role" in prompt else f"give {TAKEN}",
        )
    others = [str(key) for key in prompt if key not in _KEYS]
    if others:
        raise RequestError(
            f"{', '.join(others)} of a prompt cannot be taken", f"leave them out; taken are {' and '.join(_KEYS)}"
        )
    own = prompt.get("attention_mask")
    if own is not None and mask is not None:
        raise RequestError("attention_mask is given twice: in the mapping and beside it", "leave one out")
    return prompt["input_ids"], mask if own is None else own


def _is_text(prompt: Any) -> bool:
    if isinstance(prompt, str):
        return True
    return isinstance(prompt, (list, tuple)) and bool(prompt) and all(isinstance(item, str) for item in prompt)


def _ids(value: Any) -> tuple[Form, bool, list[list[int]]] | None:
    """The form, whether it is a batch, and its rows; None where it is nothing of the kind."""
    if isinstance(value, (torch.Tensor, np.ndarray)):
        form = Form.TENSOR if isinstance(value, torch.Tensor) else Form.ARRAY
        if not _integers(value) or value.ndim not in (1, 2):
            return None
        rows = value.tolist()
        _refuse_nothing(rows)
        return form, value.ndim == 2, rows if value.ndim == 2 else [rows]
    if not isinstance(value, Sequence) or isinstance(value, (str, bytes, bytearray)):
        return None
    _refuse_nothing(value)
    row = _row(value)
    if row is not None:
        return Form.LIST, False, [row]
    rows = [_row(item) for item in value]
    return None if any(r is None for r in rows) else (Form.LIST, True, rows)


def _refuse_nothing(rows: Any) -> None:
    if len(rows) == 0:
        raise RequestError("the prompt is empty: there is nothing to continue")


def _row(value: Any) -> list[int] | None:
    """Ids of a sequence of integers; None where it is none."""
    if isinstance(value, (torch.Tensor, np.ndarray)):
        return [int(i) for i in value] if value.ndim == 1 and _integers(value) else None
    if not isinstance(value, Sequence) or isinstance(value, (str, bytes, bytearray)):
        return None
    if any(isinstance(item, (bool, np.bool_)) for item in value):
        return None
    try:
        return [operator.index(item) for item in value]
    except TypeError:  # tensors with anything but one integer, and all that is no number
        return None


def _integers(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return not (value.is_floating_point() or value.is_complex() or value.dtype == torch.bool)
    return bool(np.issubdtype(value.dtype, np.integer))


def _flags(value: Any) -> bool:
    return str(value.dtype).endswith("bool")


def _shape(rows: list[list[int]], many: bool) -> str:
    """ "[2 x 5]" of a batch, "[5]" of one row; the lengths of rows that differ."""
    lengths = list(dict.fromkeys(map(len, rows)))
    width = " or ".join(map(str, lengths))
    return f"[{len(rows)} x {width}]" if many else f"[{width}]"


def _masks(given: list[list[int]], mask: Any, many: bool, pad: int | None) -> list[list[int]]:
    if mask is None:
        return [[int(i != pad) for i in row] if pad in row else [1] * len(row) for row in given]
    found = _ids(mask + 0 if isinstance(mask, (torch.Tensor, np.ndarray)) and _flags(mask) else mask)
    if found is None:
        raise RequestError(f"attention_mask cannot be {_described(mask)}", "give zeros and ones, shaped like the ids")
    rows = found[2]
    if found[1] != many or [len(row) for row in rows] != [len(row) for row in given]:
        raise RequestError(
            f"attention_mask is shaped {_shape(rows, found[1])}, the ids {_shape(given, many)}", "they belong together"
        )
    wrong = next((i for row in rows for i in row if i not in (0, 1)), None)
    if wrong is not None:
        raise RequestError(f"attention_mask holds {wrong}", "give 0 for padding and 1 for tokens")
    return rows


def _unpadded(row: list[int], kept: list[int]) -> list[int]:
    """The tokens behind the padding."""
    start = kept.index(1) if 1 in kept else len(kept)
    if 0 in kept[start:]:
        raise RequestError(
            "a prompt is padded on the right or within, and could not be continued",
            "pad on the left: tokenizer.padding_side = 'left'",
        )
    if not row[start:]:
        raise RequestError("a prompt holds no token" + (" but padding" if row else ""), "leave it out of the batch")
    return row[start:]


def _described(value: Any) -> str:
    """The type of a value, and what is in it where that tells more."""
    if isinstance(value, (torch.Tensor, np.ndarray)):
        kind = "a tensor" if isinstance(value, torch.Tensor) else "an array"
        return f"{kind} of {value.dtype} {list(value.shape)}"
    if isinstance(value, (list, tuple)):
        inside = sorted({"None" if item is None else type(item).__name__ for item in value})
        return f"a {type(value).__name__} of {' and '.join(inside)}"
    return "None" if value is None else f"of type {type(value).__name__}"


def _advice(value: Any) -> str:
    if isinstance(value, (list, tuple)) and any(isinstance(item, Mapping) and "role" in item for item in value):
        return "; messages go to chat()"
    return "; text is str, not bytes" if isinstance(value, (bytes, bytearray)) else ""
