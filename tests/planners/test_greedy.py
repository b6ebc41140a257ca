import subprocess
import sys

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from flash_eplb.ipc.placement import PlacementError
from flash_eplb.planners import greedy
from flash_eplb.planners.greedy import Greedy
from flash_eplb.planners.par import par


def initial(layers, ranks, slots, experts):
    """Physical slot p of each layer holds expert p % experts."""
    layer = (np.arange(ranks * slots) % experts).reshape(ranks, slots)
    return np.stack([layer] * layers).astype(np.int32)


def zipf(rng, layers, experts, skew=1.0):
    """Popularity [layers, experts], each layer in an order of its own."""
    shares = np.stack([rng.permutation(np.arange(1, experts + 1) ** -skew) for _ in range(layers)])
    return shares / shares.sum(axis=1, keepdims=True)


def window(rng, popularity, episodes=32, tokens=20_000):
    return rng.poisson(tokens * popularity, (episodes, *popularity.shape))


def assert_valid(placement, experts):
    for layer in placement.tolist():
        assert {expert for rank in layer for expert in rank} == set(range(experts))
        for rank in layer:
            assert len(set(rank)) == len(rank)


@pytest.mark.parametrize(
    ("experts", "ranks", "slots", "skew"),
    [(256, 32, 9, 1.0), (256, 32, 9, 1.5), (128, 16, 9, 0.8), (64, 8, 9, 1.0), (16, 2, 9, 1.0)],
)
def test_a_plan_wins_most_of_the_excess_of_zipf_heat(experts, ranks, slots, skew):
    rng = np.random.default_rng(1)
    popularity = zipf(rng, 2, experts, skew)
    placement = initial(2, ranks, slots, experts)
    heat, later = window(rng, popularity), window(rng, popularity)
    plan = Greedy(ranks, slots).plan(heat, placement)
    assert sorted(plan.layers.tolist()) == [0, 1]
    np.testing.assert_allclose(plan.par_before, par(heat, placement))
    np.testing.assert_allclose(plan.par_after, par(heat, plan.placement))
    excess = par(later, placement) - 1
    assert (par(later, plan.placement) - 1 < 0.25 * excess).all()


def test_without_redundancy_a_plan_still_wins():
    rng = np.random.default_rng(2)
    heat = window(rng, zipf(rng, 1, 64, 0.5))
    plan = Greedy(8, 8).plan(heat, initial(1, 8, 8, 64))
    assert plan.par_before[0] > 1.2
    assert plan.par_after[0] < 1.1


@st.composite
def cases(draw):
    ranks, slots, layers = draw(st.integers(2, 6)), draw(st.integers(1, 5)), draw(st.integers(1, 3))
    experts = draw(st.integers(max(2, slots), max(2, ranks * slots)))
    assume(ranks * slots >= experts)
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    heat = window(rng, zipf(rng, layers, experts, rng.uniform(0, 3)), draw(st.integers(1, 6)), 500)
    heat[rng.random(heat.shape[:2]) < 0.2] = 0
    placement = rng.permutation(experts)[initial(layers, ranks, slots, experts)]
    return heat, placement, experts


@given(cases(), st.booleans(), st.sampled_from([None, 1, 3]), st.sampled_from([None, 1]))
@settings(deadline=None)
def test_every_plan_is_valid_within_its_limits_and_a_gain(case, every_layer, moves, layers):
    heat, placement, experts = case
    policy = Greedy(*placement.shape[1:], max_moves=moves, max_layers=layers)
    plan = policy.plan(heat, placement, every_layer=every_layer)
    assert_valid(plan.placement, experts)
    assert len(plan.moves) <= (moves or plan.placement.size)
    assert len(plan.layers) <= (layers or len(placement))
    np.testing.assert_allclose(plan.par_after, par(heat, plan.placement))
    least = 0 if every_layer else policy.min_gain
    for layer in plan.layers:
        assert plan.par_before[layer] - plan.par_after[layer] > least * (1 - 1e-9)
    untouched = np.setdiff1d(np.arange(len(placement)), plan.layers)
    assert (plan.placement[untouched] == placement[untouched]).all()


