"""Scales that the experts of a rank share, and that differ between ranks."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from test_worker import Workers

from flash_eplb.eplb.scales import scales_of


@pytest.fixture
def start(session):
    """Start two workers with scales as given; why they do not balance."""
    made = []

    def run(*scales):
        made.append(Workers(session, scales=lambda rank: scales[rank]))
        made[-1].step()
        (reason,) = {worker.refused for worker in made[-1].workers}
        return reason

    yield run
    for group in made:
        group.close()


def test_ranks_with_other_scales_do_not_balance(start):
    assert start({"m: a of MoE layer 0": 1.5}, {"m: a of MoE layer 0": 2.0}).startswith(
        "m: a of MoE layer 0, which the experts of a rank share, is 2 on EP rank 1 and 1.5 on EP "
        "rank 0: experts that move would be computed with another one"
    )


def test_scales_that_are_alike_or_known_on_one_rank_only_are_no_reason(start):
    nothing = float("nan")
    assert start({"a": 1.5, "b": nothing}, {"a": 1.5, "b": nothing, "c": 3.0}) == ""


def test_a_scale_that_an_update_has_made_another_stops_balancing(session):
    scales = [{"a": 1.0}, {"a": 1.0}]
    group = Workers(session, scales=lambda rank: scales[rank])
    group.step()
    group.run(lambda rank: group.workers[rank].begin_update())
    scales[1] = {"a": 2.0}
    group.run(lambda rank: group.workers[rank].end_update())
    assert all(worker.has_stopped for worker in group.workers)
    group.close()


def test_scales_are_named_by_model_layer_and_tensor():
    layer = torch.nn.Module()
    layer.w13_weight = torch.nn.Parameter(torch.rand(4, 3), requires_grad=False)
    layer.w13_input_scale = torch.tensor(0.5)
    model = SimpleNamespace(
        expert_weights=[[layer.w13_weight]], moe_layers=[SimpleNamespace(routed_experts=layer)]
    )
    physical = torch.zeros(1, 8)
    state = SimpleNamespace(model_name="m", model=model, physical_to_logical_map=physical)
    found = scales_of([state], ranks=2)
    assert found == {"m: w13_input_scale of MoE layer 0": 0.5}
