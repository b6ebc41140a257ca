import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flash_eplb.eplb.group import UnsupportedError
from flash_eplb.eplb.reference import reference_digests


@given(st.data())
def test_the_reference_is_what_all_replicas_agree_on(data):
    layers, ranks, slots = (data.draw(st.integers(1, 3)) for _ in range(3))
    experts = data.draw(st.integers(1, ranks * slots))
    cells = st.lists(st.integers(0, experts - 1), min_size=ranks * slots, max_size=ranks * slots)
    placement = np.array([data.draw(cells) for _ in range(layers)]).reshape(layers, ranks, slots)
    digest = st.integers(0, 3) if data.draw(st.booleans()) else st.integers(0, 2**32 - 1)
    truth = np.array([[data.draw(digest) for _ in range(experts)] for _ in range(layers)], np.int64)
    found = np.take_along_axis(truth, placement.reshape(layers, -1), axis=1)
    found = found.reshape(placement.shape)
    reference = reference_digests(found, placement, experts)
    assert reference.dtype == np.int64
    for layer in range(layers):
        for expert in range(experts):
            is_held = (placement[layer] == expert).any()
            assert reference[layer, expert] == (truth[layer, expert] if is_held else -1)


@pytest.mark.parametrize(("layer", "rank", "slot"), [(0, 1, 1), (1, 1, 1)])
def test_the_first_replica_that_differs_is_named(layer, rank, slot):
    placement = np.array([[[0, 1], [2, 0]], [[2, 1], [0, 1]]])
    found = np.array([[[5, 6], [7, 5]], [[7, 6], [5, 6]]], np.int64)
    reference_digests(found, placement, 3)
    found[layer, rank, slot] += 1
    expert = placement[layer, rank, slot]
    with pytest.raises(UnsupportedError) as error:
        reference_digests(found, placement, 3)
    assert str(error.value).startswith(
        f"layer {layer} expert {expert}: the replica on rank {rank} slot {slot} has other weights"
    )
    assert "load_format=dummy" in str(error.value)
    assert "update the weights before the first request" in str(error.value)
    assert "set num_redundant_experts=0" in str(error.value)
