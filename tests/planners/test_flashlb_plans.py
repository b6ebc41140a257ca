"""What holds for every plan of FlashLB, whatever the shape, the heat and the settings."""

import numpy as np
import pytest
from checker import (
    assert_columns,
    assert_leads,
    assert_measured,
    assert_rounds,
    gains_per_move,
    ratios,
)
from heats import DTYPES, initial, shapes, shuffled, typed, window, windows, zipf
from hypothesis import given, settings
from hypothesis import strategies as st

from flash_eplb.planners.flashlb import FlashLB
from flash_eplb.planners.forecast import forecast
from flash_eplb.planners.memory import MERGED

LIMITS = st.sampled_from([None] * 8 + [0, 1, 2, 3, 5, 20])


@st.composite
def cases(draw, shape):
    """(window, the next one, placement, shape)."""
    ranks, slots, experts = draw(shape)
    layers = draw(st.sampled_from([1, 3]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    placement = shuffled(rng, layers, ranks, slots, experts)
    heats = [draw(windows(layers, experts)) for _ in range(2)]
    return *heats, placement, (ranks, slots, experts)


def wins_on(tokens, every_layer, limits):
    """Whether a plan wins on the heat that is given: one part of a plan may cost balance that the
    next wins back, and where counts are largely chance it is for what is to be expected."""
    tokens = tokens.astype(np.float64)
    is_cut = any(limit is not None for limit in limits)
    return every_layer or not (is_cut or forecast(tokens, tokens[:0], MERGED)[1].any())


def assert_fit(plan, heat, today, most_columns, columns=None, wins=True):
    experts = heat.shape[2]
    assert_leads(plan, today, experts)
    assert_measured(plan, heat, columns, wins)
    for rows in (1, 3):
        assert_rounds(plan, rows, experts)
    if most_columns:
        assert_columns(plan, heat, most_columns)
    else:
        assert (plan.columns == 1).all()


def assert_bounded(plan, moves, layers):
    moves = [most for most in moves if most is not None]
    assert len(plan.moves) <= min(moves, default=np.inf)
    assert layers is None or len(plan.layers) <= layers


@st.composite
def planners(draw, ranks, slots, efforts):
    """(FlashLB, its most columns or 0, its limits of moves and layers)."""
    most = draw(st.sampled_from([0, 0, 0, ranks, 100, 1024]))
    moves, layers = draw(LIMITS), draw(st.sampled_from([None] * 6 + [0, 1, 2]))
    planner = FlashLB(
        ranks,
        slots,
        ranks_per_node=draw(st.sampled_from([None, 1, 2])),
        effort=draw(st.sampled_from(efforts)),
        routing="weighted" if most else "uniform",
        max_columns=most or 1024,
        min_excess=draw(st.sampled_from([0, 0.05])),
        min_gain=draw(st.sampled_from([0, 0.02])),
        move_price=draw(st.sampled_from([0, 0.1])),
        half_life=draw(st.sampled_from([0, 64])),
        max_moves=moves,
        max_layers=layers,
        threads=draw(st.sampled_from([1, 2])),
    )
    return planner, most, moves, layers


def check_two_plans(case, data, efforts):
    heat, later, placement, (ranks, slots, _) = case
    planner, most_columns, moves, layers = data.draw(planners(ranks, slots, efforts))
    columns = None
    for tokens in (heat, later):
        limit, every_layer = data.draw(LIMITS), data.draw(st.booleans())
        plan = planner.plan(tokens, placement, every_layer, limit)
        wins = wins_on(tokens, every_layer, (moves, limit))
        assert_fit(plan, tokens, placement, most_columns, columns, wins)
        assert_bounded(plan, (moves, limit), layers)
        if not most_columns:
            assert (np.diff(gains_per_move(plan)) <= 1e-9).all()
        placement, columns = plan.placement, plan.columns


@given(cases(shapes()), st.data())
@settings(max_examples=250)
def test_plans_of_small_layers_are_valid_and_true(case, data):
    check_two_plans(case, data, ["fast", "balanced", "thorough"])


@given(cases(shapes(most_slots=200, ranks=(5, 24))), st.data())
@settings(max_examples=200)
def test_plans_of_larger_layers_are_valid_and_true(case, data):
    check_two_plans(case, data, ["fast", "balanced", "thorough"])


@pytest.mark.parametrize(
    ("experts", "ranks", "slots"),
    [(1024, 1024, 1), (1024, 1024, 2), (2, 1024, 1), (2, 1024, 2), (256, 64, 5), (1024, 64, 16)],
)
@pytest.mark.parametrize("effort", ["fast", "balanced"])
def test_plans_of_large_layers_are_valid_and_true(experts, ranks, slots, effort):
    rng = np.random.default_rng(1)
    heat = window(rng, zipf(rng, 1, experts), 3)
    placement = shuffled(rng, 1, ranks, slots, experts)
    for routing, most_columns in (("uniform", 0), ("weighted", 1024)):
        planner = FlashLB(ranks, slots, effort=effort, routing=routing, half_life=0)
        plan = planner.plan(heat, placement, every_layer=True)
        assert_fit(plan, heat, placement, most_columns)


def test_two_experts_on_two_ranks_can_but_stay():
    heat = np.array([[[3, 1]], [[1, 3]]])
    assert not FlashLB(2, 1).plan(heat, initial(1, 2, 1, 2), every_layer=True)


def test_every_expert_on_every_rank_is_even():
    rng = np.random.default_rng(2)
    plan = FlashLB(6, 5).plan(window(rng, zipf(rng, 2, 5)), initial(2, 6, 5, 5), every_layer=True)
    assert not plan
    np.testing.assert_allclose(plan.par_before, 1)


def test_without_redundancy_experts_change_places():
    rng = np.random.default_rng(3)
    heat, placement = window(rng, zipf(rng, 1, 64, 0.5)), initial(1, 8, 8, 64)
    plan = FlashLB(8, 8).plan(heat, placement)
    assert_fit(plan, heat, placement, 0)
    assert plan.par_before[0] > 1.2
    assert plan.par_after[0] < 1.1


@pytest.mark.parametrize("routing", ["uniform", "weighted", "by_source"])
@pytest.mark.parametrize(("ranks", "slots", "experts"), [(4, 5, 16), (8, 9, 64), (16, 9, 128)])
def test_a_plan_wins_most_of_the_excess_of_zipf_heat_also_later(ranks, slots, experts, routing):
    rng = np.random.default_rng(4)
    popularity = zipf(rng, 2, experts, 0.8)
    placement = initial(2, ranks, slots, experts)
    plan = FlashLB(ranks, slots, routing=routing).plan(window(rng, popularity), placement)
    later = window(rng, popularity)
    left = ratios(later, plan.placement, plan.columns) - 1
    assert (left < 0.25 * (ratios(later, placement) - 1)).all()


@pytest.mark.parametrize(
    "heat",
    [np.zeros((3, 2, 8)), np.ones((3, 2, 8), np.int64), np.eye(3, 2)[:, :, None] * np.ones(8)],
    ids=["none", "even", "idle episodes"],
)
@pytest.mark.parametrize("every_layer", [False, True])
@pytest.mark.parametrize("routing", ["uniform", "weighted", "by_source"])
def test_heat_with_nothing_to_win_gives_an_empty_plan(heat, every_layer, routing):
    plan = FlashLB(4, 2, routing=routing).plan(heat, initial(2, 4, 2, 8), every_layer=every_layer)
    assert not plan
    assert len(plan.moves) == 0
    assert plan.rounds(1) == []
    np.testing.assert_allclose(plan.par_before, 1)
    np.testing.assert_allclose(plan.par_after, 1)


@pytest.mark.parametrize("every_layer", [False, True])
def test_one_rank_has_nothing_to_win(every_layer):
    heat = np.array([[[5, 1, 1]], [[0, 0, 7]]])
    placement = np.array([[[2, 0, 1]]])
    for routing in ("uniform", "weighted", "by_source"):
        planner = FlashLB(1, 3, routing=routing, min_excess=0, min_gain=0)
        plan = planner.plan(heat, placement, every_layer=every_layer)
        assert not plan
        assert (plan.placement == placement).all()
        np.testing.assert_allclose([plan.par_before, plan.par_after], 1)


@pytest.mark.parametrize("every_layer", [False, True])
def test_no_layers_give_an_empty_plan(every_layer):
    plan = FlashLB(4, 2).plan(np.zeros((3, 0, 8)), np.zeros((0, 4, 2), int), every_layer)
    assert not plan
    assert plan.placement.shape == (0, 4, 2)
    assert len(plan.par_before) == len(plan.moves) == 0


@pytest.mark.parametrize("dtype", [*DTYPES, "uint64", "longdouble", ">i4", ">f8"])
def test_any_real_dtype_gives_the_same_plan(dtype):
    rng = np.random.default_rng(5)
    heat, placement = typed(window(rng, zipf(rng, 1, 16), 8, 100), "uint8", 1), initial(1, 4, 5, 16)
    expected = FlashLB(4, 5).plan(heat.astype(int), placement)
    assert expected
    stored = placement.astype(dtype if np.dtype(dtype).kind in "iu" else "uint16")
    given = heat.astype(dtype)
    given.flags.writeable = stored.flags.writeable = False
    plan = FlashLB(4, 5).plan(given, stored)
    assert (plan.placement == expected.placement).all()


@pytest.mark.parametrize("scale", [1e-323, 1e-310, 1e-300, 0.25, 1e300, 1.9e307])
def test_heat_of_any_magnitude_gives_the_same_plans(scale):
    rng = np.random.default_rng(6)
    first = np.round(9 * rng.random((8, 2, 12)) ** 2)
    later = np.round(9 * rng.random((8, 2, 12)) ** 3)
    placements = []
    for factor in (0.5, scale):  # what is not whole is taken as it is, not as counts
        planner, placement = FlashLB(4, 4), initial(2, 4, 4, 12)
        for heat in (first, later, first[:, :, ::-1]):
            plan = planner.plan(heat * factor, placement)
            assert_measured(plan, heat)
            placement = plan.placement
            placements.append(placement)
    np.testing.assert_array_equal(placements[:3], placements[3:])


@pytest.mark.parametrize("routing", ["weighted", "by_source"])
@pytest.mark.parametrize("episodes", [1, 2, 16])
@pytest.mark.parametrize("tokens", [1000, 10**5])
def test_columns_are_never_worse_than_an_engines_own_however_the_heat_turns(
    routing, episodes, tokens
):
    rng = np.random.default_rng(episodes)
    planner, placement = FlashLB(8, 9, routing=routing), initial(2, 8, 9, 64)
    even = planner._division.initial
    turned = 0
    turns = [zipf(rng, 2, 64, 1.2) for _ in range(4)]
    for number in range(12):
        heat = window(rng, turns[number // 3], episodes, tokens)
        plan = planner.plan(heat, placement, max_moves=0 if number % 2 else None)
        turned += len(plan.rerouted)
        placement = plan.placement
        ours = ratios(heat, placement, plan.columns)
        assert (ours <= ratios(heat, placement, even(placement)) + 1e-4).all()
    assert turned


@pytest.mark.parametrize("routing", ["weighted", "by_source"])
def test_a_way_that_goes_on_with_even_columns_is_measured_with_them(routing):
    for seed in range(12):
        rng = np.random.default_rng(seed)
        planner, placement = FlashLB(4, 4, routing=routing), initial(2, 4, 4, 8)
        turns = [zipf(rng, 2, 8, 1.2) for _ in range(4)]
        for number in range(12):
            heat = window(rng, turns[number // 3], 2, 300)
            plan = planner.plan(heat, placement, max_moves=5)
            placement = plan.placement
            after = ratios(heat, placement, plan.columns)
            np.testing.assert_allclose(plan.par_after, after, rtol=1e-5)