@pytest.mark.parametrize(("episodes", "tokens"), [(64, 20_000), (16, 5_000), (4, 20_000)])
def test_stationary_heat_gives_no_second_plan(episodes, tokens):
    rng = np.random.default_rng(3)
    popularity = zipf(rng, 4, 128)
    policy = Greedy(16, 9)
    plan = policy.plan(window(rng, popularity, episodes, tokens), initial(4, 16, 9, 128))
    assert len(plan.layers) == 4
    for _ in range(6):
        later = policy.plan(window(rng, popularity, episodes, tokens), plan.placement)
        assert not later
        assert (later.placement == plan.placement).all()


def test_a_new_policy_on_stationary_heat_moves_no_weights():
    # A restarted planner has no promises; chance differences must not look like gains to it.
    rng = np.random.default_rng(4)
    popularity = zipf(rng, 4, 128)
    plan = Greedy(16, 9).plan(window(rng, popularity, 16, 5_000), initial(4, 16, 9, 128))
    for _ in range(6):
        assert not Greedy(16, 9).plan(window(rng, popularity, 16, 5_000), plan.placement)


def test_drift_gives_a_second_plan_of_the_layer_that_drifted():
    rng = np.random.default_rng(5)
    popularity = zipf(rng, 3, 128)
    policy = Greedy(16, 9)
    plan = policy.plan(window(rng, popularity), initial(3, 16, 9, 128))
    popularity[1] = rng.permutation(popularity[1])
    again = policy.plan(window(rng, popularity), plan.placement)
    assert again.layers.tolist() == [1]
    assert again.par_after[1] - 1 < 0.25 * (again.par_before[1] - 1)


def test_slow_drift_moves_few_slots():
    rng = np.random.default_rng(6)
    popularity = zipf(rng, 1, 256)
    policy = Greedy(32, 9)
    placement = policy.plan(window(rng, popularity), initial(1, 32, 9, 256)).placement
    shifted = popularity * np.exp(rng.normal(0, 0.2, popularity.shape))
    again = policy.plan(window(rng, shifted / shifted.sum()), placement)
    assert again
    assert len(again.moves) < 0.2 * placement.size


@pytest.fixture
def searched(monkeypatch):
    """The number of layers searched so far."""
    calls = []

    def counting(*arguments):
        calls.append(arguments)
        return search(*arguments)

    search = greedy.search_layer
    monkeypatch.setattr(greedy, "search_layer", counting)
    return calls


def stuck_layer():
    """Heat that no placement without redundancy can even out, and a bad placement of it."""
    heat = np.tile([9, 9, 1, 1, 1, 1, 1, 1], (4, 1, 1))
    return heat, np.array([[[0, 1], [2, 3], [4, 5], [6, 7]]])


def test_a_kept_promise_spares_the_layer_a_search(searched):
    heat, placement = stuck_layer()
    policy = Greedy(4, 2)
    plan = policy.plan(heat, placement)
    assert plan.par_after[0] > 1.5
    searched.clear()
    assert not policy.plan(heat, plan.placement)
    assert searched == []


def test_a_promise_holds_only_for_the_placement_it_was_made_for(searched):
    heat, placement = stuck_layer()
    policy = Greedy(4, 2)
    plan = policy.plan(heat, placement)
    other = plan.placement[:, ::-1].copy()
    searched.clear()
    assert not policy.plan(heat, other)
    assert len(searched) > 0
    searched.clear()
    assert not policy.plan(heat, plan.placement)
    assert len(searched) > 0


def test_a_broken_promise_is_searched_again(searched):
    heat, placement = stuck_layer()
    policy = Greedy(4, 2)
    plan = policy.plan(heat, placement)
    searched.clear()
    worse = heat + np.array([6, 0, 0, 0, 0, 0, 0, 0])
    policy.plan(worse, plan.placement)
    assert len(searched) > 0


def test_every_layer_looks_where_cherry_picking_does_not():
    heat = np.tile([52, 50, 48, 50], (4, 1, 1))
    placement = np.array([[[0, 1], [2, 3]]])
    assert not Greedy(2, 2).plan(heat, placement)
    plan = Greedy(2, 2, move_price=0.0).plan(heat, placement, every_layer=True)
    assert plan.par_after[0] == 1.0


