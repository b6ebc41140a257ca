"""Heat and placements to plan for."""

import numpy as np
from hypothesis import strategies as st


def initial(layers, ranks, slots, experts):
    """Physical slot p of each layer holds expert p % experts."""
    layer = (np.arange(ranks * slots) % experts).reshape(ranks, slots)
    return np.stack([layer] * layers).astype(np.int32)


def shuffled(rng, layers, ranks, slots, experts):
    """`initial` with the experts of each layer renamed."""
    names = [rng.permutation(experts) for _ in range(layers)]
    first = initial(1, ranks, slots, experts)[0]
    return np.stack([name[first] for name in names]).astype(np.int32)


def scrambled_layer(rng, ranks, slots, experts):
    """A layer of `scrambled`: round robin, then random swaps and replaced replicas."""
    rows = [[(rank * slots + slot) % experts for slot in range(slots)] for rank in range(ranks)]
    for _ in range(4 * ranks * slots):
        (a, i), (b, j) = ((int(rng.integers(ranks)), int(rng.integers(slots))) for _ in range(2))
        mine, other = rows[a][i], rows[b][j]
        if a == b or (mine not in rows[b] and other not in rows[a]):
            rows[a][i], rows[b][j] = other, mine
        spare = sum(row.count(mine) for row in rows) > 1
        expert = int(rng.integers(experts))
        if rows[a][i] == mine and spare and expert not in rows[a]:
            rows[a][i] = expert
    return rows


def scrambled(rng, layers, ranks, slots, experts):
    """A random valid placement, with random counts of replicas."""
    return np.array([scrambled_layer(rng, ranks, slots, experts) for _ in range(layers)])


def zipf(rng, layers, experts, skew=1.0):
    """Popularity [layers, experts], each layer in an order of its own."""
    popularity = np.arange(1, experts + 1) ** -float(skew)
    return np.stack([rng.permutation(popularity / popularity.sum()) for _ in range(layers)])


def window(rng, popularity, episodes=32, tokens=20_000):
    """Poisson counts int64[episodes, layers, experts]."""
    return rng.poisson(tokens * popularity, (episodes, *popularity.shape))


def uneven(excess):
    """Heat of 4 experts on EVEN_SOON whose PAR is 1 + excess / 10; one exchange makes it 1."""
    return [10 + excess, 10 + excess, 10 - excess, 10 - excess]


EVEN_SOON = [[0, 1], [2, 3]]


def stuck():
    """Heat [8, 1, 8] and a placement of PAR 3; 5/3 is the best one without redundancy."""
    return np.tile([9, 9, 1, 1, 1, 1, 1, 1], (8, 1, 1)), np.arange(8).reshape(1, 4, 2)


def loosened(placement):
    """Heat on a placement of the shape of `stuck` that gives PAR 1.5; two exchanges make it 1."""
    heat = np.empty(8, int)
    heat[placement[0].ravel()] = [15, 15, 5, 5, 10, 10, 10, 10]
    return np.tile(heat, (8, 1, 1))


DTYPES = ("uint8", "uint16", "int32", "int64", "float16", "float32", "float64")


def typed(heat, dtype, scale):
    """`heat` in `dtype`, no more than that holds; `scale` counts for float64 only."""
    if dtype == "float64":
        return heat * scale
    most = np.finfo(dtype).max if dtype.startswith("f") else np.iinfo(dtype).max
    return np.minimum(heat, most / 2).astype(dtype)


@st.composite
def shapes(draw, most_slots=64, ranks=(2, 8)):
    """(ranks, slots, experts), from no redundancy to every expert on every rank."""
    ranks = draw(st.integers(*ranks))
    slots = draw(st.integers(1, most_slots // ranks))
    fewest, most = max(2, slots), min(64, ranks * slots)
    some = st.integers(fewest, most)
    return ranks, slots, draw(some | some | st.just(most) | st.just(fewest))


@st.composite
def windows(draw, layers, experts, most_episodes=70):
    """Heat [episodes, layers, experts] of any kind: skewed or single, sparse, idle, of any dtype.

    A layer may have no tokens at all; so may an episode.
    """
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    episodes = draw(st.integers(1, min(8, most_episodes)) | st.integers(1, most_episodes))
    tokens = draw(st.sampled_from([20, 500, 20_000, 10**7]))
    skews = [draw(st.sampled_from([0, 0.4, 1, 1.5, 3])) for _ in range(layers)]
    popularity = np.concatenate([zipf(rng, 1, experts, skew) for skew in skews])
    heat = window(rng, popularity, episodes, tokens)
    if draw(st.booleans()):
        heat[rng.random(heat.shape) < 0.7] = 0
    if draw(st.booleans()):
        heat[rng.random(heat.shape[:2]) < 0.3] = 0
    kind = draw(st.sampled_from(["as it is", "one layer idle", "one expert only", "drift"]))
    layer = draw(st.integers(0, layers - 1))
    if kind == "one layer idle":
        heat[:, layer] = 0
    elif kind == "one expert only":
        heat[:, layer] = 0
        heat[:, layer, rng.integers(experts)] = tokens
    elif kind == "drift":
        heat[episodes // 2 :, layer] = rng.permutation(heat[episodes // 2 :, layer], axis=1)
    return typed(heat, draw(st.sampled_from(DTYPES)), draw(st.sampled_from([1, 1e300, 1e-300])))
