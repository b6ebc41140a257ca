import importlib
import importlib.util
import sys
import types
from pathlib import Path

import numpy as np
import pytest

from flash_eplb.planners.deepseek import DeepSeek, _pack
from flash_eplb.planners.par import par


def initial(layers, ranks, slots, experts):
    layer = (np.arange(ranks * slots) % experts).reshape(ranks, slots)
    return np.stack([layer] * layers).astype(np.int32)


def window(rng, episodes, layers, experts, skew):
    """Counts in which no two experts have the same sum, and float32 holds each sum."""
    shares = np.arange(1, experts + 1) ** -skew
    order = np.stack([rng.permutation(shares / shares.sum()) for _ in range(layers)])
    while True:
        heat = rng.poisson(20_000 * experts * order, (episodes, layers, experts))
        sums = heat.sum(axis=0)
        if sums.max() < 2**24 and all(len(set(layer)) == experts for layer in sums.tolist()):
            return heat


def is_valid(layer, experts):
    return {e for rank in layer for e in rank} == set(range(experts)) and all(
        len(set(rank)) == len(rank) for rank in layer
    )


def test_the_worked_example():
    # 90 tokens get a second replica, 60 tokens not: [50, 45] [60, 45] is the order of placing.
    heat = np.array([[[50, 90, 60]], [[0, 0, 0]]])
    plan = DeepSeek(2, 2).plan(heat, np.array([[[0, 1], [2, 0]]]))
    assert [set(rank) for rank in plan.placement[0].tolist()] == [{2, 1}, {0, 1}]
    assert plan.par_after[0] == pytest.approx((105 / 100 + 1) / 2)


def test_an_expert_gets_no_more_replicas_than_ranks():
    heat = np.array([[[1000, 3, 2, 1, 0]]])
    plan = DeepSeek(3, 3).plan(heat, initial(1, 3, 3, 5))
    assert np.bincount(plan.placement.ravel()).tolist() == [3, 2, 2, 1, 1]
    assert is_valid(plan.placement[0].tolist(), 5)


def test_a_full_rank_takes_an_expert_in_exchange():
    # Of the last two items, both of kind 5, the first pack has room for both, but may hold one. The
    # lightest of the other pack, of kind 4, cannot come in exchange, for the first pack has one.
    weights = np.array([100, 5, 5, 5, 1, 1, 0.5, 0.5])
    kinds = np.array([0, 1, 2, 3, 4, 4, 5, 5])
    packs = kinds[_pack(weights, kinds, 2, 4)]
    assert np.sort(packs.ravel()).tolist() == kinds.tolist()
    assert {0, 4, 5} < set(packs[0])
    assert {4, 5} < set(packs[1])
    assert all(len(set(pack)) == 4 for pack in packs)


def test_groups_stay_together_on_a_node():
    rng = np.random.default_rng(1)
    heat = window(rng, 2, 4, 24, 0.7)
    plan = DeepSeek(6, 5, 3, 8).plan(heat, initial(4, 6, 5, 24))
    split = 0
    for layer in plan.placement:
        assert is_valid(layer.tolist(), 24)
        nodes = [set(layer[rank : rank + 3].ravel() // 3) for rank in (0, 3)]
        assert len(nodes[0]) == len(nodes[1]) == 4
        assert not nodes[0] & nodes[1]
        split += nodes[0] != {0, 1, 2, 3}
    assert split


@pytest.mark.parametrize(
    ("near", "groups"),
    [(None, 8), (6, 8), (3, None), (3, 3), (3, 5), (4, 8)],
    ids=["one node", "all near", "no groups", "not a multiple", "no divisor", "uneven nodes"],
)
def test_it_is_global_where_groups_do_not_divide(near, groups):
    rng = np.random.default_rng(2)
    heat, placement = window(rng, 2, 3, 24, 1.0), initial(3, 6, 5, 24)
    plan = DeepSeek(6, 5, near, groups).plan(heat, placement)
    assert (plan.placement == DeepSeek(6, 5).plan(heat, placement).placement).all()


def test_it_is_global_where_the_last_node_is_smaller():
    heat, placement = window(np.random.default_rng(4), 2, 1, 24, 1.0), initial(1, 8, 5, 24)
    plan = DeepSeek(8, 5, 3, 8).plan(heat, placement)
    assert (plan.placement == DeepSeek(8, 5).plan(heat, placement).placement).all()
    assert (plan.placement != DeepSeek(8, 5, 4, 8).plan(heat, placement).placement).any()


def test_it_is_global_where_a_node_has_fewer_experts_than_a_rank_has_slots():
    heat = np.random.default_rng(3).integers(1, 99, (2, 1, 4))
    plan = DeepSeek(4, 3, 2, 2).plan(heat, initial(1, 4, 3, 4))
    assert is_valid(plan.placement[0].tolist(), 4)


def test_a_loss_is_taken_unless_a_gain_is_asked_for():
    # Heaviest first ends at 6 + 4 + 4 against 6 + 4 + 1; the placement at hand has 13 and 12.
    heat, placement = np.array([[[6, 6, 4, 4, 4, 1]]]), np.array([[[0, 1, 5], [2, 3, 4]]])
    plan = DeepSeek(2, 3).plan(heat, placement)
    assert plan.par_before[0] == pytest.approx(13 / 12.5)
    assert plan.par_after[0] == pytest.approx(14 / 12.5)
    assert not DeepSeek(2, 3, min_gain=0.0).plan(heat, placement)


@pytest.fixture(scope="module")
def theirs():
    """vLLM's default policy, from its file: importing all of vLLM takes long."""
    found = importlib.util.find_spec("vllm")
    if found is None:
        pytest.skip("vLLM is not installed")
    folder = Path(found.submodule_search_locations[0]) / "distributed/eplb/policy"
    package = types.ModuleType("vllm_eplb_policy")
    package.__path__ = [str(folder)]
    sys.modules[package.__name__] = package
    yield importlib.import_module("vllm_eplb_policy.default").DefaultEplbPolicy
    for name in [name for name in sys.modules if name.startswith(package.__name__)]:
        del sys.modules[name]


@pytest.mark.parametrize(
    ("experts", "nodes", "near", "slots", "groups"),
    [
        (256, 4, 8, 9, 8),
        (256, 4, 8, 9, 1),
        (256, 1, 32, 9, 8),
        (128, 2, 8, 9, 4),
        (64, 1, 8, 9, 1),
        (64, 2, 4, 8, 2),
        (64, 1, 64, 1, 1),
        (60, 3, 4, 6, 6),
        (16, 1, 2, 9, 1),
    ],
)
def test_it_has_the_par_of_vllm(theirs, experts, nodes, near, slots, groups):
    import torch

    rng = np.random.default_rng(experts + slots)
    ranks, compared = nodes * near, 0
    for skew in (0.1, 0.2, 0.3, 0.4, 0.6, 0.8):
        heat = window(rng, 4, 3, experts, skew)
        summed = heat.sum(axis=0)
        plan = DeepSeek(ranks, slots, near, groups).plan(heat, initial(3, ranks, slots, experts))
        found = theirs.rebalance_experts(
            torch.tensor(summed), ranks * slots, groups, nodes, ranks
        ).numpy()
        for layer, other in enumerate(found.reshape(3, ranks, slots)):
            if is_valid(other.tolist(), experts):
                compared += 1
                for tokens in (heat[:, layer], summed[None, layer]):
                    ours = par(tokens, plan.placement[layer])
                    assert ours == pytest.approx(par(tokens, other), rel=1e-12)
    assert compared >= 6