def test_the_layers_that_win_most_per_move_come_first():
    rng = np.random.default_rng(7)
    popularity = zipf(rng, 3, 64)
    popularity[1] = 1 / 64
    heat, placement = window(rng, popularity), initial(3, 8, 9, 64)
    heat[:, 2] = window(rng, zipf(rng, 1, 64, 2.0))[:, 0]
    full = Greedy(8, 9).plan(heat, placement)
    gains = (full.par_before - full.par_after)[full.layers]
    moves = (full.before != full.placement).sum(axis=(1, 2))[full.layers]
    assert len(full.layers) > 1
    assert (np.diff(gains / moves) <= 0).all()
    assert Greedy(8, 9, max_layers=1).plan(heat, placement).layers.tolist() == [full.layers[0]]


def test_plans_of_few_moves_lead_to_balance():
    rng = np.random.default_rng(8)
    heat, placement = window(rng, zipf(rng, 2, 64)), initial(2, 8, 9, 64)
    policy = Greedy(8, 9, max_moves=8)
    first = policy.plan(heat, placement)
    assert 1 <= len(first.moves) <= 8
    for _ in range(20):
        placement = policy.plan(heat, placement).placement
    assert (par(heat, placement) < 1.2).all()


@pytest.mark.parametrize(
    "heat",
    [np.zeros((3, 2, 8)), np.ones((3, 2, 8), np.int64), np.eye(3, 2)[:, :, None] * np.ones(8)],
    ids=["none", "even", "idle episodes"],
)
def test_heat_with_nothing_to_win_gives_an_empty_plan(heat):
    for every_layer in (False, True):
        plan = Greedy(4, 2).plan(heat, initial(2, 4, 2, 8), every_layer=every_layer)
        assert not plan
        assert len(plan.moves) == 0
        assert (plan.par_before == 1.0).all()


def test_no_layers_give_an_empty_plan():
    assert not Greedy(4, 2).plan(np.zeros((3, 0, 8)), np.zeros((0, 4, 2), np.int32))


def test_plans_are_deterministic():
    rng = np.random.default_rng(9)
    heat, placement = window(rng, zipf(rng, 3, 64)), initial(3, 8, 9, 64)
    one, two = (Greedy(8, 9).plan(heat, placement) for _ in range(2))
    assert (one.placement == two.placement).all()
    assert one.layers.tolist() == two.layers.tolist()


@pytest.mark.parametrize(
    "dtype", [np.uint16, np.int32, np.int64, np.uint64, np.float16, np.float32, np.longdouble]
)
def test_any_real_dtype_gives_the_same_plan(dtype):
    rng = np.random.default_rng(10)
    heat, placement = window(rng, zipf(rng, 1, 16), 8, 500), initial(1, 4, 5, 16)
    expected = Greedy(4, 5).plan(heat, placement)
    typed = heat.astype(dtype)
    typed.flags.writeable = placement.flags.writeable = False
    plan = Greedy(4, 5).plan(typed, placement)
    assert expected
    assert (plan.placement == expected.placement).all()


