"""The layer for further tokens in GGUF files, on the CPU's kernels, and beside captured steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from transformers import PreTrainedModel

import ktcore
from ktcore.engine.schedule.sequence import Sequence
from ktcore.ops.sampling import SamplingParams

from . import gguf_writer
from .further import Further, further_folder

pytestmark = pytest.mark.usefixtures("one_thread")

GREEDY = SamplingParams(temperature=0)
NEXTN = {"embed": "enorm", "hidden": "hnorm", "project": "eh_proj", "norm": "shared_head_norm"}
Make = Callable[[str], Further]


@pytest.fixture(scope="module")
def further(tmp_path_factory: pytest.TempPathFactory) -> Make:
    made: dict[str, Further] = {}

    def get(name: str) -> Further:
        if name not in made:
            made[name] = further_folder(name, tmp_path_factory.mktemp(name))
        return made[name]

    return get


def _ids(seed: int, length: int) -> list[int]:
    return torch.randint(3, 256, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def _forced(model: ktcore.Model, texts: list[list[int]], wrong: int) -> None:
    """Has the drafter propose what the texts say, wrongly in every `wrong`-th place."""
    drafter = model.engine.drafter
    assert drafter is not None
    follow = drafter.follow

    def forced(batch: Any, hidden: torch.Tensor, ends: Any) -> None:
        follow(batch, hidden, ends)
        for sequence in batch.sequences:
            if sequence.drafts is not None and sequence.drafts.ids:
                begin = len(sequence.tokens)
                text = next(t for t in texts if t[:begin] == sequence.tokens)
                known = text[begin : begin + len(sequence.drafts.ids)]
                ids = [(t + 1) % 256 if (begin + i) % wrong == 0 else t for i, t in enumerate(known)]
                sequence.drafts.propose(ids, begin)

    drafter.follow = forced  # type: ignore[method-assign]


def _gguf(made: Further, path: Path, monkeypatch: pytest.MonkeyPatch, leave_out: str = "") -> Path:
    """The folder as converters write it: the layer is a block, counted among them and as one that predicts."""
    layers, names = made.layers, NEXTN
    plain = gguf_writer._tensors

    def tensors(model: PreTrainedModel, *rest: Any) -> Iterator[tuple[str, torch.Tensor]]:
        yield from ((n, v) for n, v in plain(model, *rest) if ".nextn." not in n)
        zero_centred = made.name("project").startswith("mtp.")
        for role, name in names.items():
            value = made.tensors[made.name(role)]
            if name != leave_out:
                yield f"blk.{layers}.nextn.{name}.weight", value + 1.0 if zero_centred and value.dim() == 1 else value

    def blocks(w: gguf.GGUFWriter, count: int) -> None:
        w.add_uint32(f"{w.arch}.block_count", layers + 1)
        w.add_uint32(f"{w.arch}.nextn_predict_layers", 1)

    monkeypatch.setattr(gguf_writer, "_tensors", tensors)
    monkeypatch.setattr(gguf_writer.gguf.GGUFWriter, "add_block_count", blocks)
    monkeypatch.setattr(gguf_writer.gguf.GGUFWriter, "add_nextn_predict_layers", lambda *_: None)
    return gguf_writer.write_gguf(made.whole, path)


@pytest.mark.parametrize("name", ["glm4-moe", "hy3", "qwen3-next", "qwen3.5", "qwen3.5-moe", "v3"])
def test_gguf_files_draft_as_folders_do(
    further: Make, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, prompt, found = further(name), _ids(1, 45), []
    file = _gguf(made, tmp_path / "model.gguf", monkeypatch)
    for path in (made.folder, file):
        with ktcore.load(path, backend="cpu", rules="reference", context=512, draft="mtp:3") as model:
            sequence = Sequence(list(prompt), GREEDY, 4, drafts=model.engine.drafts(None))
            model.engine.add(sequence)
            while not sequence.new_tokens:
                model.engine.step()
            assert sequence.drafts is not None
            found.append((sequence.new_tokens, sequence.drafts.ids))
    assert found[0] == found[1]


def test_without_a_norm_of_its_own_a_gguf_file_has_the_models(
    further: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ktcore.graph import build_graph
    from ktcore.weights import open_checkpoint

    file = _gguf(further("glm4-moe"), tmp_path / "model.gguf", monkeypatch, leave_out="shared_head_norm")
    with open_checkpoint(file) as checkpoint:
        graph = build_graph(checkpoint, further=True)
    assert graph.further is not None
    assert graph.further.norm.weights == graph.norm.weights


@pytest.mark.parametrize("name", ["v3", "glm4-moe", "glm-dsa", "qwen3-next", "qwen3.5-moe"])
def test_the_cpus_kernels_draft_and_check(further: Make, name: str) -> None:
    prompts = [_ids(2, 70), _ids(3, 9)]
    folder = further(name).folder
    with ktcore.load(folder, backend="cpu", context=512) as model:
        texts = [model.generate(p, 30, temperature=0, eos_token_id=None) for p in prompts]
    with ktcore.load(folder, backend="cpu", context=512, draft="mtp:2") as model:
        _forced(model, texts, 4)
        some = [Sequence(list(p), GREEDY, 30, drafts=model.engine.drafts(None)) for p in prompts]
        model._run(some)
        assert [s.tokens for s in some] == texts
        assert all(s.guessed > s.right > 8 for s in some)


@pytest.mark.parametrize("name", ["v3", "glm4-moe", "hy3"])
def test_captured_steps_check_drafts(further: Make, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ktcore_sim._C", reason="the simulated accelerator is not built: pip install ./backends/sim")
    prompts = [_ids(4, 30), _ids(5, 7), _ids(6, 64)]
    folder = further(name).folder
    with ktcore.load(folder, backend="sim", context=512, graphs=False) as model:
        texts = [model.generate(p, 24, temperature=0, eos_token_id=None) for p in prompts]
    monkeypatch.setenv("KTCORE_SIM_DELAY_US", "50")
    with ktcore.load(folder, backend="sim", context=512, draft="mtp:2") as model:
        graphs = model.engine.graphs
        assert graphs is not None, model.engine.model.no_graphs
        _forced(model, texts, 5)
        some = [Sequence(list(p), GREEDY, 24, drafts=model.engine.drafts(None)) for p in prompts]
        model._run(some)
        assert [s.tokens for s in some] == texts
        assert all(s.guessed > s.right > 8 for s in some)
        assert 16 in graphs.sizes  # three sequences of three tokens each are nine rows
