"""Damaged checkpoints: whatever a file holds, it opens or raises CheckpointError, quickly and in little memory."""

from __future__ import annotations

import json
import struct
import tempfile
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ktcore.errors import CheckpointError, TokenizerError
from ktcore.text.from_gguf import tokenizer_from_metadata
from ktcore.weights import Checkpoint, gguf_header, open_checkpoint

FUZZ = settings(
    max_examples=250,
    deadline=2000,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
ABSURD = st.sampled_from([0, 1, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**53, 2**62, 2**63 - 1, 2**63, 2**64 - 1])
# Opening must not allocate by what a damaged header claims: this much, for files below 2 KiB.
MEMORY = 4 * 2**20


@pytest.fixture(scope="module")
def good_gguf() -> bytes:
    """A valid file with every kind of metadata that the reader treats differently, and three tensors."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m.gguf"
        out = gguf.GGUFWriter(path, "llama")
        out.add_bool("a.flag", True)
        out.add_float64("a.real", 0.5)
        out.add_array("a.ints", [1, 2, 3])
        out.add_array("a.bools", [True, False])
        out.add_tokenizer_model("gpt2")
        out.add_tokenizer_pre("qwen2")
        out.add_token_list(["a", "b", "ab", "<s>"])
        out.add_token_types([1, 1, 1, 3])
        out.add_token_merges(["a b"])
        out.add_eos_token_id(3)
        out.add_tensor("w", np.ones((2, 8), dtype=np.float32))
        kind = gguf.GGMLQuantizationType.Q8_0
        out.add_tensor("q", gguf.quants.quantize(np.ones((2, 32), dtype=np.float32), kind), raw_dtype=kind)
        out.add_tensor("b", np.ones(3, dtype=np.float16))
        out.write_header_to_file()
        out.write_kv_data_to_file()
        out.write_tensors_to_file()
        out.close()
        return path.read_bytes()


@pytest.fixture(scope="module")
def good_safetensors() -> bytes:
    import safetensors.numpy

    return safetensors.numpy.save({"w": np.ones((2, 8), dtype=np.float32), "b": np.ones(3, dtype=np.float16)})


@pytest.fixture(autouse=True)
def short_arrays_are_lazy_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_header, "LAZY_FROM", 3)


def opens_or_says_why(path: Path) -> bool:
    """Open and use everything that the header offers. Any exception but the two allowed ones fails the test."""
    tracemalloc.start()
    try:
        with open_checkpoint(path) as checkpoint:
            touch(checkpoint)
        return True
    except CheckpointError:
        return False
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < MEMORY


def touch(checkpoint: Checkpoint) -> None:
    for value in checkpoint.config.values():
        if isinstance(value, Sequence):
            list(value)
    for name, info in checkpoint.tensors.items():
        raw = checkpoint.raw(name)
        assert raw.size == info.nbytes
        raw.tobytes()
        checkpoint.release(name)


def write(folder: Path, content: bytes, name: str = "m.gguf") -> Path:
    (folder / name).write_bytes(content)
    return folder / name


@st.composite
def damage(draw: st.DrawFn) -> list[tuple[str, float, int]]:
    """Edits as (what, where as a fraction of the file, value)."""
    what = st.sampled_from(["byte", "u32", "u64", "cut", "grow", "drop"])
    where = st.floats(0, 1, exclude_max=True)
    return [
        (draw(what), draw(where), draw(st.one_of(ABSURD, st.integers(0, 255)))) for _ in range(draw(st.integers(1, 4)))
    ]


def damaged(content: bytes, edits: list[tuple[str, float, int]]) -> bytes:
    for what, where, value in edits:
        at = int(where * len(content))
        if what == "byte":
            content = content[:at] + bytes([value % 256]) + content[at + 1 :]
        elif what == "u32":
            content = content[:at] + struct.pack("<I", value % 2**32) + content[at + 4 :]
        elif what == "u64":
            content = content[:at] + struct.pack("<Q", value) + content[at + 8 :]
        elif what == "cut":
            content = content[:at]
        elif what == "grow":
            content = content[:at] + bytes(value % 64) + content[at:]
        else:
            content = content[:at] + content[at + value % 64 :]
    return content


class TestGguf:
    def test_the_file_is_good_before_it_is_damaged(self, good_gguf: bytes, tmp_path: Path) -> None:
        assert opens_or_says_why(write(tmp_path, good_gguf))

    def test_cut_anywhere(self, good_gguf: bytes, tmp_path: Path) -> None:
        opened = [n for n in range(len(good_gguf)) if opens_or_says_why(write(tmp_path, good_gguf[:n]))]
        # Only the padding after the last tensor, 6 bytes of f16 in 32, can go without loss.
        assert opened == list(range(len(good_gguf) - 26, len(good_gguf)))

    def test_every_byte_flipped(self, good_gguf: bytes, tmp_path: Path) -> None:
        for at in range(len(good_gguf)):
            content = bytearray(good_gguf)
            content[at] ^= (0x01, 0x80, 0xFF)[at % 3]
            opens_or_says_why(write(tmp_path, bytes(content)))

    @pytest.mark.parametrize("value", [0, 2**31, 2**62, 2**64 - 1])
    def test_an_absurd_number_anywhere(self, good_gguf: bytes, tmp_path: Path, value: int) -> None:
        for at in range(0, len(good_gguf) - 8):
            content = good_gguf[:at] + struct.pack("<Q", value) + good_gguf[at + 8 :]
            opens_or_says_why(write(tmp_path, content))

    @FUZZ
    @given(edits=damage())
    def test_damaged_at_random(self, good_gguf: bytes, tmp_path: Path, edits: list[tuple[str, float, int]]) -> None:
        opens_or_says_why(write(tmp_path, damaged(good_gguf, edits)))

    @FUZZ
    @given(content=st.binary(max_size=300))
    def test_random_bytes_behind_a_good_start(self, tmp_path: Path, content: bytes) -> None:
        opens_or_says_why(write(tmp_path, b"GGUF\x03\0\0\0" + content))
        opens_or_says_why(write(tmp_path, content))

    def test_a_long_count_of_short_things_is_bounded_by_the_file(self, tmp_path: Path) -> None:
        # 2^60 empty strings, promised in a file that has room for a hundred
        kv = struct.pack("<Q", 1) + b"k" + struct.pack("<IIQ", 9, 8, 2**60) + bytes(800)
        path = write(tmp_path, b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + kv)
        assert not opens_or_says_why(path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
NUMBERS = st.one_of(ABSURD, st.integers(-5, 100))
ENTRY = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "F16", "Q4_0", "F4", "X", 3]) | JSON,
        "shape": st.lists(NUMBERS, max_size=5) | JSON,
        "data_offsets": st.lists(NUMBERS, min_size=2, max_size=2) | JSON,
    },
)


class TestSafetensors:
    @pytest.fixture
    def folder(self, tmp_path: Path, good_safetensors: bytes) -> Path:
        (tmp_path / "config.json").write_text('{"model_type": "llama"}')
        (tmp_path / "model.safetensors").write_bytes(good_safetensors)
        return tmp_path

    def test_the_folder_is_good_before_it_is_damaged(self, folder: Path) -> None:
        assert opens_or_says_why(folder)

    def test_cut_anywhere(self, folder: Path, good_safetensors: bytes) -> None:
        for n in range(len(good_safetensors)):
            write(folder, good_safetensors[:n], "model.safetensors")
            assert not opens_or_says_why(folder)

    @FUZZ
    @given(edits=damage())
    def test_damaged_at_random(
        self, folder: Path, good_safetensors: bytes, edits: list[tuple[str, float, int]]
    ) -> None:
        write(folder, damaged(good_safetensors, edits), "model.safetensors")
        opens_or_says_why(folder)

    @FUZZ
    @given(header=st.dictionaries(st.text(max_size=4), ENTRY, max_size=3) | JSON, data=st.integers(0, 64))
    def test_headers_with_wrong_values(self, folder: Path, header: Any, data: int) -> None:
        raw = json.dumps(header).encode()
        write(folder, struct.pack("<Q", len(raw)) + raw + bytes(data), "model.safetensors")
        opens_or_says_why(folder)

    @FUZZ
    @given(
        index=JSON
        | st.fixed_dictionaries({"weight_map": JSON | st.dictionaries(st.text(max_size=4), st.text(max_size=9))})
    )
    def test_indexes_with_wrong_values(self, folder: Path, index: Any) -> None:
        (folder / "model.safetensors").unlink(missing_ok=True)
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        assert not opens_or_says_why(folder)

    @FUZZ
    @given(content=st.binary(max_size=60) | JSON.map(lambda value: json.dumps(value).encode()))
    def test_configs_with_anything(self, folder: Path, content: bytes) -> None:
        (folder / "config.json").write_bytes(content)
        opens_or_says_why(folder)


class TestTokenizerMetadata:
    """The values behind good headers may still make no sense."""

    KEYS = ("pre", "tokens", "token_type", "merges", "scores", "eos_token_id", "bos_token_id", "add_bos_token")

    @FUZZ
    @given(
        model=st.sampled_from(["gpt2", "llama", "bert"]) | JSON,
        changes=st.dictionaries(
            st.sampled_from(KEYS), JSON | st.lists(st.sampled_from(["a", "b", "a b", "", " "]), max_size=4)
        ),
    )
    def test_a_tokenizer_is_built_or_refused(self, model: Any, changes: dict[str, Any]) -> None:
        good: dict[str, Any] = {
            "pre": "qwen2",
            "tokens": ["a", "b", "ab", "<s>"],
            "token_type": [1, 1, 1, 3],
            "merges": ["a b"],
            "scores": [0.0, -1.0, -2.0, 0.0],
            "eos_token_id": 3,
        }
        config = {f"tokenizer.ggml.{key}": value for key, value in {**good, **changes, "model": model}.items()}
        try:
            tokenizer = tokenizer_from_metadata(config, "model.gguf")
        except TokenizerError:
            return
        if tokenizer is not None:
            tokenizer.decode(tokenizer.encode("ab a\n1 <s>"))