@pytest.mark.parametrize("scale", [1e-310, 1e-300, 1e305])
def test_heat_of_any_magnitude_is_planned(scale):
    heat, placement = stuck_layer()
    plan = Greedy(4, 2).plan(heat * scale, placement)
    assert plan.par_before[0] == pytest.approx(3.0)
    assert plan.par_after[0] < 1.7


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ranks": 1}, "ranks is 1; it must be a whole number of at least 2"),
        ({"ranks": 2.5}, "ranks is 2.5; it must be a whole number of at least 2"),
        ({"slots_per_rank": 0}, "slots_per_rank is 0; it must be a whole number of at least 1"),
        ({"slots_per_rank": True}, "slots_per_rank is True; it must be"),
        ({"max_moves": 0}, "max_moves is 0; it must be a whole number of at least 1"),
        ({"max_layers": -1}, "max_layers is -1; it must be a whole number of at least 1"),
        ({"z": -0.1}, "z is -0.1; it must be a finite number of at least 0"),
        ({"min_excess": float("nan")}, "min_excess is nan; it must be a finite number"),
        ({"min_gain": "1"}, "min_gain is '1'; it must be a finite number"),
        ({"move_price": float("inf")}, "move_price is inf; it must be a finite number"),
        ({"tolerance": None}, "tolerance is None; it must be a finite number"),
    ],
)
def test_settings_out_of_range_are_named(arguments, message):
    with pytest.raises(ValueError) as error:
        Greedy(**{"ranks": 4, "slots_per_rank": 2, **arguments})
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("heat", "message"),
    [
        (np.zeros((2, 8)), "heat is float64 of shape (2, 8); it must be real numbers"),
        (np.zeros((0, 2, 8)), "heat is float64 of shape (0, 2, 8); it must be real numbers"),
        (np.zeros((1, 2, 8), complex), "heat is complex128 of shape (1, 2, 8)"),
        (np.zeros((1, 2, 8), bool), "heat is bool of shape (1, 2, 8)"),
        (np.zeros((1, 2, 8), object), "heat is object of shape (1, 2, 8)"),
        (np.zeros((1, 3, 8)), "placement has shape (2, 4, 2); it must be (3, 4, 2)"),
        (np.zeros((1, 2, 9)), "placement: layer 0: expert 8 has no slot"),
        (np.zeros((1, 2, 7)), "placement: layer 0: rank 3 slot 1 holds expert 7"),
    ],
)
def test_heat_of_the_wrong_form_is_named(heat, message):
    with pytest.raises(ValueError) as error:
        Greedy(4, 2).plan(heat, initial(2, 4, 2, 8))
    assert str(error.value).startswith(message)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, -1.0])
def test_an_unfit_value_of_heat_is_named(value):
    heat = np.ones((3, 2, 8))
    heat[2, 1, 5] = value
    with pytest.raises(ValueError) as error:
        Greedy(4, 2).plan(heat, initial(2, 4, 2, 8))
    assert str(error.value) == f"heat[2, 1, 5] is {value}; it must be finite and at least 0"


def test_an_invalid_placement_is_named():
    placement = initial(2, 4, 2, 8)
    placement[1, 3] = [7, 7]
    with pytest.raises(PlacementError, match="placement: layer 1: expert 7 stands twice on rank 3"):
        Greedy(4, 2).plan(np.ones((3, 2, 8)), placement)
    with pytest.raises(PlacementError, match="placement: placement is float64"):
        Greedy(4, 2).plan(np.ones((3, 2, 8)), placement.astype(float))


def test_a_model_of_another_shape_starts_afresh():
    rng = np.random.default_rng(11)
    policy = Greedy(8, 9)
    for layers, experts in ((2, 64), (3, 64), (3, 60)):
        heat = window(rng, zipf(rng, layers, experts))
        assert policy.plan(heat, initial(layers, 8, 9, experts))


def test_nothing_is_compiled_after_warmup():
    script = """
import numpy as np
from flash_eplb.planners import greedy, par, rounds, search, slots, swaps

modules = (par, rounds, search, slots, swaps)
kernels = {f for module in modules for f in vars(module).values() if hasattr(f, "signatures")}
greedy.warmup()
before = {kernel: len(kernel.signatures) for kernel in kernels}
rng = np.random.default_rng(0)
for dtype in (np.int32, np.int64, np.float32):
    heat = rng.poisson(100 / np.arange(1, 17), (6, 3, 16)).astype(dtype)
    placement = (np.arange(60) % 16).reshape(3, 4, 5).astype(dtype if dtype != np.float32 else int)
    heat.flags.writeable = placement.flags.writeable = False
    plan = greedy.Greedy(4, 5, z=1, max_moves=12).plan(heat, placement)
    assert plan and plan.rounds(2, 2) and len(plan.moves)
after = {kernel: len(kernel.signatures) for kernel in kernels}
assert before == after, {k: k.signatures for k in kernels if before[k] != after[k]}
"""
    subprocess.run([sys.executable, "-c", script], check=True)
