"""Reading GGUF: against the gguf package's reader on good files, and error by error on bad ones."""

from __future__ import annotations

import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from ktcore.errors import CheckpointError
from ktcore.weights import dequantize, open_checkpoint
from ktcore.weights.foreign_types import FOREIGN
from ktcore.weights.formats import get_ggml_format

WriteGguf = Callable[..., Path]


@pytest.fixture
def save(tmp_path: Path) -> Callable[[bytes], Path]:
    def write(content: bytes) -> Path:
        (tmp_path / "raw.gguf").write_bytes(content)
        return tmp_path / "raw.gguf"

    return write


def test_a_real_file_reads_as_the_gguf_package_reads_it(smollm2_path: Path) -> None:
    reader = gguf.GGUFReader(smollm2_path)
    with open_checkpoint(smollm2_path) as checkpoint:
        assert checkpoint.kind == "gguf"
        fields = {key: field for key, field in reader.fields.items() if not key.startswith("GGUF.")}
        assert list(checkpoint.config) == list(fields)
        for key, field in fields.items():
            assert checkpoint.config[key] == field.contents(), key
        assert list(checkpoint.tensors) == [tensor.name for tensor in reader.tensors]
        for tensor in reader.tensors:
            info = checkpoint.tensors[tensor.name]
            assert info.shape == tuple(int(n) for n in reversed(tensor.shape))
            assert (info.format, info.nbytes) == (tensor.tensor_type.name, tensor.n_bytes)
            np.testing.assert_array_equal(checkpoint.raw(tensor.name), tensor.data.view(np.uint8).reshape(-1))
        assert checkpoint.nbytes == sum(int(tensor.n_bytes) for tensor in reader.tensors)


def test_metadata_of_every_type_comes_back(write_gguf: WriteGguf) -> None:
    kinds = gguf.GGUFValueType
    metadata: dict[str, Any] = {
        "a.u8": (250, kinds.UINT8),
        "a.i8": (-5, kinds.INT8),
        "a.u16": (65000, kinds.UINT16),
        "a.i16": (-3000, kinds.INT16),
        "a.u32": (4_000_000_000, kinds.UINT32),
        "a.i32": (-2_000_000_000, kinds.INT32),
        "a.u64": (2**63 + 5, kinds.UINT64),
        "a.i64": (-(2**60), kinds.INT64),
        "a.f32": (0.5, kinds.FLOAT32),
        "a.f64": (1e300, kinds.FLOAT64),
        "a.yes": True,
        "a.no": False,
        "a.text": "größer 漢字 😀",
        "a.empty": "",
        "a.ints": [3, -1, 2],
        "a.bools": [True, False],
        "a.texts": ["x", "", "ü"],
        "a.long": list(range(5000)),
        "a.longtexts": [f"token {i}" for i in range(5000)],
    }
    config = open_checkpoint(write_gguf(metadata=metadata)).config
    for key, value in metadata.items():
        expected = value[0] if isinstance(value, tuple) else value
        assert config[key] == expected, key
        assert type(config[key]) is type(expected) or len(expected) >= 4096
    assert config["a.longtexts"][4999] == "token 4999"
    assert len(config["a.long"]) == 5000


def test_every_type_that_the_gguf_package_knows_is_known() -> None:
    for kind in gguf.GGMLQuantizationType:
        found = get_ggml_format(kind.value)
        assert found is not None, kind
        assert found.name == kind.name
        assert (found.block_size, found.block_bytes) == gguf.GGML_QUANT_SIZES[kind]


def test_types_of_others_are_no_types_of_ours() -> None:
    assert not [number for number in FOREIGN if get_ggml_format(number)]


def test_tensors_keep_torch_order_format_and_values(write_gguf: WriteGguf, weights: np.ndarray) -> None:
    experts = np.stack([weights, weights * 2])
    path = write_gguf(tensors={"w": weights, "q": (weights, "Q8_0"), "e": (experts, "Q4_1"), "b": weights[0, :3]})
    with open_checkpoint(path) as checkpoint:
        shapes = {name: (info.shape, info.format) for name, info in checkpoint.tensors.items()}
        assert shapes == {
            "w": ((6, 512), "F32"),
            "q": ((6, 512), "Q8_0"),
            "e": ((2, 6, 512), "Q4_1"),
            "b": ((3,), "F32"),
        }
        np.testing.assert_array_equal(dequantize("F32", checkpoint.raw("w"), (6, 512)).numpy(), weights)
        values = dequantize("Q4_1", checkpoint.raw("e"), (2, 6, 512)).numpy()
        np.testing.assert_allclose(values[1], 2 * values[0], rtol=1e-3, atol=1e-3)
        assert np.abs(values - experts).max() < 0.5


