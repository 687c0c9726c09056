"""SmolLM2 in other weight formats, and its perplexity on a text in ktcore and in transformers.

Its width of 576 is no multiple of the 256 values that K-quants take together, so it is put into a model of width 768:
zero columns, three heads that read and write zeros, norms corrected for the longer mean. That model computes the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf.quants import dequantize
from ktcore_cpu import _native

import ktcore
from ktcore.weights.quantize import Loss, quantize_rows

from .kquants import F32, quantized
from .smollm2 import transformers_model

AFFINE = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
WIDTH, WIDER = 576, 768
WINDOW = 512  # tokens of the text that are read together
HEADS = {"llama.attention.head_count": 12, "llama.attention.head_count_kv": 4}
ROWS = {"attn_q": WIDER, "attn_k": 256, "attn_v": 256, "attn_output": WIDER, "ffn_down": WIDER}


def wide_tensors(path: Path) -> dict[str, F32]:
    """The demo model's tensors, dequantised by the gguf package, put into the wider model."""
    return {t.name: _widened(t.name, dequantize(t.data, t.tensor_type)) for t in gguf.GGUFReader(path).tensors}


def write(source: Path, tensors: Mapping[str, F32], path: Path, format_of: Callable[[str], str]) -> Path:
    """The wider model as a GGUF file with the keys of `source`, its matrices in the format that their name gets."""
    writer = gguf.GGUFWriter(path, "llama")
    reader = gguf.GGUFReader(source)
    changed = {
        **HEADS,
        "llama.embedding_length": WIDER,
        "llama.attention.layer_norm_rms_epsilon": 1e-5 * WIDTH / WIDER,
    }
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            kind, *of = field.types
            writer.add_key_value(key, changed.get(key, field.contents()), kind, of[0] if of else None)
    for name, value in tensors.items():
        if value.ndim == 1:
            writer.add_tensor(name, value)
            continue
        kind = gguf.GGMLQuantizationType[format_of(name)]
        writer.add_tensor(name, quantized(value, kind.name).view(_STORED.get(kind, np.uint8)), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def rules_with(options: str, layers: str = "0-", head: bool = True) -> str:
    """A rule file that gives these options to the matrices of some layers and of the head."""
    tail = f"device: host, options: {{{options}}}}}"
    lines = [
        f"  - {{name: {op}, match: {{op: {op}, layers: '{layers}'}}, use: cpu.{op}, {tail}"
        for op in ("attention", "mlp")
    ]
    if head:
        lines.append(f"  - {{name: h, match: {{op: linear, name: head}}, use: cpu.linear, {tail}")
    return "\n".join(["version: 1", "rules:", *lines, ""])


def token_ids(path: Path, text: str, limit: int | None = None) -> list[int]:
    """A text as token ids of the model."""
    with ktcore.load(path, backend="cpu", context=64) as model:
        return model.tokenizer.encode(text)[:limit]


def ours(path: Path, ids: list[int], rules: Path | None = None) -> float:
    """Perplexity of `ids` on the native kernels."""
    with ktcore.load(path, backend="cpu", rules=rules, context=WINDOW) as model:
        used = {model.plan.choices[f"layers.0.{part}"].implementation.id for part in ("attn", "ffn")}
        assert used == {"cpu.attention", "cpu.mlp"}
        return perplexity(model.logits, ids)


def native_logits(path: Path, ids: list[int], rules: Path | None = None) -> torch.Tensor:
    """What the native kernels answer after each of `ids`, at most a window of them: float32 [tokens, vocab]."""
    with ktcore.load(path, backend="cpu", rules=rules, context=WINDOW) as model:
        return model.logits(ids)


def divergence(of: torch.Tensor, by: torch.Tensor) -> float:
    """Mean Kullback-Leibler divergence in nats of the answers `by` from the answers `of`."""
    expected, found = of.double().log_softmax(-1), by.double().log_softmax(-1)
    return float((expected.exp() * (expected - found)).sum(-1).mean())


def theirs(path: Path, ids: list[int], integers: str | None = None, layers: range | None = None) -> float:
    """Perplexity of `ids` in transformers in float32, on weights dequantised by the gguf package.

    Args:
        integers: matrices are first quantised to this group format, and dequantised in numpy.
        layers: those whose matrices are; None takes all, and the head.
    """
    model = transformers_model(path)
    if integers is not None and layers is None:
        # the table of embeddings stays as it is, though the head has the same values
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
        _through_integers(model, integers)
    for i in layers or ():
        _through_integers(model.model.layers[i], integers or "")
    with torch.inference_mode():
        return perplexity(lambda window: model(torch.tensor([window])).logits[0], ids)


def perplexity(logits_of: Callable[[list[int]], torch.Tensor], ids: list[int]) -> float:
    """exp of the mean negative log-likelihood of ids, read in windows, of each all tokens but the first."""
    parts = []
    for start in range(0, len(ids), WINDOW):
        window = ids[start : start + WINDOW]
        likely = logits_of(window)[:-1].log_softmax(-1)
        parts.append(likely[torch.arange(len(window) - 1), torch.tensor(window[1:])])
    return math.exp(-torch.cat(parts).double().mean().item())


def _through_integers(model: torch.nn.Module, integers: str) -> None:
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            rows, cols = module.weight.shape
            raw = quantize_rows(module.weight.detach(), integers, Loss(), "weight")
            module.weight.data = torch.from_numpy(_integers(raw, integers).reshape(rows, cols))


def _integers(raw: np.ndarray, format: str) -> F32:
    """The values of a group format with float16 scales, by its definition in docs/formats.md."""
    blocks = raw.reshape(-1, _native.formats()[format][1])
    scale, zero = blocks[:, :2].copy().view(np.float16), blocks[:, 2:4].copy().view(np.uint16)
    assert (zero < 0x8000).all()
    codes = blocks[:, 4:]
    if format.startswith("INT4"):
        codes = np.stack([codes & 15, codes >> 4], -1).reshape(len(codes), -1)
    return (codes.astype(np.int32) - zero).astype(np.float32) * scale.astype(np.float32)


def _widened(name: str, value: F32) -> F32:
    if value.ndim == 1:
        return np.pad(value * np.float32(math.sqrt(WIDTH / WIDER)), (0, WIDER - WIDTH))
    part = name.split(".")[-2]
    rows = ROWS.get(part, value.shape[0])
    cols = value.shape[1] if part == "ffn_down" else WIDER
    return np.pad(value, ((0, rows - value.shape[0]), (0, cols - value.shape[1])))


_STORED = {gguf.GGMLQuantizationType.F32: np.float32, gguf.GGMLQuantizationType.F16: np.float16}
