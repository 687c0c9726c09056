"""Every key of every family's config.json deleted and null: the values of transformers' class, or a refusal by name.

The class itself completes the configuration here, so that no default is written down twice. Graphs are compared, which
need no weights; `test_logits_follow` then holds what changes numbers against transformers' forward pass.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from ktcore.errors import ArchitectureError, CheckpointError
from ktcore.graph import Graph, build_graph
from ktcore.ops import KVCacheSpec
from ktcore.weights import open_checkpoint
from ktcore.weights.bare import BareCheckpoint

from .conftest import Tiny
from .driver import Runner
from .models import CONFIGS

Config = dict[str, Any]
GONE = object()
HEADS = {"num_attention_heads": 96, "hidden_size": 1536}  # any number of key heads that a class assumes divides them
OTHER_FORMS = ("v4", "v4-released")  # test_deepseek_v4.py has the forms of its rotary settings
NOT_OF_THE_GRAPH = {"model_type", "quantization_config", "dtype", "torch_dtype"}
# more than the tiny models of other tests say: settings that only matter beside others
EXTRA: dict[str, tuple[str, Config]] = {
    "mixtral-window": ("mixtral", {"sliding_window": 20}),
    "phi3-window": ("phi3", {"sliding_window": 20}),
    "qwen3-window": ("qwen3", {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 1}),
    "qwen3-moe-window": ("qwen3-moe", {"use_sliding_window": True, "sliding_window": 20}),
    "llama4-layouts": ("llama4-scout", {"no_rope_layers": [1, 0, 1, 0], "layer_types": None}),
    "trained-outside": ("llama-yarn", {"original_max_position_embeddings": 32}),
    "gpt-oss-plain": ("gpt-oss", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}),
}


class Recorded(dict[str, Any]):
    """A config that remembers which of its keys were asked for."""

    asked: ClassVar[set[str]] = set()

    def get(self, key: str, default: Any = None) -> Any:
        self.asked.add(key)
        return super().get(key, default)

    def __contains__(self, key: object) -> bool:
        self.asked.add(str(key))
        return super().__contains__(key)


def _completed(config: Config) -> Config:
    """What transformers' class makes of it; raises what the class raises."""
    known = dict(config, model_type=config["model_type"].replace("kimi_k2", "deepseek_v3"))
    made = CONFIG_MAPPING[known["model_type"]](**copy.deepcopy(known))
    made.standardize_rope_params()  # as every model does when it is made
    return json.loads(json.dumps(made.to_dict())) | {"model_type": config["model_type"]}


def _config(name: str) -> Config:
    base, changes = EXTRA.get(name, (name, {}))
    if base == "glm5-next":  # the class wants as many key heads
        changes = changes | {"num_key_value_heads": HEADS["num_attention_heads"]}
    config: Config = json.loads(json.dumps(CONFIGS[base]().to_dict())) | HEADS | changes
    return _completed(config) | ({"model_type": "kimi_k2"} if base == "kimi-k2" else {})


def _older(config: Config) -> Config:
    """The form that transformers 4 and most of the hub have: the rotary base outside, the rest in `rope_scaling`."""
    if "rope_parameters" not in config:
        return config
    rope = dict(config["rope_parameters"])
    if "rope_type" not in rope:
        pytest.skip("settings by kind of layer have no older form")
    config = {key: value for key, value in config.items() if key != "rope_parameters"}
    for key in ("rope_theta", "partial_rotary_factor"):
        if key in rope:
            config[key] = rope.pop(key)
    return config | {"rope_scaling": None if rope["rope_type"] == "default" else rope}


def _graph(config: Config) -> Graph:
    return build_graph(BareCheckpoint(Path("config.json"), config))


def _facts(graph: Graph) -> list[Any]:
    """All that a graph computes with."""
    nodes = [
        (n.name, n.spec, {role: (ref.shape, ref.sources) for role, ref in n.weights.items()}) for n in graph.walk()
    ]
    return [graph.context_length, graph.vocab, graph.hidden, len(graph.layers), *nodes]


def _changed(config: Config) -> Iterator[tuple[str, str, Config]]:
    """Each key, of the rotary section too, deleted and null: (key, what, configuration)."""
    config = Recorded(config)
    Recorded.asked = set()
    _graph(config)
    section = "rope_parameters" if "rope_parameters" in config else "rope_scaling"
    for key in sorted((set(config) | Recorded.asked) - NOT_OF_THE_GRAPH):
        if key in config:
            yield key, "deleted", {k: v for k, v in config.items() if k != key}
        yield key, "null", dict(config) | {key: None}
    for key in config.get(section) or {}:
        rest = {k: v for k, v in config[section].items() if k != key}
        yield key, "deleted", dict(config) | {section: rest}
        yield key, "null", dict(config) | {section: rest | {key: None}}


