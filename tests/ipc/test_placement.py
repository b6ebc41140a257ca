import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flash_eplb.ipc.placement import (
    MOVE,
    PlacementError,
    apply_moves,
    check_placement,
    try_moves,
)


def round_robin(layers, ranks, slots, experts):
    """Physical slot p of each layer holds expert p % experts."""
    layer = (np.arange(ranks * slots) % experts).reshape(ranks, slots)
    return np.stack([layer] * layers).astype(np.int32)


def is_valid(placement, experts):
    for layer in placement.tolist():
        if {expert for rank in layer for expert in rank} != set(range(experts)):
            return False
        if any(len(set(rank)) != len(rank) for rank in layer):
            return False
    return True


def moves(*rows):
    return np.array(list(rows), dtype=MOVE)


def test_a_valid_placement_passes():
    check_placement(round_robin(58, 32, 9, 256), 256)
    check_placement(round_robin(1, 2, 2, 4).astype(np.uint8), 4)
    check_placement(np.empty((0, 2, 2), np.int64), 4)


def test_an_expert_without_a_slot_is_named():
    placement = round_robin(5, 4, 3, 8)
    placement[3, 2, 1] = 1
    with pytest.raises(PlacementError, match=r"^layer 3: expert 7 has no slot$"):
        check_placement(placement, 8)


def test_an_expert_twice_on_a_rank_is_named():
    placement = round_robin(5, 4, 3, 8)
    placement[3, 1] = [7, 0, 7]
    with pytest.raises(PlacementError, match=r"^layer 3: expert 7 stands twice on rank 1$"):
        check_placement(placement, 8)


@pytest.mark.parametrize("expert", [-1, 8, 2**31 - 1])
def test_an_expert_out_of_range_is_named(expert):
    placement = round_robin(2, 4, 3, 8)
    placement[1, 2, 0] = expert
    message = rf"^layer 1: rank 2 slot 0 holds expert {expert}; experts are 0..7$"
    with pytest.raises(PlacementError, match=message):
        check_placement(placement, 8)


@pytest.mark.parametrize(
    ("placement", "found"),
    [
        (np.zeros((2, 3), np.int32), r"int32\[2, 3\]"),
        (np.zeros((1, 2, 2)), r"float64\[1, 2, 2\]"),
        (np.zeros((1, 2, 2), bool), r"bool\[1, 2, 2\]"),
    ],
)
def test_the_wrong_shape_or_type_is_named(placement, found):
    with pytest.raises(PlacementError, match=found + r"; it must be int\[layers, ranks, slots\]"):
        check_placement(placement, 2)


@given(st.data())
def test_refuses_exactly_what_is_not_valid(data):
    ranks, slots, layers = (data.draw(st.integers(1, 4)) for _ in range(3))
    experts = data.draw(st.integers(1, ranks * slots))
    cells = st.lists(
        st.integers(0, experts - 1),
        min_size=layers * ranks * slots,
        max_size=layers * ranks * slots,
    )
    placement = np.array(data.draw(cells)).reshape(layers, ranks, slots)
    if data.draw(st.booleans()) and slots <= experts:
        placement = round_robin(layers, ranks, slots, experts)
    if is_valid(placement, experts):
        check_placement(placement, experts)
    else:
        with pytest.raises(PlacementError):
            check_placement(placement, experts)


def test_moves_take_effect_at_once():
    before = np.array([[[0, 1], [2, 3]]])
    after = apply_moves(before, moves((0, 3, 1, 1, 0, 0), (0, 0, 0, 0, 1, 1)))
    assert after.tolist() == [[[3, 1], [2, 0]]]
    assert before.tolist() == [[[0, 1], [2, 3]]]


def test_no_moves_give_a_copy():
    before = round_robin(1, 2, 2, 4)
    after = apply_moves(before, moves())
    assert (after == before).all()
    assert not np.shares_memory(after, before)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([(1, 3, 1, 1, 0, 0)], "move 0: layer is 1; it must be in 0..0"),
        ([(0, 3, -1, 1, 0, 0)], "move 0: source_rank is -1; it must be in 0..1"),
        ([(0, 3, 1, 2, 0, 0)], "move 0: source_slot is 2; it must be in 0..1"),
        ([(0, 3, 1, 1, 0, 0), (0, 3, 1, 1, 2, 0)], "move 1: rank is 2; it must be in 0..1"),
        ([(0, 3, 1, 1, 0, -1)], "move 0: slot is -1; it must be in 0..1"),
        ([(0, 3, 1, 0, 0, 0)], "move 0: layer 0 rank 1 slot 0 holds expert 2, not expert 3"),
        ([(0, 3, 1, 1, 1, 1)], "move 0: layer 0 rank 1 slot 1 holds expert 3 already"),
        (
            [(0, 3, 1, 1, 0, 0), (0, 0, 0, 0, 1, 0), (0, 2, 1, 0, 0, 0)],
            "moves 0 and 2 both write layer 0 rank 0 slot 0",
        ),
    ],
)
def test_a_move_that_does_not_fit_is_named(rows, message):
    placement = np.array([[[0, 1], [2, 3]]])
    with pytest.raises(PlacementError) as error:
        apply_moves(placement, moves(*rows))
    assert str(error.value) == message


def test_moves_of_another_type_are_refused():
    with pytest.raises(PlacementError, match=r"moves are int64\[0, 6\]; they must be MOVE\[n\]"):
        apply_moves(round_robin(1, 2, 2, 4), np.empty((0, 6), np.int64))


CELL = st.integers(-1, 3)
RIGHT = np.array([[[0, 1, 2], [3, 0, 1]], [[3, 2, 0], [1, 0, 3]]], np.int32)


@st.composite
def fitting_moves(draw):
    """Moves whose sources hold their experts, most of them; what they lead to is another matter."""
    made = []
    for _ in range(draw(st.integers(1, 4))):
        layer, rank, slot = (
            draw(st.integers(0, 1)),
            draw(st.integers(0, 1)),
            draw(st.integers(0, 2)),
        )
        made.append(
            (layer, RIGHT[layer, rank, slot], rank, slot, 1 - rank, draw(st.integers(0, 2)))
        )
    return made


def said(placement, made, rows):
    """What the functions that have words for it say."""
    try:
        after = apply_moves(placement, made)
        check_placement(after, 4)
    except PlacementError:
        return None
    return after if np.bincount(made["rank"]).max() <= rows else None


@given(st.one_of(fitting_moves(), st.lists(st.tuples(*[CELL] * 6), min_size=1, max_size=3)))
def test_moves_are_tried_as_they_are_applied_and_checked(made):
    made = moves(*made)
    for rows in (1, 3):
        right, after = try_moves(RIGHT, made.view(np.int32).reshape(-1, 6), 4, rows)
        expected = said(RIGHT, made, rows)
        assert right == (expected is not None)
        if right:
            assert np.array_equal(after, expected)


def test_moves_that_are_right_are_found_so():
    swap = moves((0, 2, 0, 2, 1, 0), (0, 3, 1, 0, 0, 2))
    assert said(RIGHT, swap, 1) is not None
    assert try_moves(RIGHT, swap.view(np.int32).reshape(-1, 6), 4, 1)[0]
