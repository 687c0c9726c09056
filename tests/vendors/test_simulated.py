"""The CUDA, ROCm and XPU backends on the simulated device: their runtimes in the kit, and tiny models token by token.

Stand-ins take the place of the vendors' modules; kernels run in Triton's interpreter. The whole kit takes some 20
minutes a backend: `python tests/vendors/simulate.py --backend cuda -- conformance run --backend cuda`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator

import pytest
import torch

pytest.importorskip("ktcore_sim._C", reason="the simulated accelerator is not built: pip install ./backends/sim")
pytest.importorskip("triton", reason="kernels are interpreted by Triton")

from ktcore_sim.options import SimOptions

import ktcore
from ktcore.backend import Unsupported
from ktcore.conformance.levels import all_cases
from ktcore.conformance.open import open_target
from ktcore.conformance.runner import run_cases
from ktcore.conformance.status import Status
from ktcore.ops.linear import LinearSpec
from tests.parity.conftest import Tiny, tiny  # noqa: F401

from .moving import assert_pages_move
from .simulate import CHIPS, Simulation, simulation

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.timeout(900)]
BACKENDS = ("cuda", "rocm", "xpu")
FULL = os.environ.get("KTCORE_VENDORS_FULL") == "1"
Install = Callable[..., Simulation]


@pytest.fixture
def install() -> Iterator[Install]:
    """install("cuda", delay_us=100): until the test ends."""
    made: list[Simulation] = []

    def run(backend: str, chip: str | None = None, **options: object) -> Simulation:
        made.append(simulation(backend, chip, SimOptions(**options)).install())  # type: ignore[arg-type]
        return made[-1]

    yield run
    for one in made:
        one.undo()


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_runtime_passes_the_kit(backend: str, install: Install) -> None:
    install(backend)
    target = open_target(backend)
    try:
        chosen = [c for c in all_cases() if c.level <= 1 and not c.id.endswith("leak")]
        results = run_cases(target, chosen)
    finally:
        target.close()
    assert [(r.id, r.status, r.reason) for r in results if r.status not in (Status.PASS, Status.NOT_APPLICABLE)] == []
    assert sum(r.status is Status.PASS for r in results) > 40


@pytest.mark.parametrize("chip", [c.name for c in CHIPS])
def test_each_chip_opens_with_its_own_capabilities(chip: str, install: Install) -> None:
    backend = next(c.backend for c in CHIPS if c.name == chip)
    install(backend, chip)
    target = open_target(backend)
    assert chip in target.device.name
    assert target.device.live
    target.close()


# keys and values in float16 turn the odd token of a random model: these are compared by their logits
@pytest.mark.parametrize(
    ("backend", "name"),
    [(b, n) for b in BACKENDS for n in ("qwen3-moe", "qwen3-next", "v3", "v32")]
    if FULL
    else [("cuda", "v3"), ("cuda", "v32"), ("rocm", "qwen3-next"), ("xpu", "v3")],
)
def test_a_tiny_model_with_experts_on_the_host(
    name: str,
    backend: str,
    install: Install,
    tiny: Callable[[str], Tiny],  # noqa: F811
) -> None:
    t = tiny(name)
    install(backend, delay_us=50)
    with ktcore.load(t.folder, backend=backend, context=256) as model:
        answered = {c.implementation.id for c in model.plan.choices.values() if c.device == f"{backend}:0"}
        assert all(i.startswith(f"{backend}.") for i in answered), answered
        assert {c.implementation.id for c in model.plan.choices.values() if c.node.spec.op == "experts"} == {
            "cpu.experts"
        }
        off = (model.logits(t.ids[:24]) - t.logits[:24]).pow(2).mean(1).sqrt() / t.logits.std()
        assert float(off.quantile(0.9)) < 0.02
        assert_pages_move(model)
        if backend == "xpu":
            assert model.engine.model.no_graphs == "xpu:0 has no graphs"
            return
        assert model.engine.graphs is not None, model.engine.model.no_graphs
        captured = model.generate(t.ids[None, :12], max_new_tokens=3, temperature=0)
        assert model.engine.graphs.sizes == (1,)
        model.engine.graphs = None
        assert torch.equal(captured, model.generate(t.ids[None, :12], max_new_tokens=3, temperature=0))
        runtime = next(r for r in model.engine.model.devices.open_runtimes() if r.device.type == "sim")
        assert runtime._module.runtime.fallback_names() == {}  # type: ignore[attr-defined]
        assert runtime._launch.calls > 0  # type: ignore[attr-defined]


# one chip has all formats: the others differ in how a matrix instruction wants its operands
@pytest.mark.parametrize(
    ("backend", "chip", "formats"),
    [("cuda", "sm_90", "Q4_1|Q4_K|Q6_K|INT4.*")]
    + [("rocm", chip, "Q4_1|Q4_K|Q6_K|INT4.*" if FULL else "Q4_K") for chip in ("gfx942", "gfx1100", "gfx1201")],
)
def test_the_packages_own_kernels_pass_the_kits_linear(backend: str, chip: str, formats: str, install: Install) -> None:
    install(backend, chip, delay_us=50)
    target = open_target(backend)
    try:
        # `supports` answers for all three: the kit runs each that takes a format
        chosen = [
            c
            for c in all_cases()
            if re.fullmatch(
                rf"L2\.linear\.({formats})\.7x512x100|L2\.linear\.(company|wrong-width|strided-input)", c.id
            )
        ]
        results = run_cases(target, chosen)
        spec, device = LinearSpec(512, 64, "Q4_K"), target.device
        linears = [i for i in target.implementations if i.spec_type is LinearSpec]
        takers = [i.id for i in linears if not isinstance(i.supports(spec, device), Unsupported)]
    finally:
        target.close()
    assert [(r.id, r.reason) for r in results if r.status is not Status.PASS] == []
    assert len(results) >= 4
    assert takers == [f"{backend}.w4a16", f"{backend}.linear"]


def test_a_stream_that_is_none_is_refused_by_the_driver(install: Install) -> None:
    from ktcore.errors import BackendError

    install("cuda")
    target = open_target("cuda")
    runtime = target.runtime
    with pytest.raises(BackendError, match="cuLaunchHostFunc returned 1"):
        runtime.launch_host(runtime.new_stream(), 0, 0)
    target.close()
