"""The small engine by itself, and a group of it whose experts are moved at random."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from flash_eplb.loaders.copies import Copies
from flash_eplb.loaders.moe_engine import MoeEngine, MoeShape, run_alone

GROUP = Path(__file__).with_name("moe_group.py")
SHAPE = MoeShape(layers=4, experts=6, ranks=1, slots=9)


def batch(seed, rows=20, shape=SHAPE):
    random = torch.Generator().manual_seed(seed)
    return torch.randint(-8, 9, (rows, shape.hidden), generator=random).float()


@pytest.mark.parametrize("rows", [0, 1, 33])
def test_one_rank_gives_what_the_model_gives(rows):
    engine, skew = MoeEngine(SHAPE, 0), torch.zeros(SHAPE.experts)
    tokens = batch(1, rows)
    out = engine.forward(tokens, skew)
    assert torch.equal(out, run_alone(SHAPE, tokens, skew))
    assert engine.loads[0].sum(1).tolist() == [SHAPE.top_k * rows] * SHAPE.layers


def test_outputs_do_not_depend_on_the_batch_they_are_computed_in():
    skew = torch.zeros(SHAPE.experts)
    tokens = batch(2)
    whole = run_alone(SHAPE, tokens, skew)
    assert torch.equal(whole[7:9], run_alone(SHAPE, tokens[7:9], skew))


def test_weights_that_do_not_belong_to_their_slot_change_the_outputs():
    engine, skew = MoeEngine(SHAPE, 0), torch.zeros(SHAPE.experts)
    tokens = batch(3)
    expected = run_alone(SHAPE, tokens, skew)
    for layer in range(SHAPE.layers):
        for tensor in engine.weights[layer]:
            kept = tensor.clone()
            tensor[:] = kept[torch.randperm(len(kept), generator=torch.Generator().manual_seed(1))]
            assert not torch.equal(engine.forward(tokens, skew), expected)
            tensor[:] = kept


def test_skewed_tokens_make_an_expert_hot():
    engine, skew = MoeEngine(SHAPE, 0), torch.zeros(SHAPE.experts)
    skew[2] = 1000
    engine.forward(batch(4), skew)
    slots = np.flatnonzero(engine.placement[0, 0] == 2)
    assert engine.loads[0][0, slots].sum() == 20


def test_routing_follows_the_columns():
    shape = MoeShape(layers=1, experts=2, ranks=1, slots=4, top_k=1)
    engine, skew = MoeEngine(shape, 0), torch.tensor([1e6, 0.0])
    columns = np.array([[[3, 1, 1, 1]]])
    Copies(*engine.tables(np.array([0]), engine.placement, columns)).run()
    tokens = batch(5, 4000, shape)
    assert torch.equal(engine.forward(tokens, skew), run_alone(shape, tokens, skew))
    load = engine.loads[0][0]
    assert load.sum() == load[0] + load[2] == 4000
    assert 0.74 < load[0] / 4000 < 0.76


@pytest.mark.soak
@pytest.mark.parametrize(
    ("rows", "plans", "moves"), [(1, (1, 30), 60), (2, (1, 70), 90), (8, (3, 130), 120)]
)
def test_any_plans_are_committed_right_within_any_budget(session, amount, rows, plans, moves):
    """Eight ranks, twelve layers, 64 experts, transfers and votes delayed at random."""
    number = amount(*plans)
    run = subprocess.run(
        [sys.executable, GROUP, session, str(number), str(rows), str(moves), "7"],
        capture_output=True,
        text=True,
        timeout=amount(240, 7200),
    )
    assert run.returncode == 0, run.stderr[-5000:]
    figures = json.loads(run.stdout)
    print(figures)
    assert figures["moved"] == figures["counted"] >= 0.8 * number * moves
    assert figures["most_rows"] <= rows
    assert figures["aborted"] == 0
    assert figures["commits"] >= figures["moved"] / rows / 8
    assert figures["compared"] > 0
