import numpy as np
import pytest
from checker import ratios
from heats import shapes, shuffled, windows
from hypothesis import given
from hypothesis import strategies as st

from flash_eplb.planners.routing import weigh_layer


def weighed(heat, placement, most=1024, layer=0, by_source=False):
    """(planned columns of one layer, the PAR they are said to reach)."""
    placement = np.ascontiguousarray(placement, np.int32)
    columns = np.full(placement.shape, -7, np.int16)
    par = weigh_layer(heat.astype(np.float64), layer, placement, most, by_source, columns)
    return columns, par


@given(st.data())
def test_columns_keep_to_their_bound_and_are_no_worse_than_uniform(data):
    ranks, slots, experts = data.draw(shapes())
    heat = data.draw(windows(2, experts, most_episodes=20)).astype(np.float64)
    placement = shuffled(np.random.default_rng(0), 2, ranks, slots, experts)
    most = data.draw(st.sampled_from([ranks, ranks + 1, 2 * ranks, 50, 1024, 32767]))
    for layer in range(2):
        columns, par = weighed(heat, placement[layer], most, layer)
        assert columns.min() >= 1
        assert np.bincount(placement[layer].ravel(), columns.ravel()).max() <= most
        tokens, here = heat[:, layer, None], placement[layer, None]
        assert par == pytest.approx(ratios(tokens, here, columns[None])[0], rel=1e-5)
        assert par <= ratios(tokens, here)[0] * (1 + 1e-6)
        if experts == ranks * slots:
            assert (columns == 1).all()


REPAIRABLE = np.array([[[4, 4, 0]]] * 3), np.array([[0, 1], [0, 2]])
"""PAR 1.5 with uniform routing; 1 if all of expert 0 goes to the rank of expert 2."""


@pytest.mark.parametrize(("most", "reached"), [(2, 1.5), (8, 1.25), (64, 1.04), (1024, 1.003)])
def test_more_columns_divide_tokens_finer(most, reached):
    columns, par = weighed(*REPAIRABLE, most)
    assert par <= reached
    assert columns[0, 0] <= columns[1, 0]


def test_columns_make_up_for_a_stale_placement():
    rng = np.random.default_rng(1)
    heat = rng.poisson(1000 * rng.dirichlet(np.ones(8)), (16, 1, 8))
    placement = shuffled(rng, 1, 4, 6, 8)
    _, par = weighed(heat, placement[0])
    assert par - 1 < 0.3 * (ratios(heat, placement)[0] - 1)


def test_what_columns_cannot_improve_stays_uniform():
    even = np.ones((3, 1, 4))
    columns, par = weighed(even, [[0, 1], [2, 3], [0, 2], [1, 3]])
    assert par == pytest.approx(1)
    assert (columns == 1).all()
    for heat in (np.zeros((2, 1, 4)), np.array([[[1e-310, 0, 0, 0]]])):
        columns, par = weighed(heat, [[0, 1], [2, 3]])
        assert (columns == 1).all()
        assert par == pytest.approx(2 if heat.any() else 1)


def test_one_rank_needs_no_columns():
    columns, par = weighed(np.array([[[3, 1]]]), [[1, 0]])
    assert par == pytest.approx(1)
    assert columns.tolist() == [[1, 1]]


@given(st.data())
def test_by_source_every_rank_sends_to_one_replica_of_each_expert(data):
    ranks, slots, experts = data.draw(shapes())
    heat = data.draw(windows(2, experts, most_episodes=20)).astype(np.float64)
    placement = shuffled(np.random.default_rng(0), 2, ranks, slots, experts)
    for layer in range(2):
        columns, par = weighed(heat, placement[layer], layer=layer, by_source=True)
        replicas = np.bincount(placement[layer].ravel(), minlength=experts)
        senders = np.bincount(placement[layer].ravel(), columns.ravel(), experts)
        assert columns.min() >= 1
        np.testing.assert_array_equal(senders, np.where(replicas > 1, ranks, 1))
        tokens, here = heat[:, layer, None], placement[layer, None]
        assert par == pytest.approx(ratios(tokens, here, columns[None])[0], rel=1e-5)
        even = even_senders(placement[layer], ranks)
        assert par <= ratios(tokens, here, even[None])[0] * (1 + 1e-6)


def even_senders(placement, ranks):
    """int16[R, S]: each replica gets ranks // count senders, the first ones one more."""
    columns = np.ones(placement.shape, np.int16)
    for expert in np.unique(placement):
        held = np.argwhere(placement == expert)
        if len(held) > 1:
            for turn, place in enumerate(held):
                columns[tuple(place)] = ranks // len(held) + (turn < ranks % len(held))
    return columns


def test_senders_go_to_the_replica_on_the_idler_rank():
    # 8 ranks send to two replicas of expert 0, one of them beside a hot expert.
    placement = np.array([[0, 1], [0, 2], [3, 4], [5, 6], [7, 8], [9, 10], [11, 12], [13, 14]])
    heat = np.full((4, 1, 15), 100.0)
    heat[:, 0, 0], heat[:, 0, 1] = 800, 700
    columns, par = weighed(heat, placement, by_source=True)
    assert columns[0, 0] == 1
    assert columns[1, 0] == 7
    even = ratios(heat, placement[None], even_senders(placement, 8)[None])[0]
    assert par < 0.75 * even
