"""The hand-off on the simulated accelerator: captured graphs replay it, and two outstanding blocks keep apart."""

from __future__ import annotations

import pytest
import torch

from ktcore.backend.runtime import HostCallbackMode
from ktcore.engine.experts.handoff import HandOff

pytest.importorskip("ktcore_sim._C", reason="the simulated accelerator is not built: pip install ./backends/sim")

from ktcore_cpu.backend import CpuRuntime
from ktcore_sim.options import SimOptions
from ktcore_sim.runtime import SimRuntime

HIDDEN, TOP_K = 16, 2


def _weighted(x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return x * (ids * weights).sum(-1, keepdim=True)


@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("seed", range(5))
def test_a_captured_hand_off_computes_anew_at_every_replay(tokens: int, seed: int) -> None:
    runtime = SimRuntime(0, SimOptions(host_callback=HostCallbackMode.CAPTURABLE, seed=seed, delay_us=100.0))
    lane = CpuRuntime(1).new_lane()
    stream = runtime.new_stream()
    hand_off = HandOff(_weighted, runtime, stream, lane, HIDDEN, TOP_K, tokens)
    with runtime.use_stream(stream):
        x = torch.zeros(tokens, HIDDEN).to(runtime.device)
        ids = torch.zeros(tokens, TOP_K, dtype=torch.int64).to(runtime.device)
        weights = torch.zeros(tokens, TOP_K).to(runtime.device)
        result: list[torch.Tensor] = []
        graph = runtime.capture(stream, lambda: result.append(hand_off(x, ids, weights)))
        tickets = hand_off.take_over()
        for _ in range(6):
            fresh = (torch.randn(tokens, HIDDEN), torch.randint(0, 9, (tokens, TOP_K)), torch.rand(tokens, TOP_K))
            for buffer, value in zip((x, ids, weights), fresh, strict=True):
                buffer.copy_(value)
            graph.replay(stream)
            runtime.synchronize(stream)
            assert [ticket.job.error for ticket in tickets if ticket.job.error] == []
            torch.testing.assert_close(result[0].cpu(), _weighted(*fresh))
    lane.close()
    runtime.close()


@pytest.mark.parametrize("mode", ["none", "eager", "capturable"])
def test_two_outstanding_blocks_keep_apart(mode: str) -> None:
    runtime = SimRuntime(0, SimOptions(host_callback=HostCallbackMode(mode), seed=3, delay_us=200.0))
    lane = CpuRuntime(1).new_lane()
    stream = runtime.new_stream()
    hand_off = HandOff(_weighted, runtime, stream, lane, HIDDEN, TOP_K, 4)
    with runtime.use_stream(stream):
        for _ in range(20):
            host = [(torch.randn(4, HIDDEN), torch.randint(0, 9, (4, TOP_K)), torch.rand(4, TOP_K)) for _ in range(2)]
            blocks = [[t.to(runtime.device) for t in block] for block in host]
            tickets = [hand_off.submit(*block) for block in blocks]
            outs = [hand_off.wait(ticket).cpu() for ticket in tickets]
            hand_off.check()
            for out, block in zip(outs, host, strict=True):
                torch.testing.assert_close(out, _weighted(*block))
    lane.close()
    runtime.close()
