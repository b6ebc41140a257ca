"""What holds for each of the plain policies: static, random, deepseek and swap."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flash_eplb.ipc.placement import PlacementError
from flash_eplb.planners.baselines import Random, Static
from flash_eplb.planners.deepseek import DeepSeek
from flash_eplb.planners.swap import Swap

POLICIES = [Static, Random, DeepSeek, Swap]


def initial(layers, ranks, slots, experts):
    """Physical slot p of each layer holds expert p % experts."""
    layer = (np.arange(ranks * slots) % experts).reshape(ranks, slots)
    return np.stack([layer] * layers).astype(np.int32)


def skewed(rng, episodes, layers, experts, skew=1.0, tokens=20_000):
    """Poisson counts of a Zipf popularity; each layer has its own hot experts."""
    shares = np.arange(1, experts + 1) ** -skew
    order = np.stack([rng.permutation(shares / shares.sum()) for _ in range(layers)])
    return rng.poisson(tokens * order, (episodes, layers, experts))


def ratios(heat, placement):
    """PAR of each layer, slot by slot."""
    found = []
    for layer, ranks in enumerate(placement.tolist()):
        counts = np.bincount(np.ravel(ranks), minlength=heat.shape[2])
        per_episode = []
        for tokens in heat[:, layer]:
            loads = [sum(tokens[expert] / counts[expert] for expert in rank) for rank in ranks]
            per_episode.append(max(loads) * len(loads) / sum(loads) if sum(loads) else 1.0)
        found.append(np.mean(per_episode))
    return np.array(found)


def assert_valid(placement, experts):
    for layer in placement.tolist():
        assert {expert for rank in layer for expert in rank} == set(range(experts))
        for rank in layer:
            assert len(set(rank)) == len(rank)


def assert_leads(plan, before, experts):
    """The plan starts from `before`, and its moves end in a valid placement."""
    assert (plan.before == before).all()
    assert_valid(plan.placement, experts)
    carried = before.copy()
    for layer, expert, source_rank, source_slot, rank, slot in plan.moves.tolist():
        assert before[layer, source_rank, source_slot] == expert
        assert expert not in before[layer, rank]
        carried[layer, rank, slot] = expert
    assert (carried == plan.placement).all()
    changed = np.flatnonzero((plan.placement != before).any(axis=(1, 2)))
    assert sorted(plan.layers.tolist()) == changed.tolist()


@st.composite
def cases(draw):
    """(heat, placement) of any small shape, from no redundancy to all experts on all ranks."""
    nodes, near = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    ranks = max(2, nodes * near)
    slots, layers = draw(st.integers(1, 5)), draw(st.integers(1, 3))
    experts = draw(st.integers(max(2, slots), max(2, ranks * slots)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    heat = skewed(rng, draw(st.integers(1, 4)), layers, experts, rng.uniform(0, 3), 500)
    heat[rng.random(heat.shape[:2]) < 0.2] = 0
    placement = rng.permutation(experts)[initial(layers, ranks, slots, experts)]
    return heat, placement.astype(np.int32), draw(st.sampled_from([None, near]))


@pytest.mark.parametrize("policy", POLICIES)
@given(case=cases())
def test_every_plan_is_valid_and_says_what_it_wins(policy, case):
    heat, placement, near = case
    made = policy(*placement.shape[1:], near)
    for _ in range(2):
        plan = made.plan(heat, placement)
        assert_leads(plan, placement, heat.shape[2])
        np.testing.assert_allclose(plan.par_before, ratios(heat, placement))
        np.testing.assert_allclose(plan.par_after, ratios(heat, plan.placement))
        placement = plan.placement


@given(case=cases(), groups=st.integers(1, 6), gain=st.sampled_from([None, 0.0, 0.2]))
def test_deepseek_is_valid_with_groups_and_takes_no_gain_below_the_least(case, groups, gain):
    heat, placement, near = case
    policy = DeepSeek(*placement.shape[1:], near, groups, min_excess=0.1, min_gain=gain)
    plan = policy.plan(heat, placement)
    assert_leads(plan, placement, heat.shape[2])
    assert (plan.par_before[plan.layers] > 1.1).all()
    if gain is not None:
        won = (plan.par_before - plan.par_after)[plan.layers]
        assert (won >= gain).all()
        assert (won > 0).all()


@given(case=cases(), moves=st.sampled_from([None, 0, 2, 3, 6]), gain=st.sampled_from([0.0, 0.1]))
def test_swap_keeps_the_counts_and_its_limits(case, moves, gain):
    heat, placement, near = case
    policy = Swap(*placement.shape[1:], near, max_moves=moves, min_excess=0.1, min_gain=gain)
    plan = policy.plan(heat, placement)
    assert_leads(plan, placement, heat.shape[2])
    assert moves is None or len(plan.moves) <= moves
    for old, new in zip(placement, plan.placement, strict=True):
        assert sorted(old.ravel()) == sorted(new.ravel())
    assert (plan.par_before[plan.layers] > 1.1).all()
    won = (plan.par_before - plan.par_after)[plan.layers]
    assert (won >= gain).all()
    assert (won > 0).all()


@pytest.mark.parametrize("policy", POLICIES)
def test_the_same_calls_give_the_same_plans(policy):
    rng = np.random.default_rng(1)
    windows = [skewed(rng, 8, 3, 64) for _ in range(3)]
    runs = []
    for _ in range(2):
        made, placement, run = policy(8, 9, 4), initial(3, 8, 9, 64), []
        for heat in windows:
            placement = made.plan(heat, placement).placement
            run.append(placement)
        runs.append(np.stack(run))
    assert (runs[0] == runs[1]).all()


def test_random_goes_elsewhere_at_each_plan_and_by_each_seed():
    heat, placement = np.ones((1, 2, 64)), initial(2, 8, 9, 64)
    one, other = Random(8, 9), Random(8, 9, seed=1)
    plans = [policy.plan(heat, placement).placement for policy in (one, one, other)]
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert (plans[a] != plans[b]).mean() > 0.5
    assert (plans[0][0] != plans[0][1]).mean() > 0.5


def test_random_gives_some_experts_more_replicas_than_others_and_none_too_many():
    counts = np.zeros(6, int)
    for seed in range(50):
        plan = Random(3, 4, seed=seed).plan(np.ones((1, 1, 6)), initial(1, 3, 4, 6))
        found = np.bincount(plan.placement.ravel(), minlength=6)
        assert found.min() >= 1
        assert found.max() <= 3
        counts += np.bincount(found, minlength=6)[:6]
    assert (counts[1:4] > 0).all()


def test_static_never_moves():
    rng = np.random.default_rng(2)
    placement = initial(2, 8, 9, 64)
    policy = Static(8, 9)
    for _ in range(3):
        plan = policy.plan(skewed(rng, 4, 2, 64, 2.0), placement)
        assert not plan
        assert (plan.placement == placement).all()
        assert (plan.par_after > 1.5).all()


@pytest.mark.parametrize(("policy", "least"), [(DeepSeek, 0.6), (Swap, 0.85)])
@pytest.mark.parametrize("episodes", [1, 16])
def test_without_redundancy_they_win_most_of_what_there_is(policy, least, episodes):
    rng = np.random.default_rng(3)
    heat, placement = skewed(rng, episodes, 2, 64, 0.5), initial(2, 8, 8, 64)
    plan = policy(8, 8).plan(heat, placement)
    assert_leads(plan, placement, 64)
    won = (plan.par_before - plan.par_after) / (plan.par_before - 1)
    assert (won > least).all()


@pytest.mark.parametrize("policy", [Static, DeepSeek, Swap])
@pytest.mark.parametrize("heat", [np.zeros((3, 2, 8)), np.ones((3, 2, 8), np.int64)])
def test_heat_with_nothing_to_win_moves_nothing(policy, heat):
    plan = policy(4, 2).plan(heat, initial(2, 4, 2, 8))
    assert not plan
    assert (plan.par_after == 1.0).all()


@pytest.mark.parametrize("policy", POLICIES)
def test_one_rank_has_nothing_to_move(policy):
    plan = policy(1, 6).plan(np.arange(6).reshape(1, 1, 6), np.arange(6).reshape(1, 1, 6))
    assert not plan


@pytest.mark.parametrize("policy", [Random, DeepSeek, Swap])
def test_weights_come_from_the_same_node_first(policy):
    rng = np.random.default_rng(5)
    heat, placement = skewed(rng, 4, 1, 32), initial(1, 8, 8, 32)
    near, far = (policy(8, 8, node).plan(heat, placement) for node in (4, None))
    crossing = [(p.moves["rank"] // 4 != p.moves["source_rank"] // 4).mean() for p in (near, far)]
    assert crossing[0] < crossing[1]


def test_random_moves_even_without_heat():
    plan = Random(4, 3).plan(np.zeros((1, 2, 8)), initial(2, 4, 3, 8))
    assert sorted(plan.layers.tolist()) == [0, 1]
    assert_leads(plan, initial(2, 4, 3, 8), 8)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("dtype", [np.uint16, np.int64, np.uint64, np.float32, np.longdouble])
def test_any_real_dtype_gives_the_same_plan_and_no_argument_is_written(policy, dtype):
    rng = np.random.default_rng(4)
    heat, placement = skewed(rng, 4, 2, 16, tokens=500), initial(2, 4, 5, 16)
    expected = policy(4, 5).plan(heat, placement)
    typed = heat.astype(dtype)
    typed.flags.writeable = placement.flags.writeable = False
    plan = policy(4, 5).plan(typed, placement.astype(np.int64))
    assert (plan.placement == expected.placement).all()
    plan = policy(4, 5).plan(np.asfortranarray(typed), np.asfortranarray(placement))
    assert (plan.placement == expected.placement).all()


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("scale", [1e-310, 1e305])
def test_heat_of_any_magnitude_is_planned(policy, scale):
    heat = np.tile([9.0, 9, 1, 1, 1, 1, 1, 1], (400, 1, 1)) * scale
    plan = policy(4, 2).plan(heat, np.array([[[0, 1], [2, 3], [4, 5], [6, 7]]]))
    assert plan.par_before[0] == pytest.approx(3.0)
    if policy in (DeepSeek, Swap):
        assert plan.par_after[0] < 1.7


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ranks": 0}, "ranks is 0; it must be a whole number of at least 1"),
        ({"ranks": 2.5}, "ranks is 2.5; it must be a whole number of at least 1"),
        ({"slots_per_rank": 0}, "slots_per_rank is 0; it must be a whole number of at least 1"),
        ({"slots_per_rank": True}, "slots_per_rank is True; it must be"),
        ({"ranks_per_node": 0}, "ranks_per_node is 0; it must be a whole number of at least 1"),
    ],
)
def test_a_shape_out_of_range_is_named(policy, arguments, message):
    with pytest.raises(ValueError) as error:
        policy(**{"ranks": 4, "slots_per_rank": 2, **arguments})
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("policy", "arguments", "message"),
    [
        (Random, {"seed": -1}, "seed is -1; it must be a whole number of at least 0"),
        (DeepSeek, {"groups": 0}, "groups is 0; it must be a whole number of at least 1"),
        (DeepSeek, {"min_excess": -1}, "min_excess is -1; it must be a finite number"),
        (DeepSeek, {"min_gain": np.nan}, "min_gain is nan; it must be a finite number"),
        (Swap, {"max_moves": -1}, "max_moves is -1; it must be a whole number of at least 0"),
        (Swap, {"max_moves": 1}, "max_moves is 1; swap moves two experts at once: give 2 or more"),
        (Swap, {"min_excess": "1"}, "min_excess is '1'; it must be a finite number"),
        (Swap, {"min_gain": np.inf}, "min_gain is inf; it must be a finite number"),
    ],
)
def test_a_setting_out_of_range_is_named(policy, arguments, message):
    with pytest.raises(ValueError) as error:
        policy(4, 2, **arguments)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(
    ("heat", "message"),
    [
        (np.zeros((2, 8)), "heat is float64 of shape (2, 8); it must be real numbers"),
        (np.zeros((0, 2, 8)), "heat is float64 of shape (0, 2, 8); it must be real numbers"),
        (np.zeros((1, 2, 8), complex), "heat is complex128 of shape (1, 2, 8)"),
        (np.zeros((1, 2, 8), bool), "heat is bool of shape (1, 2, 8)"),
        (np.full((1, 2, 8), np.nan), "heat[0, 0, 0] is nan; it must be finite and at least 0"),
        (np.full((1, 2, 8), np.inf), "heat[0, 0, 0] is inf; it must be finite and at least 0"),
        (np.full((1, 2, 8), -1), "heat[0, 0, 0] is -1; it must be finite and at least 0"),
        (np.full((1, 2, 8), np.longdouble("1e400")), "heat[0, 0, 0] is inf; it must be finite"),
        (np.zeros((1, 3, 8)), "placement has shape (2, 4, 2); it must be (3, 4, 2)"),
        (np.zeros((1, 2, 9)), "placement: layer 0: expert 8 has no slot"),
        (np.zeros((1, 2, 7)), "placement: layer 0: rank 3 slot 1 holds expert 7"),
    ],
)
def test_unfit_heat_is_named(policy, heat, message):
    with pytest.raises(ValueError) as error:
        policy(4, 2).plan(heat, initial(2, 4, 2, 8))
    assert str(error.value).startswith(message)


@pytest.mark.parametrize("policy", POLICIES)
def test_an_invalid_placement_is_named(policy):
    placement = initial(2, 4, 2, 8)
    placement[1, 3] = [7, 7]
    with pytest.raises(PlacementError, match="placement: layer 1: expert 7 stands twice on rank 3"):
        policy(4, 2).plan(np.ones((3, 2, 8)), placement)
    with pytest.raises(PlacementError, match="placement: placement is float64"):
        policy(4, 2).plan(np.ones((3, 2, 8)), placement.astype(float))


def test_nothing_is_compiled_after_warmup():
    script = """