@pytest.mark.parametrize("older", [False, True], ids=["rope_parameters", "rope_theta"])
@pytest.mark.parametrize("name", [*(name for name in CONFIGS if name not in OTHER_FORMS), *EXTRA])
def test_a_missing_key_is_the_class_default_or_an_error(name: str, older: bool) -> None:
    config = _older(_config(name)) if older else _config(name)
    wrong = []
    for key, what, changed in _changed(config):
        said = f"{key} {what}"
        try:
            completed: Config | None = _completed(changed)
        except Exception:
            completed = None
        Recorded.asked = set()
        try:
            found = _facts(_graph(Recorded(changed)))
        except (ArchitectureError, CheckpointError) as error:
            if key not in str(error):
                wrong.append(f"{said}: the error does not name it: {error}")
            continue
        if completed is None:
            if key in Recorded.asked:
                wrong.append(f"{said}: transformers refuses it, a graph came out")
            continue
        wanted = _facts(_graph(completed))
        if found != wanted:
            wrong.append(f"{said}: {next((f, w) for f, w in zip(found, wanted, strict=True) if f != w)}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("name", ["qwen2", "qwen3", "qwen2-moe"])
@pytest.mark.parametrize("width", [1, 20])
def test_windows_are_for_the_layers_of_the_class_where_none_are_named(name: str, width: int) -> None:
    deep = {"num_hidden_layers": 30, "use_sliding_window": True, "sliding_window": width, "layer_types": None}
    config = _completed({key: value for key, value in (_config(name) | deep).items() if key != "max_window_layers"})
    kinds = config.pop("layer_types")
    del config["max_window_layers"]
    assert len(set(kinds)) == 2
    specs = [layer.attn.parts["cache"].spec for layer in _graph(config).layers]
    windows = [spec.window for spec in specs if isinstance(spec, KVCacheSpec)]
    assert windows == [width if kind == "sliding_attention" else 0 for kind in kinds]


# (model, key of config.json or of its rotary section -> value): what changes numbers and no shape
NUMBERS: dict[str, tuple[str, Config]] = {
    "Mixtral's base": ("mixtral", {"rope_parameters": GONE}),
    "LLaMA 4's base": ("llama4-scout", {"rope_parameters": GONE}),
    "gpt-oss' YaRN": ("gpt-oss-gguf", {"rope_parameters": GONE}),
    "gpt-oss' base without YaRN": ("gpt-oss-gguf", {"rope_parameters": {"rope_type": "default"}}),
    "gpt-oss' limit": ("gpt-oss", {"swiglu_limit": GONE}),
    "GLM-4's half": ("glm4", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}),
    "GLM-4's epsilon": ("glm4", {"rms_norm_eps": GONE}),
    "GLM-4.5's half": ("glm4-moe", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}),
    "Qwen3-Next's quarter": ("qwen3-next", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}),
    "V2's choice": ("v2-full", {"topk_method": GONE}),
    "V2's scale": ("v2-full", {"routed_scaling_factor": GONE}),
    "V3's scale": ("v3", {"routed_scaling_factor": GONE}),
    "V3 not renormalised": ("v3", {"norm_topk_prob": None}),
    "V3 rotated by halves": ("v3", {"rope_interleave": None}),
    "YaRN's factor from the two contexts": ("llama-yarn", {"factor": None}),
    "YaRN's context outside": ("llama-yarn", {"original_max_position_embeddings": 32}),
    "LLaMA 4 without chunks": ("llama4-scout", {"attention_chunk_size": None, "layer_types": GONE}),
    "LLaMA 4's kinds of mask": ("llama4-scout", {"no_rope_layers": [1, 0, 1, 0]}),
}


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("case", NUMBERS)
def test_logits_follow(case: str, tiny: Callable[[str], Tiny], tmp_path: Path) -> None:
    name, changes = NUMBERS[case]
    t = tiny(name)
    folder = Path(shutil.copytree(t.folder, tmp_path / "m"))
    config = json.loads((folder / "config.json").read_text())
    for key, value in changes.items():
        place = config["rope_parameters"] if key == "factor" else config
        place[key] = value
        if value is GONE:
            del place[key]
    (folder / "config.json").write_text(json.dumps(config))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    try:
        with torch.no_grad():
            want = model(t.ids[None]).logits[0]
    except TypeError:
        pytest.skip("transformers itself cannot run it: 5.17 has no LLaMA 4 without chunks, 5.24 has")
    with open_checkpoint(folder) as checkpoint:
        torch.testing.assert_close(Runner(checkpoint)(t.ids), want, atol=1e-4, rtol=0)
