"""The collector on a real CUDA device or NPU; the README says where this did not run."""

import numpy as np
import pytest
import torch

from flash_eplb.collectors.heat import HeatCollector
from flash_eplb.ipc.heat_ring import HeatRing

KINDS = [kind for kind in ("cuda", "npu") if hasattr(torch, kind)]


@pytest.mark.parametrize("kind", KINDS)
def test_every_token_counted_on_the_device_is_recorded(kind):
    if not getattr(torch, kind).is_available():
        pytest.skip(f"not run: there is no {kind} device here")
    layers, columns, steps = 58, 288, 500
    ring = HeatRing(np.zeros(HeatRing.size(layers, columns, 1024), np.uint8), layers, columns, 1024)
    load = torch.zeros((layers, columns), dtype=torch.int32, device=kind)
    busy = torch.ones((2048, 2048), device=kind)
    collector = HeatCollector(ring, [load])
    for step in range(1, steps + 1):
        busy @ busy  # keeps the device behind its host
        load += step
        collector.collect(step, 1, 0, step // 100)
    getattr(torch, kind).synchronize()
    collector.collect(steps + 1, 0, 0, steps // 100)
    records = ring.read(1024)
    assert (records.heat == records.heat[:, :1, :1]).all()
    covered = 0
    for step, span, heat in zip(
        records.steps.tolist(), records.spans.tolist(), records.heat[:, 0, 0].tolist(), strict=True
    ):
        numbers = range(step - span + 1, min(step, steps) + 1)
        assert heat == sum(numbers)
        covered += span
    assert covered + collector.dropped >= steps
