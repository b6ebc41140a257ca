import numpy as np
import pytest
from heats import window, zipf

from flash_eplb.planners.memory import Memory, is_alike, is_other


def episodes(first, last, layers=2, experts=3):
    """Episodes `first` up to `last` of one long recording: all tokens are powers of two."""
    tokens = np.zeros((last - first, layers, experts))
    tokens[:, 0, 0] = 2.0 ** np.arange(first, last)
    tokens[:, 1, 2] = 2.0 ** np.arange(first, last)
    return tokens


def remembered(tokens):
    """The episodes that are in the past, each once, or more often if they are counted twice."""
    total = int(tokens[:, 0, 0].sum())
    np.testing.assert_array_equal(tokens[:, 1, 2].sum(), total)
    return [k for k in range(64) if total >> k & 1]


def test_the_first_window_has_no_past():
    tokens, weights = Memory(64).recall(episodes(0, 8))
    assert tokens.shape == (0, 2, 3)
    assert weights.shape == (0,)


@pytest.mark.parametrize("step", [4, 8])
def test_episodes_of_earlier_windows_are_the_past_once(step):
    memory = Memory(64)
    for start in range(0, 41, step):
        tokens, weights = memory.recall(episodes(start, start + 8))
        assert remembered(tokens) == list(range(start))
        assert len(weights) == len(tokens)
        assert weights.dtype == np.float32


def test_windows_may_grow_shrink_and_stand_still():
    memory = Memory(64)
    for first, last, past in (
        (0, 4, 0),
        (0, 4, 0),
        (0, 12, 0),
        (4, 12, 4),
        (8, 16, 8),
        (16, 40, 16),
    ):
        assert remembered(memory.recall(episodes(first, last))[0]) == list(range(past))


def test_an_episode_counts_half_a_half_life_later():
    memory = Memory(8)
    memory.recall(episodes(0, 16))
    tokens, weights = memory.recall(episodes(16, 24))
    per_episode = weights / [bin(int(block)).count("1") for block in tokens[:, 0, 0]]
    middles = [np.mean(remembered(tokens[i : i + 1])) for i in range(len(tokens))]
    ages = 15.5 - np.array(middles)
    np.testing.assert_allclose(per_episode, 2.0 ** (-ages / 8), rtol=1e-6)


def test_old_episodes_are_forgotten():
    memory = Memory(8)
    for start in range(0, 60, 4):
        tokens, weights = memory.recall(episodes(start, start + 4))
    assert remembered(tokens)[0] > 30
    assert remembered(tokens)[-1] == 55
    assert weights.min() < weights.max() / 2


def test_without_a_half_life_there_is_no_past():
    memory = Memory(0)
    for start in (0, 8, 16):
        tokens, weights = memory.recall(episodes(start, start + 8))
        assert len(tokens) == len(weights) == 0


def test_another_shape_begins_anew():
    memory = Memory(64)
    memory.recall(episodes(0, 8))
    assert len(memory.recall(episodes(8, 16, layers=3))[0]) == 0
    assert remembered(memory.recall(episodes(16, 24, layers=3))[0]) == list(range(8, 16))
    assert len(memory.recall(episodes(24, 32, layers=3, experts=4))[0]) == 0


def test_what_is_erased_of_a_layer_does_not_come_back():
    memory = Memory(64)
    memory.recall(episodes(0, 8))
    memory.recall(episodes(8, 16))
    memory.erase(np.array([True, False]))
    tokens, weights = memory.recall(episodes(16, 24))
    assert len(tokens) == len(weights) == 4
    assert tokens[:, 0, 0].sum() == episodes(8, 16)[:, 0, 0].sum()
    assert tokens[:, 1, 2].sum() == episodes(0, 16)[:, 1, 2].sum()


@pytest.mark.parametrize("count", [4, 16, 128])
def test_other_heat_is_told_from_chance_however_few_tokens_are_past(count):
    rng = np.random.default_rng(0)
    before, after = zipf(rng, 200, 64, 1.2), zipf(rng, 200, 64, 1.2)
    heat = window(rng, after, 64, 100)
    assert not is_other(window(rng, after, count, 100), heat).any()
    assert is_other(window(rng, before, count, 100), heat).mean() > (0.9 if count > 4 else 0)
    assert not is_other(np.zeros((0, 200, 64)), heat).any()


@pytest.mark.parametrize("rise", [0, 2e-4])
def test_an_expert_that_grows_little_by_little_leaves_the_past_behind(rise):
    rng = np.random.default_rng(1)
    share = np.repeat(zipf(rng, 1, 64, 0.4)[None], 192, axis=0)
    share[:, 0, 0] += rise * np.arange(192)
    heat = rng.poisson(10**6 * share).astype(float)
    past, recent = heat[:128].reshape(32, 4, 1, 64).sum(axis=1), heat[128:]
    assert is_alike(past, recent).tolist() == [rise == 0]


def varying(rng, popularity, episodes):
    """Heat of a popularity that is another by some 20% in each episode."""
    return 10**6 * popularity * rng.gamma(20, 1 / 20, (episodes, *popularity.shape))


@pytest.mark.parametrize("seed", range(5))
def test_a_single_episode_of_heat_that_varies_is_told_from_other_heat_by_the_past(seed):
    rng = np.random.default_rng(seed)
    popularity, other = zipf(rng, 3, 256, 0.9), zipf(rng, 3, 256, 0.9)
    memory = Memory(64)
    for episode in varying(rng, popularity, 100):
        past, _ = memory.recall(episode[None])
    assert is_alike(past, varying(rng, popularity, 1)).all()
    for episode in varying(rng, other, 12):  # until much of it is past
        past, _ = memory.recall(episode[None])
        assert not is_alike(past, episode[None]).any()
