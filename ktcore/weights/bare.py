"""A config.json without its weights as a checkpoint: enough to plan a model that nobody has downloaded yet."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ktcore.errors import CheckpointError
from ktcore.weights.checkpoint import Checkpoint, TensorInfo
from ktcore.weights.formats import WeightFormat, get_format, known_formats, row_bytes
from ktcore.weights.groups import FP8_GROUP
from ktcore.weights.methods.fp8 import MX_BLOCK, block_format
from ktcore.weights.methods.overrides import Overrides, dynamic_overrides, extra_overrides
from ktcore.weights.safetensors import read_json

DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
MAX_TENSORS = 200_000
"""Where a senseless number of layers or experts is given up; the largest models have some 70 000."""
INTEGERS = ("gptq", "awq", "auto-round")
"""Methods whose config.json alone says bits and groups."""
ROUTERS = (".gate.weight", ".router.weight")
PROJECTIONS = ("_proj", ".w1.", ".w2.", ".w3.")
ANY = ("",)
DEEPSEEK_V4 = (".wq_", ".attn.wkv.", ".wo_", ".shared_experts.w")
"""What is FP8 where `expert_dtype` says that experts are not; compressors, routers and the rest stay as they are."""
EXPERTS = re.compile(r"\.experts\.\d+\.")


class BareCheckpoint(Checkpoint):
    """Holds whatever tensors its configuration asks for, in the shapes it asks for, and no bytes.

    Matrices have the format `weights`, or without it the one that config.json's `quantization_config` gives to its
    projections. What cannot (a row that is no whole number of blocks, vectors, the router) has that of its `dtype`.

    Attributes:
        unplanned: the quantisation method that config.json names where it is not known what it means; else "".
    """

    weightless = True

    def __init__(self, path: Path, config: Mapping[str, Any], weights: str | None = None) -> None:
        text = config.get("text_config")
        text = text if isinstance(text, Mapping) else {}  # of a language model that is a part
        section = config.get("quantization_config") or text.get("quantization_config")
        released = _released(section) if isinstance(section, Mapping) else None
        said = (place.get(key) for place in (config, text) for key in ("dtype", "torch_dtype"))
        dtype = next((value for value in said if value), "bfloat16")
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise CheckpointError(f"{path}: dtype {dtype!r} is unknown", f"known: {', '.join(DTYPES)}")
        self.path = path
        self.kind = "hf"
        self.config = {key: value for key, value in config.items() if key != "quantization_config"}
        self.tensors = self._tensors = dict[str, TensorInfo]()
        self.unplanned = str(section.get("quant_method") or "" if isinstance(section, Mapping) else section or "")
        if weights or released:
            self.unplanned = ""
        self._plain = DTYPES[dtype]
        name, self._parts = (weights, ANY) if weights else released or (self._plain, ANY)
        self._format = get_format(name)
        self._experts: WeightFormat | None = None
        experts = config.get("expert_dtype") or (section.get("expert_dtype") if isinstance(section, Mapping) else None)
        if experts == "fp4" and released and not weights:
            self._parts, self._experts = DEEPSEEK_V4, get_format("MXFP4")
        self._ignored = _ignored(section) if self._parts is not ANY and isinstance(section, Mapping) else []
        self._section = section if not weights and released and isinstance(section, Mapping) else {}
        self._overrides: Overrides | None = None
        if self._section.get("quant_method") in INTEGERS and self._section.keys() & {"dynamic", "extra_config"}:
            make = extra_overrides if self._section["quant_method"] == "auto-round" else dynamic_overrides
            self._overrides = make(f"{path}: quantization_config", self._section)

    def expect(self, name: str, shape: tuple[int, ...]) -> None:
        if len(self._tensors) >= MAX_TENSORS:
            raise CheckpointError(f"{self.path}: asks for more than {MAX_TENSORS} tensors, which no model has")
        wanted = self._wanted(name)
        whole = len(shape) > 1 and wanted is not None and shape[-1] % wanted.block_size == 0
        fmt = wanted.name if wanted is not None and whole and not name.endswith(ROUTERS) else self._plain
        self._tensors[name] = TensorInfo(name, shape, fmt, math.prod(shape[:-1]) * row_bytes(fmt, shape[-1]))

    def raw(self, name: str) -> npt.NDArray[np.uint8]:
        raise CheckpointError(f"{self.path}: holds no weights, so it can be planned but not loaded")

    def release(self, name: str) -> None:
        """Nothing to release."""

    def close(self) -> None:
        """Nothing to close."""

    def _wanted(self, name: str) -> WeightFormat | None:
        """The format of a matrix; None for that of `dtype`."""
        if self._experts is not None and EXPERTS.search(name):
            return self._experts
        module = name.removesuffix(".weight")
        ignored = any(pattern.match(module) for pattern in self._ignored)
        usual = self._format if not ignored and any(part in name for part in self._parts) else None
        if self._overrides is None:
            return usual
        own = self._overrides(name.removesuffix(".weight"))
        if not own:
            return usual
        if own.get("bits") == 16:
            return None
        said = {**self._section, **own}
        return get_format(f"INT{said.get('bits')}_G{said.get('group_size')}")


def _released(section: Mapping[str, Any]) -> tuple[str, tuple[str, ...]] | None:
    """Format of the released weights, and what the names of those that have it hold; None when it is not known."""
    method = section.get("quant_method")
    if method in ("fp8", "mxfp8"):
        block = section.get("weight_block_size", list(MX_BLOCK) if method == "mxfp8" else None)
        if isinstance(block, list) and len(block) == 2 and type(block[1]) is int and block[1] > 0:
            exponents = method == "mxfp8" or section.get("scale_fmt") == "ue8m0"
            return block_format(math.lcm(block[1], FP8_GROUP), block[1], exponents), PROJECTIONS
    if method in INTEGERS:
        name = f"INT{section.get('bits')}_G{section.get('group_size')}"
        return (name, PROJECTIONS) if name in known_formats() else None
    if method == "compressed-tensors":
        return _compressed(section)
    return ("MXFP4", (".experts.",)) if method == "mxfp4" else None


def _compressed(section: Mapping[str, Any]) -> tuple[str, tuple[str, ...]] | None:
    """Of one group of packed integers for all linear modules."""
    groups = section.get("config_groups")
    group = next(iter(groups.values())) if isinstance(groups, Mapping) and len(groups) == 1 else None
    weights = group.get("weights") if isinstance(group, Mapping) and group.get("targets") == ["Linear"] else None
    if section.get("format") != "pack-quantized" or not isinstance(weights, Mapping):
        return None
    name = f"INT{weights.get('num_bits')}_G{weights.get('group_size')}"
    return (name, PROJECTIONS) if name in known_formats() else None


def _ignored(section: Mapping[str, Any]) -> list[re.Pattern[str]]:
    """What `ignore` of compressed-tensors leaves as it is: names of modules, or expressions that they begin with."""
    names = section.get("ignore")
    words = [name for name in names if isinstance(name, str)] if isinstance(names, list) else []
    try:
        return [re.compile(w[3:] if w.startswith("re:") else f"{re.escape(w)}$") for w in words]
    except re.error as error:
        raise CheckpointError(f"quantization_config: ignore holds {error.pattern!r}: {error}") from error


def open_config(path: Path, weights: str | None = None) -> BareCheckpoint:
    """A config.json alone.

    Args:
        weights: format that matrices are taken to be stored in; None is what config.json says, or bfloat16.

    Raises:
        CheckpointError: no such file, not a JSON object, or an unknown format.
    """
    return BareCheckpoint(path, read_json(path), weights)
