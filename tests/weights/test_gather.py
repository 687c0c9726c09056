"""Single rows of stored tensors: the right ones in any format, from one tensor or several, and nothing else is read."""

from __future__ import annotations

import mmap
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from ktcore.errors import CheckpointError
from ktcore.weights import open_checkpoint
from ktcore.weights.ref import WeightRef

ROWS = np.array([7, 0, 11, 7, 3])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text("{}")
    values = torch.randn(12, 40)
    parts = {f"part.{i}": values[4 * i : 4 * i + 4].bfloat16() for i in range(3)}
    save_file({"whole": values, **parts}, tmp_path / "model.safetensors")
    return tmp_path


@pytest.mark.parametrize("names", [["whole"], ["part.0", "part.1", "part.2"]])
def test_rows_are_those_of_the_whole(folder: Path, names: list[str]) -> None:
    with open_checkpoint(folder) as checkpoint:
        weight = WeightRef.of(checkpoint, *names).open(checkpoint)
        weight.scattered()
        whole = weight.tensor().view(12, 40)
        assert torch.equal(weight.gather(ROWS), whole[torch.from_numpy(ROWS)])


def test_a_slice_of_a_tensor_has_no_single_rows(folder: Path) -> None:
    with open_checkpoint(folder) as checkpoint, pytest.raises(CheckpointError, match="whole tensors"):
        WeightRef.of(checkpoint, "whole").pick_rows((0, 4, 1)).open(checkpoint).gather(ROWS)


TABLE = """
import json, resource, struct, sys
import numpy as np
from pathlib import Path
from ktcore.weights import open_checkpoint
from ktcore.weights.ref import WeightRef

folder, rows, dim, parts = Path(sys.argv[1]), 320_001_536, 160, 128
(folder / "config.json").write_text("{}")
each, at, header = rows // parts * dim * 2, 0, {}
for i in range(parts):
    header[f"t.{i}"] = {"dtype": "BF16", "shape": [rows // parts, dim], "data_offsets": [at, at + each]}
    at += each
raw = json.dumps(header).encode()
with (folder / "model.safetensors").open("wb") as file:
    file.write(struct.pack("<Q", len(raw)) + raw)
    file.seek(8 + len(raw) + 317_000_001 * dim * 2)
    file.write(b"\\x80\\x3f" * dim)  # ones, in bfloat16
    file.truncate(8 + len(raw) + at)
def held():
    return sum(int(l.split()[1]) for l in Path("/proc/self/status").read_text().splitlines() if l.startswith("VmRSS"))
resource.setrlimit(resource.RLIMIT_DATA, (1 << 30, 1 << 30))  # memory of its own; the file's pages are not
with open_checkpoint(folder) as checkpoint:
    weight = WeightRef.of(checkpoint, *[f"t.{i}" for i in range(parts)]).open(checkpoint)
    weight.scattered()
    before = held()
    draw = np.random.default_rng(0)
    for _ in range(50):
        got = weight.gather(np.append(draw.integers(0, rows, 16), 317_000_001))
        assert float(got[-1].min()) == float(got[-1].max()) == 1.0
    print(weight.ref.shape, (held() - before) >> 10)
"""


@pytest.mark.skipif(sys.platform != "linux" or not hasattr(mmap, "MADV_RANDOM"), reason="counts pages as Linux does")
def test_rows_of_51_billion_values_are_read_in_a_gigabyte(tmp_path: Path) -> None:
    ran = subprocess.run([sys.executable, "-c", TABLE, str(tmp_path)], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    shape, grown = ran.stdout.rsplit(" ", 1)
    assert shape == "(128, 2500012, 160)"
    # 800 rows lie in some 850 pages; with what the system reads around each it would be 32 times as much
    assert int(grown) <= 40, "MiB"
