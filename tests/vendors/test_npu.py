"""The NPU backend on the simulated device, over stand-ins of torch_npu: operators, runtime, hand-off, whole models.

The whole kit takes some two minutes: `python tests/vendors/simulate.py --backend npu -- conformance run --backend npu`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from fnmatch import fnmatchcase
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("ktcore_sim._C", reason="the simulated accelerator is not built: pip install ./backends/sim")
pytest.importorskip("triton", reason="other vendors' kernels are interpreted by Triton")

from ktcore_npu.devices import DECLARED, live
from ktcore_npu.operators import implementations
from ktcore_npu.operators.linear import NpuLinear, unpack_int4
from ktcore_npu.operators.moe import gating
from ktcore_npu.runtime import NpuRuntime
from ktcore_sim.options import SimOptions
from ktcore_sim.runtime import SimRuntime

import ktcore
from ktcore.backend import GraphMode, HostCallbackMode, Unsupported
from ktcore.backend.handles import answer
from ktcore.conformance.levels import all_cases
from ktcore.conformance.open import open_target
from ktcore.conformance.runner import run_cases
from ktcore.conformance.status import Status
from ktcore.errors import BackendError
from ktcore.ops import EmbeddingSpec, ExpertsSpec, KVCacheSpec, LinearSpec, RopeSpec, RouterSpec
from tests.parity.conftest import Tiny, tiny  # noqa: F401
from tests.vendors.moving import assert_pages_move
from tests.vendors.npu_checks import NZ, Refused
from tests.vendors.npu_standin import TorchNpu, npu_vendor
from tests.vendors.simulate import CHIPS, Simulation

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.timeout(600)]
CHIP = next(c for c in CHIPS if c.backend == "npu")
QUEUED = {"TASK_QUEUE_ENABLE": "1"}
A2 = DECLARED[0]
CHOSEN = (
    "L1.*",
    "L2.embedding.one-token",
    "L2.linear.Q?_?.one-token",
    "L2.linear.BF16.one-token",
    "L2.linear.F8_E4M3.one-token",
    "L2.linear.company",
    "L2.linear.strided-input",
    "L2.rms_norm.*",
    "L2.rope.*.64-of-192",
    "L2.kv_cache.?*.*-heads-*",
    "L2.kv_cache.*.reused-pages",
    "L2.kv_cache.*.one-token",
    "L2.attention.9-heads-3-groups-dim-64",
    "L2.attention.page-edges",
    "L2.mla.16-heads",
    "L2.mla.page-edges",
    "L3.mla.no-positions",
    "L2.mla.ragged",
    "L2.mla.split-up",
    "L2.mlp.bare",
    "L2.router.*",
    "L2.experts.masked",
    "L2.experts.BF16*",
    "L2.experts.Q4_0*",
    "L2.experts.one-token",
    "L2.moe.one-token",
    "L3.mlp.*",
)
Install = Callable[..., Simulation]


@pytest.fixture
def install() -> Iterator[Install]:
    """install(environment, delay_us=100): until the test ends."""
    made: list[Simulation] = []

    def run(environment: dict[str, str] | None = None, **options: object) -> Simulation:
        chip = CHIP if environment is None else replace(CHIP, environment=tuple(environment.items()))
        made.append(Simulation(chip, SimOptions(**options)).install())  # type: ignore[arg-type]
        return made[-1]

    yield run
    for one in made:
        one.undo()


@pytest.fixture
def opened() -> Iterator[Callable[..., NpuRuntime]]:
    """opened(environment): a runtime over the stand-ins."""
    made: list[SimRuntime] = []

    def run(environment: dict[str, str], change: Callable[[Any], None] = lambda vendor: None) -> NpuRuntime:
        made.append(SimRuntime(0, SimOptions()))
        vendor = npu_vendor(made[-1], CHIP.properties, environment)
        change(vendor)
        return NpuRuntime(0, vendor)

    yield run
    for one in made:
        one.close()


def test_runtime_and_operators_pass_the_kit(install: Install) -> None:
    install()
    target = open_target("npu")
    ids = [c.id for c in all_cases()]
    assert [p for p in CHOSEN if not any(fnmatchcase(i, p) for i in ids)] == []
    try:
        chosen = [c for c in all_cases() if any(fnmatchcase(c.id, p) for p in CHOSEN) and not c.id.endswith("leak")]
        results = run_cases(target, chosen)
    finally:
        target.close()
    assert [(r.id, r.status, r.reason) for r in results if r.status not in (Status.PASS, Status.NOT_APPLICABLE)] == []
    assert sum(r.status is Status.PASS for r in results) > 110


def test_larger_tiles_are_no_concern_of_operators_that_are_not_interpreted(install: Install) -> None:
    install().large_tiles()
    target = open_target("npu")
    chosen = [c for c in all_cases() if c.id in ("L2.linear.Q4_0.one-token", "L2.router.top-1")]
    try:
        results = run_cases(target, chosen)
    finally:
        target.close()
    assert [r.status for r in results] == [Status.PASS] * 2


@pytest.mark.parametrize("environment", [None, QUEUED], ids=["acl", "queued"])
def test_host_functions_and_graphs_pass_the_kit_either_way(environment: Any, install: Install) -> None:
    install(environment, delay_us=100)
    target = open_target("npu")
    try:
        assert target.runtime.host_callback is HostCallbackMode.CAPTURABLE
        results = run_cases(target, [c for c in all_cases() if c.id.startswith("L1.launch.")])
        acl = target.runtime._acl  # type: ignore[attr-defined]
        calls = target.runtime.module.host_calls if environment else acl.calls  # type: ignore[attr-defined]
        assert calls > 0
        assert (acl is None) == bool(environment)
    finally:
        target.close()
    assert [(r.id, r.reason) for r in results if r.status not in (Status.PASS, Status.NOT_APPLICABLE)] == []


@pytest.mark.parametrize(
    ("name", "environment"), [("llama", None), ("qwen3-moe", None), ("qwen3-moe", QUEUED), ("v3", None)]
)
def test_a_tiny_model_token_by_token(
    name: str,
    environment: dict[str, str] | None,
    install: Install,
    tiny: Callable[[str], Tiny],  # noqa: F811
) -> None:
    t = tiny(name)
    install(environment, delay_us=50)
    with ktcore.load(t.folder, backend="npu", context=256) as model:
        answered = {c.implementation.id for c in model.plan.choices.values() if c.device == "npu:0"}
        assert all(i.startswith("npu.") for i in answered), answered
        experts = {c.implementation.id for c in model.plan.choices.values() if c.node.spec.op == "experts"}
        assert experts == (set() if name == "llama" else {"cpu.experts"})
        off = (model.logits(t.ids[:40]) - t.logits[:40]).pow(2).mean(1).sqrt() / t.logits.std()
        assert float(off.quantile(0.9)) < 0.02
        assert_pages_move(model)
        assert model.engine.graphs is not None, model.engine.model.no_graphs
        prompts = t.ids[None, :12]
        captured = model.generate(prompts, max_new_tokens=6, temperature=0)
        assert model.engine.graphs.sizes == (1,)
        runtime: Any = next(r for r in model.engine.model.devices.open_runtimes() if r.device.type == "sim")
        assert runtime.module.updates > 0, "lengths were not exchanged"
        model.engine.graphs = None
        assert torch.equal(captured, model.generate(prompts, max_new_tokens=6, temperature=0))
        assert torch.equal(captured, t.generated(prompts, 6))
        assert runtime.module.runtime.fallback_names() == {}


def test_experts_resident_on_the_device(install: Install, tiny: Callable[[str], Tiny], tmp_path: Any) -> None:  # noqa: F811
    t = tiny("qwen3-moe")
    install()
    rules = tmp_path / "own.yaml"
    rules.write_text(
        "version: 1\nrules:\n  - {name: resident, match: {op: experts}, use: [npu.experts], device: accelerator}\n"
    )
    with ktcore.load(t.folder, backend="npu", rules=rules, context=256) as model:
        assert {c.implementation.id for c in model.plan.choices.values() if c.node.spec.op == "experts"} == {
            "npu.experts"
        }
        off = (model.logits(t.ids[:24]) - t.logits[:24]).pow(2).mean(1).sqrt() / t.logits.std()
        assert float(off.quantile(0.9)) < 0.02


def test_graphs_are_refused_where_torch_npu_refuses_them(opened: Callable[..., NpuRuntime]) -> None:
    assert opened({}).graph is GraphMode.CAPTURE_UPDATE
    for environment, reason in (
        ({"TASK_QUEUE_ENABLE": "2"}, "TASK_QUEUE_ENABLE is 2"),
        ({"PYTORCH_NPU_ALLOC_CONF": "pin_memory_expandable_segments:True"}, "expandable_segments"),
    ):
        runtime = opened(environment)
        assert runtime.graph is GraphMode.NONE
        with pytest.raises(NotImplementedError, match=reason):
            runtime.capture(runtime.new_stream(), lambda: None)


def test_the_mode_of_callbacks_follows_what_there_is(opened: Callable[..., NpuRuntime]) -> None:
    def without_acl(vendor: Any) -> None:
        vendor.acl().__dict__.clear()

    def without_both(vendor: Any) -> None:
        without_acl(vendor)
        vendor.module.__class__ = type("Old", (vendor.module.__class__,), {"_launch_host_func": property()})

    assert opened({"TASK_QUEUE_ENABLE": "0"})._acl is not None
    assert opened({"TASK_QUEUE_ENABLE": "0"}, without_acl).host_callback is HostCallbackMode.CAPTURABLE
    none = opened({"TASK_QUEUE_ENABLE": "0"}, without_both)
    assert none.host_callback is HostCallbackMode.NONE
    with pytest.raises(NotImplementedError):
        none.launch_host(none.new_stream(), 0, 0)
    failing = opened({"TASK_QUEUE_ENABLE": "0"})
    with pytest.raises(BackendError, match="aclrtLaunchHostFunc returned 1"):
        failing.launch_host(failing.new_stream(), 0, 0)


def test_reports_are_given_back_at_the_end(opened: Callable[..., NpuRuntime]) -> None:
    runtime = opened(QUEUED)
    stream, other = runtime.new_stream(), runtime.new_stream()
    from ctypes import CFUNCTYPE, c_void_p, cast

    seen: list[int | None] = []
    function = CFUNCTYPE(None, c_void_p)(seen.append)
    for where in (stream, other, stream):
        runtime.launch_host(where, cast(function, c_void_p).value or 0, 7)
    runtime.synchronize()
    assert seen == [7, 7, 7]
    assert len(runtime.module.reports) == 2
    runtime.close()
    assert runtime.module.reports == []


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        (KVCacheSpec("gqa", 8, 2, 256, 256), "heads of 256"),
        (KVCacheSpec("gqa", 512, 128, 128, 128), "at most 256"),
        (KVCacheSpec("gqa", 128, 1, 128, 128), "64 a key head"),
        (KVCacheSpec("gqa", 8, 2, 64, 64, window=128), "handle window"),
        (KVCacheSpec("mla", 16, 1, 1088, 1024), "at most 512"),
        (KVCacheSpec("mla", 160, 1, 576, 512), "at most 128"),
        (RopeSpec(896, 1e4, "half"), "below 896"),
        (ExpertsSpec(64, 32, 2048, 4, "silu", "BF16", "BF16", "BF16"), "takes 1024 groups"),
        (ExpertsSpec(64, 32, 16, 4, "silu", "BF16", "BF16", "BF16", bias=True), "handle bias"),
        (ExpertsSpec(64, 40000, 16, 4, "silu", "BF16", "BF16", "BF16"), "80000"),
        (LinearSpec(64, 64, "NONE"), "is unknown"),
    ],
    ids=lambda v: v if isinstance(v, str) else type(v).__name__,
)
def test_what_the_documents_exclude_is_refused_with_the_reason(spec: Any, reason: str) -> None:
    found = [answer(i, spec, A2) for i in implementations() if i.spec_type is type(spec)]
    assert len(found) == 1
    assert isinstance(found[0], Unsupported)
    assert reason in found[0].reason


def test_other_chips_are_refused() -> None:
    answer = next(i for i in implementations() if i.spec_type is EmbeddingSpec).supports(
        EmbeddingSpec(8, 8, "BF16"), live("Ascend310P3", 24)
    )
    assert isinstance(answer, Unsupported)
    assert "Ascend310P3" in answer.reason


@pytest.mark.parametrize(
    ("fmt", "bytes_a_value"), [("INT4_G128", 0.5), ("Q4_0", 0.5), ("INT8_G64", 1), ("F8_E4M3", 2), ("Q4_K", 2)]
)
def test_planned_bytes_say_what_stays_quantised(fmt: str, bytes_a_value: float) -> None:
    planned = NpuLinear().packed_bytes(LinearSpec(1024, 512, fmt), 1)
    assert bytes_a_value <= planned / (1024 * 512) < bytes_a_value + 0.13


@pytest.mark.parametrize(
    ("changes", "operator"),
    [
        ({}, "npu_moe_gating_top_k_softmax"),
        ({"score": "sigmoid", "choice_bias": True, "renormalise": True}, "npu_moe_gating_top_k"),
        ({"groups": 8, "groups_kept": 3}, "npu_moe_gating_top_k"),
        ({"score": "sigmoid"}, None),
        ({"on_logits": True}, None),
        ({"groups": 128, "groups_kept": 64}, None),
    ],
)
def test_which_operator_routes(changes: dict[str, Any], operator: str | None) -> None:
    assert gating(RouterSpec(64, 256, 8, "F32", **changes)) == operator


def standin() -> TorchNpu:
    """Operators that are refused before they run need no device."""
    return TorchNpu(SimpleNamespace(capturing=False))  # type: ignore[arg-type]


def test_int4_words_hold_eight_values_the_first_in_the_lowest_bits() -> None:
    codes = torch.arange(-8, 8).repeat(3, 1)
    packed = standin().npu_convert_weight_to_int4pack(codes.int().contiguous())
    # 0x...: -8 is 8 in two's complement, then 9, a .. f, and 0 .. 7
    assert packed[0].tolist() == [0xFEDCBA98 - (1 << 32), 0x76543210]
    assert torch.equal(unpack_int4(packed), codes.to(torch.int8))


def test_the_stand_ins_refuse_what_the_vendor_refuses() -> None:
    ops, half = standin(), torch.bfloat16
    x, weight = torch.zeros(2, 64, dtype=half), torch.zeros(64, 16, dtype=torch.int8)
    scale = torch.ones(2, 16, dtype=half)
    with pytest.raises(Refused, match="group size 64 for K 64"):
        ops.npu_weight_quant_batchmatmul(x, weight, scale[:1], antiquant_group_size=64)
    with pytest.raises(Refused, match="NZ weights"):
        ops.npu_weight_quant_batchmatmul(x, ops.npu_format_cast(weight, NZ), scale, antiquant_group_size=32)
    with pytest.raises(Refused, match=r"antiquant_scale is torch\.float32"):
        ops.npu_weight_quant_batchmatmul(x, weight, scale.float(), antiquant_group_size=32)
    with pytest.raises(Refused, match=r"values outside of -8\.\.7"):
        ops.npu_convert_weight_to_int4pack(torch.full((4, 8), 9, dtype=torch.int32))
    with pytest.raises(Refused, match="below 1000"):
        wide = torch.zeros(1, 2, 1000, 8)
        ops.npu_rotary_mul(wide, wide[:, :, :1], wide[:, :, :1], rotary_mode="interleave")
    with pytest.raises(Refused, match="a mode that there is not"):
        ops.npu_moe_gating_top_k(torch.zeros(2, 8), 2, renorm=1)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"num_heads": 12}, "12 heads"),
        ({"block_size": 24}, "pages of 24"),
        ({"actual_seq_lengths": [17]}, "17 query tokens"),
        ({"sparse_mode": 2}, "sparse mode 2"),
        ({"atten_mask": torch.zeros(17, 17, dtype=torch.bool)}, "atten_mask has shape"),
        ({"actual_seq_lengths_kv": (40,)}, "list of int"),
        ({"actual_seq_lengths_kv": [400]}, "more keys than"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_latent_attention_refuses_what_the_vendor_refuses(changes: dict[str, Any], reason: str) -> None:
    heads = changes.get("num_heads", 16)
    half, page = torch.bfloat16, changes.get("block_size", 128)
    tokens = changes.get("actual_seq_lengths", [16])[-1]
    cache = torch.zeros(2, 1, page, 512, dtype=half)
    given: dict[str, Any] = {
        "query_rope": torch.zeros(tokens, heads, 64, dtype=half),
        "key_rope": torch.zeros(2, 1, page, 64, dtype=half),
        "atten_mask": torch.ones(2048, 2048, dtype=torch.bool).triu(1),
        "block_table": torch.zeros(1, 2, dtype=torch.int32),
        "actual_seq_lengths": [16],
        "actual_seq_lengths_kv": [40],
        "num_heads": heads,
        "num_key_value_heads": 1,
        "block_size": page,
        "sparse_mode": 3,
        "input_layout": "TND",
        "scale": 0.1,
    }
    query = torch.zeros(tokens, heads, 512, dtype=half)
    with pytest.raises(Refused, match=reason):
        standin().npu_fused_infer_attention_score(query, cache, cache, **(given | changes))
