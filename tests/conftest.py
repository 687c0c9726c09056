"""Fixtures that several rooms share."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    # workers share the cores: threads of torch that wait for each other would cost more than they give
    os.environ.setdefault("OMP_NUM_THREADS", "1")
# Triton decides when it is imported whether kernels are interpreted; TRITON_INTERPRET=0 runs them on a device.
os.environ.setdefault("TRITON_INTERPRET", "1")

SMOLLM2 = "SmolLM2-135M-Instruct.Q4_1.gguf"


LONG = (
    "vendors/test_simulated.py",
    "parity/test_perplexity.py",
    "triton_kernels/test_operators.py",
    "plugins/test_stranger.py",
    "parity/test_hybrid.py",
    "server/test_service.py",
    "sim/test_operators.py",
    "triton_kernels/test_experts.py",
    "vendors/test_w4a16.py",
    "parity/test_smollm2.py",
    "triton_kernels/test_attention.py",
    "sim/test_memory.py",
    "conformance/test_commands.py",
    "conformance/test_plain.py",
    "parity/test_prefix.py",
    "server/test_models.py",
)
"""Files of ten seconds and more."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The long files first: with two workers, each with whole files, neither ends on one alone."""
    rank = {Path(__file__).parent / name: number for number, name in enumerate(LONG)}
    items.sort(key=lambda item: rank.get(item.path, len(LONG)))


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """The one real model the tests use. Fetching it is the build's job: a test run alone downloads nothing."""
    path = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "ktcore" / SMOLLM2
    if not path.is_file():
        pytest.fail(f"{path} is missing: run `make test`, which fetches it")
    return path


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Tensors here are too small for more, and threads that wait for each other cost most of the time."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def frozen_garbage() -> Iterator[None]:
    """A search for garbage looks at what has come since: what is here before is left out."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
