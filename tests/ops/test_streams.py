"""Residual streams beside the modules of transformers 5.24."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers.models.deepseek_v4 import modeling_deepseek_v4 as v4
from transformers.models.qwen4_exp import modeling_qwen4_exp as qwen

from ktcore.backend.reference.streams import _GatedStreams
from ktcore.ops import GatedStreamsSpec, HyperConnectionSpec, LinearSpec
from ktcore.ops.streams import connection_weights, entered, left

HIDDEN, STREAMS = 24, 4


def drawn(module: torch.nn.Module) -> torch.nn.Module:
    torch.manual_seed(5)
    for p in module.parameters():
        torch.nn.init.normal_(p, std=0.4)
    return module


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(7, STREAMS * HIDDEN, generator=torch.Generator().manual_seed(3))


def config(**more: Any) -> Any:
    return SimpleNamespace(
        hc_mult=STREAMS, hidden_size=HIDDEN, hc_sinkhorn_iters=5, hc_eps=1e-3, rms_norm_eps=1e-4, **more
    )


def test_hyper_connections_are_those_of_deepseek_v4(x: torch.Tensor) -> None:
    theirs: Any = drawn(v4.DeepseekV4HyperConnection(config()))
    spec = HyperConnectionSpec(HIDDEN, STREAMS, 1e-3, 1e-4, 5)
    y = torch.randn(7, HIDDEN, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        post, mix, inside = theirs(x.view(1, 7, STREAMS, HIDDEN))
        ours = connection_weights(spec, x, theirs.fn, theirs.base, theirs.scale)
        torch.testing.assert_close(entered(x, ours[0]), inside[0])
        # as the decoder layer of transformers puts it
        after = post.unsqueeze(-1) * y[None, :, None] + mix.transpose(-1, -2) @ x.view(1, 7, STREAMS, HIDDEN)
        torch.testing.assert_close(left(x, y, *ours[1:]), after[0].flatten(1))


def test_the_end_is_that_of_deepseek_v4(x: torch.Tensor) -> None:
    theirs: Any = drawn(v4.DeepseekV4HyperHead(config()))
    spec = HyperConnectionSpec(HIDDEN, STREAMS, 1e-3, 1e-4, 0, leave="")
    with torch.no_grad():
        (pre,) = connection_weights(spec, x, theirs.hc_fn, theirs.hc_base, theirs.hc_scale)
        torch.testing.assert_close(entered(x, pre), theirs(x.view(1, 7, STREAMS, HIDDEN))[0])


def test_gated_streams_are_those_of_qwen(x: torch.Tensor) -> None:
    theirs: Any = drawn(qwen.Qwen4ExpTextGatedResidual(config(hc_count=STREAMS, hc_lowrank=6)))
    wide = STREAMS * HIDDEN
    spec = GatedStreamsSpec(
        HIDDEN,
        STREAMS,
        1e-4,
        LinearSpec(wide, 6, "F32"),
        LinearSpec(6, wide, "F32"),
        LinearSpec(wide, STREAMS, "F32"),
        1.0,
    )
    request: Any = SimpleNamespace(
        spec=spec,
        children={
            "down": theirs.input_mix_weight_down, "up": theirs.input_mix_weight_up, "inject": theirs.block_inject_weight
        },
        weights={"norm": SimpleNamespace(tensor=lambda: theirs.hc_norm.weight.detach())},
        runtime=SimpleNamespace(device=torch.device("cpu")),
    )  # fmt: skip
    with torch.no_grad():
        ours = _GatedStreams(request)
        inside, carry = ours.enter(x)
        theirs_inside, _, inject = theirs(x[None])
        torch.testing.assert_close(inside, theirs_inside[0])
        torch.testing.assert_close(carry, inject[0])