def test_raw_is_a_read_only_view(write_gguf: WriteGguf, weights: np.ndarray) -> None:
    checkpoint = open_checkpoint(write_gguf(tensors={"w": weights}))
    view = checkpoint.raw("w")
    assert not view.flags.owndata
    assert (view.dtype, view.ndim) == (np.uint8, 1)
    with pytest.raises(ValueError, match="read-only"):
        view[0] = 1


def test_closing_keeps_living_views_and_refuses_new_ones(write_gguf: WriteGguf, weights: np.ndarray) -> None:
    metadata = {"a.long": [f"{i}" for i in range(5000)]}
    with open_checkpoint(write_gguf(metadata=metadata, tensors={"w": weights})) as checkpoint:
        view = checkpoint.raw("w")
    np.testing.assert_array_equal(view.view(np.float32).reshape(6, 512), weights)
    with pytest.raises(CheckpointError, match="closed"):
        checkpoint.raw("w")
    with pytest.raises(CheckpointError, match="closed"):
        list(checkpoint.config["a.long"])
    checkpoint.close()


def test_an_unknown_tensor_names_near_ones(write_gguf: WriteGguf, weights: np.ndarray) -> None:
    checkpoint = open_checkpoint(write_gguf(tensors={"blk.0.attn_q.weight": weights}))
    with pytest.raises(CheckpointError, match=r"no tensor named 'blk.0.attn_w.weight'\n.*blk.0.attn_q.weight"):
        checkpoint.raw("blk.0.attn_w.weight")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_release_gives_pages_back(write_gguf: WriteGguf) -> None:
    big = np.ones((4096, 4096), dtype=np.float32)  # 64 MiB

    def resident() -> int:
        status = Path("/proc/self/status").read_text()
        return int(status.split("RssFile:")[1].split()[0]) * 1024

    checkpoint = open_checkpoint(write_gguf(tensors={"w": big}))
    before = resident()
    assert int(checkpoint.raw("w").max()) == 0x80
    touched = resident()
    checkpoint.release("w")
    after = resident()
    assert touched - before > big.nbytes * 0.9
    assert after - before < big.nbytes * 0.1
    assert int(checkpoint.raw("w").max()) == 0x80


def test_a_custom_alignment_is_honoured(write_gguf: WriteGguf, weights: np.ndarray) -> None:
    path = write_gguf(metadata={"general.alignment": 256}, tensors={"a": weights[0, :5], "w": weights})
    np.testing.assert_array_equal(open_checkpoint(path).raw("w").view(np.float32).reshape(6, 512), weights)


def test_version_2_is_read(save: Any, raw: Any) -> None:
    content = raw.file([raw.u32("a.b", 7)], [raw.tensor("t", [3])], data=12, version=2)
    checkpoint = open_checkpoint(save(content))
    assert checkpoint.config == {"a.b": 7}
    assert checkpoint.tensors["t"].shape == (3,)


def test_text_that_is_not_utf8_is_shown_with_its_bytes(save: Any, raw: Any) -> None:
    content = raw.file([raw.kv("a.b", raw.STRING, raw.string(b"caf\xe9"))])
    assert open_checkpoint(save(content)).config["a.b"] == "caf\\xe9"


def test_nested_arrays_are_read_to_a_depth(save: Any, raw: Any) -> None:
    def nested(depth: int) -> bytes:
        inner = struct.pack("<IQ", raw.U32, 2) + struct.pack("<2I", 5, 6)
        for _ in range(depth):
            inner = struct.pack("<IQ", raw.ARRAY, 1) + inner
        return raw.file([raw.kv("a.b", raw.ARRAY, inner)])

    assert open_checkpoint(save(nested(2))).config["a.b"] == [[[5, 6]]]
    with pytest.raises(CheckpointError, match=r"a\.b: arrays nested more than 4 deep"):
        open_checkpoint(save(nested(50)))