import numpy as np
from flash_eplb.planners import baselines, deepseek, guard, par, rounds, slots, swap

modules = (baselines, deepseek, par, rounds, slots, swap)
kernels = {f for module in modules for f in vars(module).values() if hasattr(f, "signatures")}
for module in (baselines, deepseek, guard, swap):
    module.warmup()
before = {kernel: len(kernel.signatures) for kernel in kernels}
assert any(before.values())
rng = np.random.default_rng(0)
made = baselines.Static, baselines.Random, deepseek.DeepSeek, swap.Swap
for dtype in (np.int32, np.int64, np.float32):
    heat = rng.poisson(100 / np.arange(1, 17), (6, 3, 16)).astype(dtype)
    placement = (np.arange(60) % 16).reshape(3, 4, 5).astype(dtype if dtype != np.float32 else int)
    heat.flags.writeable = placement.flags.writeable = False
    for policy in made:
        plan = policy(4, 5, 2).plan(heat, placement)
        guard.Guard(policy(4, 5, 2)).propose(heat, placement, 2)
        assert len(plan.moves) == sum(len(part.moves) for part in plan.rounds(2))
after = {kernel: len(kernel.signatures) for kernel in kernels}
assert before == after, {k: k.signatures for k in kernels if before[k] != after[k]}
"""
    subprocess.run([sys.executable, "-c", script], check=True)
