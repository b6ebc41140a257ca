import numpy as np
import pytest
from checker import ratios
from heats import shapes, shuffled, windows
from hypothesis import given
from hypothesis import strategies as st

from flash_eplb.planners.scale import peaks_of, scale_heat, without_bursts


@given(st.data())
def test_scaled_heat_gives_the_par_of_the_busy_episodes(data):
    ranks, slots, experts = data.draw(shapes())
    heat = data.draw(windows(2, experts)).astype(np.float64)
    placement = shuffled(np.random.default_rng(0), 2, ranks, slots, experts)
    for layer in range(2):
        scaled, idle = scale_heat(heat, layer, ranks)
        busy = heat[:, layer].any(axis=1)
        assert idle == (~busy).sum()
        np.testing.assert_allclose(scaled.sum(axis=1), ranks * busy, rtol=1e-5)
        expected = ratios(heat, placement)[layer] * len(heat)
        assert peaks_of(scaled, placement[layer]).sum() + idle == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("scale", [5e-324, 1e-310, 1e-300, 1e300, 1e308])
def test_heat_of_any_magnitude_is_scaled_alike(scale):
    heat = np.zeros((3, 1, 40))
    heat[0, 0, ::4], heat[2, 0, 7] = scale, scale
    scaled, idle = scale_heat(heat, 0, 20)
    assert idle == 1
    np.testing.assert_allclose(scaled[0], [2, 0, 0, 0] * 10, rtol=1e-6)
    np.testing.assert_allclose(scaled[1:], [[0] * 40, [0] * 7 + [20] + [0] * 32], rtol=1e-6)


def even_weights(episodes):
    return np.full(episodes, 1 / episodes, np.float32)


@given(st.data())
def test_the_sum_of_each_episode_is_its_weight(data):
    _, _, experts = data.draw(shapes())
    heat = data.draw(windows(1, experts)).astype(np.float64)
    scaled, _ = scale_heat(heat, 0, 4)
    weights = np.linspace(0.1, 2, len(heat)).astype(np.float32)
    without = without_bursts(scaled, weights)
    np.testing.assert_allclose(without.sum(axis=1), weights * scaled.sum(axis=1), rtol=1e-4)
    assert (without >= 0).all()


def test_a_burst_counts_less():
    scaled = np.ones((32, 8), np.float32)
    scaled[:, 3] += np.linspace(-0.1, 0.1, 32)
    before = scaled.copy()
    scaled[5, 3] = 40
    heat = without_bursts(scaled, np.ones(32, np.float32))
    share, counted = scaled[5, 3] / scaled[5].sum(), heat[5, 3] / heat[5].sum()
    usual = before[5, 3] / before[5].sum()
    assert usual < counted < 0.9 * share
    np.testing.assert_allclose(np.delete(heat, 5, axis=0), np.delete(scaled, 5, axis=0), rtol=1e-5)


def test_an_expert_that_is_hot_for_long_is_no_burst():
    scaled = np.ones((32, 8), np.float32)
    scaled[10:26, 3] = 6
    heat = without_bursts(scaled, even_weights(32))
    np.testing.assert_allclose(heat, scaled / 32, rtol=1e-5)


def test_a_few_episodes_tell_no_burst():
    scaled = np.ones((7, 4), np.float32)
    scaled[2, 1] = 50
    np.testing.assert_allclose(without_bursts(scaled, even_weights(7)), scaled / 7, rtol=1e-5)