HUGE = 2**64 - 1


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda r: r.file(version=1), "version 1 is not supported"),
        (lambda r: r.file(version=4), "version 4 is not supported, only 2 and 3"),
        (lambda r: r.file(version=3 << 24), "big-endian"),
        (lambda r: r.file(counts=(HUGE, 0)), f"the tensor count at byte 8 is {HUGE}, more than the 16 bytes left"),
        (lambda r: r.file(counts=(0, HUGE)), f"the metadata count at byte 16 is {HUGE}"),
        (lambda r: r.file([struct.pack("<Q", HUGE) + bytes(64)]), "key 1 of 1 at byte 32 claims .* allowed 65535"),
        (lambda r: r.file([r.string(b"\xff\xfe") + bytes(32)]), "key 1 of 1 at byte 24 is not UTF-8"),
        (lambda r: r.file([r.string("") + bytes(32)]), "key 1 of 1 at byte 24 is empty"),
        (lambda r: r.file([r.kv("k", 13, bytes(32))]), "k has unknown value type 13 at byte 33"),
        (lambda r: r.file([r.u32("k", 1), r.u32("k", 2)]), "'k' appears twice"),
        (lambda r: r.file([r.kv("k", r.STRING, struct.pack("<Q", HUGE))]), "the value of k starts at .* and takes"),
        (lambda r: r.file([r.kv("k", r.ARRAY, struct.pack("<IQ", 4, HUGE))]), "the length of k at byte 41 is"),
        (lambda r: r.file([r.kv("k", r.ARRAY, struct.pack("<IQ", 8, 2**60))]), "the length of k at byte 41 is"),
        (lambda r: r.file([r.kv("k", r.ARRAY, struct.pack("<IQ", 99, 1) + bytes(9))]), "unknown element type 99"),
        (
            lambda r: r.file([r.kv("k", r.ARRAY, struct.pack("<IQQ", 8, 1, HUGE) + bytes(9))]),
            "string 1 of 1 of k ends at byte",
        ),
        (lambda r: r.file([r.u32("general.alignment", 24)]), "general.alignment is 24, not a power of two"),
        (lambda r: r.file([r.u32("general.alignment", 0)]), "general.alignment is 0"),
        (lambda r: r.file([r.kv("general.alignment", 8, r.string("x"))]), "general.alignment is 'x'"),
        (lambda r: r.file([], [r.tensor("t", [1, 1, 1, 1, 1])]), "t claims 5 dimensions"),
        (lambda r: r.file([], [r.tensor("t", [4, 0])], 64), r"t has an empty dimension: \[4, 0\]"),
        (lambda r: r.file([], [r.tensor("t", [HUGE, HUGE, HUGE, HUGE])], 64), "t .* but only 64 are present"),
        (lambda r: r.file([], [r.tensor("t", [2**33, 2**31])], 64), "t .* but only 64 are present"),
        (lambda r: r.file([], [r.tensor("t", [8], 99)], 64), "t has unknown type 99"),
        (lambda r: r.file([], [r.tensor("t", [8], 4)], 64), "t is of type 4, Q4_2, which llama.cpp no longer has"),
        (lambda r: r.file([], [r.tensor("t", [8], 144)], 64), "t is of type 144, IQ4_KS of ik_llama.cpp"),
        (lambda r: r.file([], [r.tensor("t", [48], 2)], 64), "t: a row of 48 values is not a multiple of Q4_0's"),
        (lambda r: r.file([], [r.tensor("t", [8], offset=HUGE - 31)], 64), "t .* only 0 are present"),
        (lambda r: r.file([], [r.tensor("t", [8], offset=8)], 64), "offset 8 is not aligned to 32"),
        (lambda r: r.file([], [r.tensor("t", [8]), r.tensor("t", [8], offset=32)], 64), "two tensors are named t"),
        (lambda r: r.file([], [r.tensor("t", [16]), r.tensor("u", [8], offset=32)], 64), "tensors t and u overlap"),
        (lambda r: r.file([], [r.tensor(b"\xff", [8])], 64), "name of tensor 1 of 1 at byte 24 is not UTF-8"),
    ],
)
def test_a_damaged_header_says_what_and_where(save: Any, raw: Any, build: Any, message: str) -> None:
    path = save(build(raw))
    with pytest.raises(CheckpointError, match=message) as error:
        open_checkpoint(path)
    assert str(path) in str(error.value)


