"""What is expected of the next window, where the counts of an episode are largely chance."""

import numpy as np
import pytest
from heats import window, zipf

from flash_eplb.planners.forecast import FEWEST, forecast, mostly_chance

NONE = np.empty((0, 1, 64))


def shares(heat):
    """Each expert's share of the tokens of all episodes, of layer 0."""
    return heat[:, 0].sum(axis=0) / heat[:, 0].sum()


def far(heat, popularity):
    """How far the shares of `heat` are from `popularity`."""
    return np.abs(shares(heat) - popularity).sum()


def drifting(rng, episodes, change, tokens=4000):
    """Poisson counts of a popularity that walks; and the popularity after it."""
    popularity, rows = zipf(rng, 1, 64), []
    for _ in range(episodes):
        popularity = popularity * np.exp(rng.normal(0, change, popularity.shape))
        popularity /= popularity.sum()
        rows.append(rng.poisson(tokens * popularity))
    return np.array(rows, float), popularity[0]


def test_chance_is_taken_out_of_counts():
    rng = np.random.default_rng(1)
    heat = window(rng, zipf(rng, 1, 64), 64, 4000).astype(float)
    expected, error = forecast(heat, NONE, 4)
    np.testing.assert_allclose(expected.sum(axis=0), heat.sum(axis=0), rtol=0.003)
    assert (expected.std(axis=0) < 0.35 * heat.std(axis=0)).all()
    assert error[0] == pytest.approx(1 / np.sqrt(heat.sum()), rel=0.01)


@pytest.mark.parametrize("seed", range(5))
def test_shares_that_drift_are_carried_to_the_end_of_the_window(seed):
    heat, popularity = drifting(np.random.default_rng(seed), 64, 0.02)
    expected, error = forecast(heat, NONE, 4)
    assert far(expected, popularity) < 0.9 * far(heat, popularity)
    assert error[0] > 1 / np.sqrt(heat.sum())  # fewer episodes tell of it


@pytest.mark.parametrize("seed", range(5))
def test_what_varies_by_more_than_chance_is_no_drift(seed):
    rng = np.random.default_rng(seed)
    popularity = zipf(rng, 1, 64, 0.6) * rng.gamma(20, 1 / 20, (64, 1, 64))
    heat = rng.poisson(1500 * popularity).astype(float)
    expected, error = forecast(heat, NONE, 4)
    varies = (heat / heat.sum(axis=2, keepdims=True)).var(axis=0, ddof=1).sum()
    assert error[0] == pytest.approx(np.sqrt(varies / 64), rel=0.1)
    np.testing.assert_allclose(shares(expected), shares(heat), atol=0.002)


@pytest.mark.parametrize("seed", range(5))
def test_the_past_counts_where_nothing_drifts(seed):
    rng = np.random.default_rng(seed)
    popularity = zipf(rng, 1, 64)
    heat, past = (window(rng, popularity, n, 2000).astype(float) for n in (16, 160))
    sums = past.reshape(40, 4, 1, 64).sum(axis=1)
    known, error = forecast(heat, sums, 4)
    alone, more = forecast(heat, NONE, 4)
    assert far(known, popularity[0]) < 0.6 * far(alone, popularity[0])
    assert error[0] == pytest.approx(1 / np.sqrt(heat.sum() + past.sum()), rel=0.02)
    assert more[0] > error[0]
    none, same = forecast(heat, np.zeros_like(sums), 4)
    np.testing.assert_allclose(none, alone)
    assert same == more


def mixed(rng, few, many, popularity, other):
    """64 Poisson episodes of `few` tokens; every eighth of `many` and of the `other` popularity."""
    heat = window(rng, popularity, 64, few)
    heat[::8] = window(rng, other, 8, many)
    return heat.astype(float)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("few", "many"), [(60, 40_000), (500, 16_000)])
def test_episodes_of_many_tokens_tell_more_than_those_of_few(seed, few, many):
    rng = np.random.default_rng(seed)
    popularity = zipf(rng, 1, 64, 0.5)
    heat = mixed(rng, few, many, popularity, popularity)
    expected, error = forecast(heat, NONE, 4)
    alike = (heat / heat.sum(axis=2, keepdims=True)).mean(axis=0)[0]
    assert far(expected, popularity[0]) < 0.6 * np.abs(alike - popularity[0]).sum()
    assert error[0] < 0.7 * np.sqrt((1 / heat.sum(axis=2)).mean() / len(heat))


@pytest.mark.parametrize("seed", range(5))
def test_episodes_of_many_tokens_and_other_experts_are_not_all_that_counts(seed):
    rng = np.random.default_rng(seed)
    popularity, other = zipf(rng, 2, 64, 0.5)[:, None]
    expected, _ = forecast(mixed(rng, 200, 16_000, popularity, other), NONE, 4)
    mean = (popularity * 7 + other) / 8
    assert far(expected, mean[0]) < 0.1


def test_each_layer_is_judged_by_itself():
    rng = np.random.default_rng(2)
    popularity = zipf(rng, 3, 64)
    heat = window(rng, popularity, 32, 4000).astype(float)
    heat[:, 1] = rng.poisson(10**6 * popularity[1] * rng.gamma(4, 1 / 4, (32, 64)))  # no chance
    heat[5, 2] = 0  # an episode without tokens
    expected, error = forecast(heat, np.empty((0, 3, 64)), 4)
    assert (error > 0).tolist() == [True, False, False]
    assert (expected[:, 1:] == heat[:, 1:]).all()
    assert (expected[:, 0] != heat[:, 0]).any()


@pytest.mark.parametrize(
    "heat",
    [
        np.random.default_rng(3).poisson(50, (32, 1, 64)) / 2,
        np.tile(np.arange(64.0), (32, 1, 1)),
        np.zeros((32, 1, 64)),
    ],
    ids=["no counts", "always the same", "no tokens"],
)
def test_what_chance_does_not_explain_is_left_as_it_is(heat):
    expected, error = forecast(heat, NONE, 4)
    assert expected is heat
    assert error.tolist() == [0]


def test_of_few_episodes_nothing_is_known_but_what_chance_may_do():
    heat = np.random.default_rng(3).poisson(50, (FEWEST - 1, 2, 64)).astype(float)
    heat[:, 1] /= 2
    expected, error = forecast(heat, np.empty((0, 2, 64)), 4)
    assert expected is heat
    assert error[0] == pytest.approx((64 * 50 * len(heat)) ** -0.5, rel=0.1)
    assert error[1] == 0


def test_what_drifts_is_mostly_chance_from_episode_to_episode_and_what_varies_is_not():
    rng = np.random.default_rng(4)
    drift = drifting(rng, 64, 0.02)[0]
    varying = rng.poisson(drift * rng.gamma(8, 1 / 8, drift.shape)).astype(float)
    heat = np.concatenate([drift, varying, np.zeros_like(drift)], axis=1)
    assert mostly_chance(heat).tolist() == [True, False, True]
