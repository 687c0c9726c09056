"""The rule files that ktcore ships, for every family on every backend."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from ktcore.backend import Registry
from ktcore.graph import build_graph
from ktcore.rules.load import load_rules, shipped_rules
from ktcore.rules.resolve import resolve
from ktcore.weights.bare import BareCheckpoint
from tests.parity.models import CONFIGS

from .graphs import FAMILIES, deepseek_v3, llama

BACKENDS = sorted(path.stem for path in shipped_rules().glob("*.yaml") if path.stem != "reference")


@pytest.fixture(scope="module")
def installed() -> Registry:
    return Registry.discover()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_resolves_on_every_backend(installed: Registry, family: str, backend: str) -> None:
    graph = FAMILIES[family]()
    made = resolve(graph, load_rules(family, backend, None, installed), installed, backend)
    where = {name: choice.device for name, choice in made.choices.items()}
    assert where["embed"] == where["sampler"] == "cpu:0"
    assert where["head"] == f"{backend}:0"
    assert all(device == "cpu:0" for name, device in where.items() if name.endswith(".experts"))
    assert all(device == f"{backend}:0" for name, device in where.items() if name.endswith(".attn"))


@pytest.mark.parametrize("model", CONFIGS)
def test_every_model_has_the_rules_of_a_family_whose_operators_it_has(installed: Registry, model: str) -> None:
    config = json.loads(json.dumps(CONFIGS[model]().to_dict()))
    graph = build_graph(BareCheckpoint(Path("config.json"), config))
    made = resolve(graph, load_rules(graph.family, "cpu", None, installed), installed, "cpu")
    assert {layer.attn.name for layer in graph.layers} <= set(made.choices)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_reference_rules_put_everything_on_the_host_in_plain_torch(installed: Registry, family: str) -> None:
    made = resolve(FAMILIES[family](), load_rules(family, "cpu", "reference", installed), installed, "cpu")
    assert {choice.implementation.id.split(".")[0] for choice in made.choices.values()} == {"reference"}
    assert made.devices == ("cpu:0",)


def test_the_host_runs_whole_branches_in_native_code(installed: Registry) -> None:
    made = resolve(llama(), load_rules("llama", "cpu", None, installed), installed, "cpu")
    assert made.choices["layers.0.attn"].implementation.id == "cpu.attention"
    assert made.choices["layers.0.ffn"].implementation.id == "cpu.mlp"
    assert not made.fallbacks


def test_shared_experts_stay_with_the_dense_part(installed: Registry) -> None:
    made = resolve(deepseek_v3(), load_rules("deepseek_v3", "cuda", None, installed), installed, "cuda")
    assert made.choices["layers.1.ffn.shared"].device == "cuda:0"
    assert made.choices["layers.1.ffn.experts"].device == "cpu:0"


@pytest.mark.parametrize("backend", ["cuda", "rocm"])
@pytest.mark.parametrize(
    ("stored", "runs"),
    [("F32", "linear"), ("BF16", "linear"), ("MXFP4", "linear"), ("Q5_1", "linear")]
    + [(f, "w4a16") for f in ("Q4_0", "Q4_1", "INT4_G32", "INT4_G32_ORDERED")]
    + [(f, "w8a16") for f in ("Q8_0", "INT8_G32")],
)
def test_each_format_goes_to_its_product_and_nothing_falls_back(
    installed: Registry, backend: str, stored: str, runs: str
) -> None:
    rules = replace(load_rules("llama", backend, None, installed), strict=True)
    made = resolve(llama(1, stored), rules, installed, backend)
    assert not made.fallbacks
    linears = {c.implementation.id for c in made.choices.values() if c.node.spec.op == "linear" and c.node.layer == 0}
    assert linears == {f"{backend}.{runs}"}
