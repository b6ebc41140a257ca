import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flash_eplb.planners.par import par, rank_load


def loads_in_python(heat, placement):
    counts = {}
    for rank in placement:
        for expert in rank:
            counts[expert] = counts.get(expert, 0) + 1
    return [
        [sum(episode[expert] / counts[expert] for expert in rank) for rank in placement]
        for episode in heat
    ]


def par_in_python(heat, placement):
    ratios = []
    for loads in loads_in_python(heat, placement):
        mean = sum(loads) / len(loads)
        ratios.append(max(loads) / mean if mean else 1.0)
    return sum(ratios) / len(ratios)


@st.composite
def layers_of_heat(draw):
    ranks, layers, episodes = (draw(st.integers(1, 4)) for _ in range(3))
    slots = draw(st.integers(1, 4))
    experts = draw(st.integers(slots, ranks * slots))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    heat = rng.integers(0, draw(st.integers(1, 1000)), (episodes, layers, experts))
    layer = (np.arange(ranks * slots) % experts).reshape(ranks, slots)
    return heat, np.stack([rng.permutation(experts)[layer] for _ in range(layers)])


@given(layers_of_heat())
@settings(deadline=None)
def test_agrees_with_plain_python(case):
    heat, placement = case
    expected = [
        par_in_python(heat[:, layer].tolist(), placement[layer].tolist())
        for layer in range(heat.shape[1])
    ]
    np.testing.assert_allclose(par(heat, placement), expected, rtol=1e-12)
    assert par(heat[:, 0], placement[0]) == pytest.approx(expected[0], rel=1e-12)
    loads = loads_in_python(heat[:, 0].tolist(), placement[0].tolist())
    np.testing.assert_allclose(rank_load(heat[:, 0], placement[0]), loads, rtol=1e-12)


def test_tokens_divide_evenly_among_replicas():
    heat = np.array([[6, 3, 1]])
    placement = np.array([[0, 1], [0, 2]])
    assert rank_load(heat, placement).tolist() == [[6.0, 4.0]]
    assert par(heat, placement) == 6.0 / 5.0


def test_an_episode_without_tokens_counts_as_even():
    heat = np.array([[4, 0], [0, 0]])
    assert par(heat, np.array([[0], [1]])) == (2.0 + 1.0) / 2


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.int64, np.float16, np.float32])
def test_takes_any_real_dtype_and_read_only_arrays(dtype):
    heat = np.array([[6, 3, 1]], dtype=dtype)
    placement = np.array([[0, 1], [0, 2]])
    heat.flags.writeable = placement.flags.writeable = False
    assert par(heat, placement) == 1.2


@pytest.mark.parametrize(
    ("heat", "placement", "message"),
    [
        ((2, 3), (1, 2, 2), r"heat has shape \(2, 3\) and placement \(1, 2, 2\)"),
        ((3,), (2,), r"they must be \[episodes, experts\] and \[ranks, slots\]"),
        ((2, 2, 4), (1, 2, 2), "heat has 2 layers and placement 1; they must be the same"),
        ((0, 4), (2, 2), "must hold at least one episode"),
        ((1, 4), (2, 2), "layer 0: expert 0 stands twice on rank 0"),
    ],
)
def test_names_what_does_not_fit(heat, placement, message):
    with pytest.raises(ValueError, match=message):
        par(np.zeros(heat), np.zeros(placement, np.int32))


def test_rank_load_names_what_does_not_fit():
    with pytest.raises(ValueError, match=r"heat has shape \(1, 1, 4\)"):
        rank_load(np.zeros((1, 1, 4)), np.zeros((1, 2, 2), np.int32))
