"""Layers under search, and what must be true of their arrays."""

import numpy as np
from heats import shapes, zipf
from hypothesis import strategies as st

from flash_eplb.planners.layer import new_layer, settle


def settled(heat, placement, home=None):
    """The layer of heat [episodes, experts] on int[ranks, slots], which is `home` by default."""
    heat = np.ascontiguousarray(heat, np.float32)
    placement = np.ascontiguousarray(placement, np.int32)
    home = held_by(placement if home is None else home, heat.shape[1])
    layer = new_layer(heat, home, *placement.shape)
    settle(layer, placement)
    return layer


def held_by(placement, experts):
    """int8[ranks, experts], 1 where a rank holds an expert."""
    held = np.zeros((len(placement), experts), np.int8)
    held[np.arange(len(placement))[:, None], placement] = 1
    return held


def loads(heat, placement):
    """float64[ranks, episodes], from nothing but the arguments."""
    shares = np.asarray(heat, np.float64) / np.bincount(
        np.ravel(placement), minlength=heat.shape[1]
    )
    return shares.T[placement].sum(axis=1)


def peaks(heat, placement):
    """The highest load of each episode, added up."""
    return loads(heat, placement).max(axis=0).sum()


def moved(placement, home):
    """Slots whose expert is not on the rank at `home`."""
    return sum(
        expert not in there
        for rank, there in zip(placement.tolist(), home.tolist(), strict=True)
        for expert in rank
    )


def assert_consistent(layer):
    """All arrays of the layer are those of its placement."""
    heat, placement = layer.by_episode, layer.placement
    counts = np.bincount(placement.ravel(), minlength=heat.shape[1])
    assert (layer.counts == counts).all()
    assert (layer.held == held_by(placement, heat.shape[1])).all()
    np.testing.assert_allclose(layer.share, 1 / counts, rtol=1e-6)
    expected = loads(heat, placement)
    np.testing.assert_allclose(layer.loads, expected, rtol=1e-4, atol=1e-5)
    highest = -np.sort(-layer.loads, axis=0)[:3]
    assert (layer.top[: len(highest)] == highest).all()
    for place, t in np.ndindex(*highest.shape):
        assert layer.loads[layer.at[place, t], t] == layer.top[place, t]
    assert all(len(set(ranks)) == len(ranks) for ranks in layer.at[: len(highest)].T.tolist())


@st.composite
def cases(draw, most_slots=40):
    """(heat float32[episodes, experts] of PAR per episode, today's placement int32)."""
    ranks, slots, experts = draw(shapes(most_slots))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    popularity = zipf(rng, 1, experts, draw(st.sampled_from([0, 0.5, 1, 2])))[0]
    episodes = draw(st.integers(1, 20))
    heat = rng.poisson(draw(st.sampled_from([3, 300, 10_000])) * popularity, (episodes, experts))
    heat[rng.random(episodes) < 0.2] = 0
    scaled = heat * ranks / np.maximum(1, heat.sum(axis=1, keepdims=True)) / episodes
    placement = (np.arange(ranks * slots) % experts).reshape(ranks, slots)
    return scaled.astype(np.float32), rng.permutation(experts)[placement].astype(np.int32)