def test_a_file_cut_in_its_data_names_the_tensor_and_the_bytes(write_gguf: WriteGguf, weights: np.ndarray) -> None:
    path = write_gguf(tensors={"first": weights, "second": weights})
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.truncate(size - 100)
    with pytest.raises(
        CheckpointError, match=rf"second \(F32, \[6, 512\]\) takes 12288 bytes.*only 12188 are present.*{size - 100}"
    ):
        open_checkpoint(path)


def test_a_big_endian_file_is_named(write_gguf: WriteGguf, weights: np.ndarray) -> None:
    path = write_gguf(tensors={"w": weights}, endianess=gguf.GGUFEndian.BIG)
    with pytest.raises(CheckpointError, match="big-endian"):
        open_checkpoint(path)


class TestSplitFiles:
    """Files of several parts, as the gguf package writes them."""

    @pytest.fixture
    def parts(self, write_gguf: WriteGguf, weights: np.ndarray) -> list[Path]:
        tensors = {f"t{i}": weights + i for i in range(6)}
        write_gguf(metadata={"general.name": "split"}, tensors=tensors, split_max_tensors=2, dry_run=False)
        found = sorted(write_gguf("other.gguf").parent.glob("m-*-of-*.gguf"))
        assert len(found) == 3
        return found

    @pytest.mark.parametrize("given", [0, 1, 2])
    def test_any_part_opens_all(self, parts: list[Path], weights: np.ndarray, given: int) -> None:
        with open_checkpoint(parts[given]) as checkpoint:
            assert checkpoint.config["general.name"] == "split"
            assert sorted(checkpoint.tensors) == [f"t{i}" for i in range(6)]
            for i in range(6):
                values = checkpoint.raw(f"t{i}").view(np.float32).reshape(6, 512)
                np.testing.assert_array_equal(values, weights + i)
                checkpoint.release(f"t{i}")

    @pytest.mark.parametrize("beside", [(), ("mmproj-m.gguf",), ("config.json", "readme.md", "mmproj-F16.gguf")])
    def test_a_folder_that_holds_one_set_opens_it(self, parts: list[Path], beside: tuple[str, ...]) -> None:
        (parts[0].parent / "other.gguf").unlink()
        for name in beside:
            (parts[0].parent / name).write_text("{}")
        with open_checkpoint(parts[0].parent) as checkpoint:
            assert (checkpoint.kind, checkpoint.path) == ("gguf", parts[0])
            assert len(checkpoint.tensors) == 6

    def test_a_folder_that_holds_more_than_one_set_is_not_guessed_at(self, parts: list[Path]) -> None:
        folder = parts[0].parent  # other.gguf is a model too
        with pytest.raises(CheckpointError, match=r"without config\.json that holds m-00001-of-00003\.gguf"):
            open_checkpoint(folder)
        (folder / "other.gguf").rename(folder / "n-00001-of-00001.gguf")
        with pytest.raises(CheckpointError, match="give the file itself"):
            open_checkpoint(folder)

    def test_a_folder_with_a_part_missing_names_it(self, parts: list[Path]) -> None:
        (parts[0].parent / "other.gguf").unlink()
        parts[0].unlink()
        with pytest.raises(CheckpointError, match=r"m-00001-of-00003.gguf: part 1 of 3 is missing"):
            open_checkpoint(parts[0].parent)

    def test_a_missing_part_is_named(self, parts: list[Path]) -> None:
        parts[1].unlink()
        with pytest.raises(CheckpointError, match=r"m-00002-of-00003.gguf: part 2 of 3 is missing"):
            open_checkpoint(parts[0])

    def test_a_renamed_part_is_refused(self, parts: list[Path]) -> None:
        renamed = parts[0].rename(parts[0].with_name("model.gguf"))
        with pytest.raises(CheckpointError, match="one of 3 parts by its header, but its name does not say which"):
            open_checkpoint(renamed)

    def test_swapped_parts_are_refused(self, parts: list[Path]) -> None:
        aside = parts[1].rename(parts[1].with_name("aside"))
        parts[2].rename(parts[1])
        aside.rename(parts[2])
        with pytest.raises(CheckpointError, match="does not say part 2 of 3"):
            open_checkpoint(parts[0])
        with pytest.raises(CheckpointError, match="part 3 of 3 by its header, but not by its name"):
            open_checkpoint(parts[1])
