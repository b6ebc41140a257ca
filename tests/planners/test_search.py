import numpy as np
import pytest
from checker import assert_valid, ratios
from heats import initial, shapes, shuffled, window, windows, zipf
from hypothesis import given
from hypothesis import strategies as st
from layers import assert_consistent, moved, settled

from flash_eplb.planners.efforts import EFFORTS, effort_of
from flash_eplb.planners.relabel import relabel
from flash_eplb.planners.search import Terms, _worth, measure, search_layers


def search(heat, placement, effort="balanced", **terms):
    """What is found for all layers, and the moves that it says this takes."""
    full = {"price": 0.0, "most_moves": placement[0].size, "scratch": True, "today": True}
    terms.setdefault("far_price", terms.get("price", 0.0))
    effort = EFFORTS[effort] if isinstance(effort, str) else effort
    weights = np.full(len(heat), 1 / len(heat), np.float32)
    layers = np.arange(len(placement))
    terms = Terms(**{**full, "max_columns": 0, "by_source": False, **terms})
    return search_layers(heat.astype(np.float64), weights, placement, layers, effort, terms)


@st.composite
def cases(draw):
    """(heat float64[episodes, layers, experts], today's placement int32)."""
    ranks, slots, experts = draw(shapes(most_slots=80, ranks=(2, 16)))
    heat = draw(windows(2, experts, most_episodes=7)).astype(np.float64)
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    return heat, shuffled(rng, 2, ranks, slots, experts)


@given(
    cases(),
    st.sampled_from(["fast", "balanced", "thorough"]),
    st.sampled_from([0.0, 0.001, 0.05]),
    st.sampled_from([0, 1, 2, 5, 1000]),
    st.booleans(),
    st.booleans(),
)
def test_what_is_found_is_valid_and_worth_its_moves(case, effort, price, most, scratch, today):
    heat, before = case
    terms = {"price": price, "most_moves": most, "scratch": scratch, "today": today}
    found, moves = search(heat, before, effort, **terms)
    assert_valid(found, heat.shape[2])
    worth = ratios(heat, before) - ratios(heat, found)
    for layer in range(len(before)):
        assert moves[layer] == moved(found[layer], before[layer])
        assert moves[layer] <= most
        assert worth[layer] >= price * moves[layer] - 1e-4 * len(before[0])


@given(cases(), st.sampled_from(["fast", "thorough"]), st.sampled_from([0, 3, 1000]))
def test_with_planned_routing_it_is_valid_and_keeps_its_bound(case, effort, most):
    heat, before = case
    found, moves = search(heat, before, effort, most_moves=most, max_columns=1024)
    assert_valid(found, heat.shape[2])
    assert (moves <= most).all()


@pytest.mark.parametrize("terms", [{"scratch": False}, {"today": False}, {}])
@pytest.mark.parametrize("effort", EFFORTS)
def test_each_way_of_searching_wins_most_of_the_excess(effort, terms):
    rng = np.random.default_rng(1)
    heat, today = window(rng, zipf(rng, 2, 64), 6), initial(2, 8, 9, 64)
    found, _ = search(heat, today, effort, **terms)
    assert (ratios(heat, found) - 1 < 0.1 * (ratios(heat, today) - 1)).all()


def test_a_search_from_today_moves_less_than_one_from_scratch():
    rng = np.random.default_rng(2)
    popularity = zipf(rng, 2, 64)
    first, _ = search(window(rng, popularity, 6), initial(2, 8, 9, 64))
    popularity *= np.exp(rng.normal(0, 0.3, popularity.shape))
    heat = window(rng, popularity, 6)
    _, near = search(heat, first, scratch=False, price=0.002)
    _, far = search(heat, first, today=False)
    assert (near < 0.5 * far).all()


def test_few_moves_are_those_that_win_most():
    # Two hot experts share a rank; besides, a small unevenness costs as many moves.
    heat = np.array([[[20, 20, 5, 3, 2, 2]]])
    found, moves = search(heat, np.array([[[0, 1], [2, 3], [4, 5]]], np.int32), most_moves=2)
    assert moves[0] == 2
    assert not {0, 1} <= set(found[0, 0].tolist())


@given(cases())
def test_a_measure_is_the_par(case):
    heat, placement = case
    layers = np.array([1, 0, 1])
    expected = ratios(heat, placement)[layers]
    par, _ = measure(heat, placement[layers], layers)
    np.testing.assert_allclose(par, expected, rtol=1e-5)


@given(cases())
def test_relabelling_brings_shuffled_ranks_home(case):
    _, (today, _) = case
    shuffled_ranks = np.random.default_rng(0).permutation(today)
    relabelled = relabel(shuffled_ranks, today, int(today.max()) + 1)
    assert moved(relabelled, today) == 0
    assert sorted(map(sorted, relabelled.tolist())) == sorted(map(sorted, today.tolist()))


@given(cases())
def test_relabelling_only_permutes_ranks(case):
    _, (today, other) = case
    relabelled = relabel(other, today, int(today.max()) + 1)
    assert sorted(relabelled.tolist()) == sorted(other.tolist())


@given(cases(), st.booleans())
def test_what_a_placement_is_worth_with_columns_leaves_the_layer_as_it_is(case, by_source):
    heat, today = case
    heat = heat[:, 0] / max(heat[:, 0].max(), 1e-300)
    layer = settled(heat, today[0])
    terms = Terms(0.1, 0.1, 1000, True, True, 1024, by_source)
    worth = _worth(layer, terms, 0.1)
    assert_consistent(layer)
    assert worth <= _worth(layer, terms._replace(max_columns=0), 0.1) * (1 + 1e-5) or by_source


@pytest.mark.parametrize("price", [0.01, 0.05])
def test_kicks_keep_to_the_price_of_moves_whatever_was_found_from_scratch(price):
    rng = np.random.default_rng(4)
    for _ in range(150):
        heat, before = window(rng, zipf(rng, 1, 12), 2, 300), shuffled(rng, 1, 4, 4, 12)
        terms = {"price": price, "far_price": 3 * price}
        worth = []
        for kicks in (0, 1):
            effort = EFFORTS["thorough"]._replace(kicks=kicks)
            found, moves = search(heat, before, effort, **terms)
            worth.append(ratios(heat, found)[0] + price * moves[0])
        assert worth[1] <= worth[0] + 1e-3


def test_small_layers_are_kicked_as_often_as_their_episodes_allow():
    kicks = [effort_of("thorough", 64, episodes).kicks for episodes in (1, 64, 256, 1024)]
    assert kicks == [800, 800, 201, 50]
    assert effort_of("thorough", 16, 6).kicks == 800  # what is proven optimal, is found by these
    assert effort_of("balanced", 64, 64).kicks == 2
