import numpy as np
from hypothesis import assume, given
from hypothesis import strategies as st

from flash_eplb.loaders.routing import chosen_replicas, logical_to_physical


@st.composite
def placements(draw):
    """(placement [ranks, slots], experts) with every expert at least once."""
    ranks, slots = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    experts = draw(st.integers(1, ranks * slots))
    rest = draw(
        st.lists(
            st.integers(0, experts - 1),
            min_size=ranks * slots - experts,
            max_size=ranks * slots - experts,
        )
    )
    cells = draw(st.permutations([*range(experts), *rest]))
    kind = draw(st.sampled_from([np.int16, np.int32, np.int64]))
    return np.array(cells, kind).reshape(ranks, slots), experts


@given(placements())
def test_each_expert_lists_its_slots_in_order(case):
    placement, experts = case
    cells = placement.ravel().tolist()
    plain = [[slot for slot, held in enumerate(cells) if held == e] for e in range(experts)]
    width = max(len(slots) for slots in plain)
    table, counts = logical_to_physical(placement, experts)
    assert table.tolist() == [slots + [-1] * (width - len(slots)) for slots in plain]
    assert counts.tolist() == [len(slots) for slots in plain]
    assert table.dtype == counts.dtype == np.int64


def test_two_replicas_of_one_expert():
    table, counts = logical_to_physical(np.array([[0, 1], [2, 0]]), 3)
    assert table.tolist() == [[0, 3], [1, -1], [2, -1]]
    assert counts.tolist() == [2, 1, 1]


def test_a_placement_that_is_no_copy_of_its_own_memory():
    wide = np.array([[0, 9, 1, 9], [2, 9, 0, 9]])
    table, counts = logical_to_physical(wide[:, ::2], 3)
    assert table.tolist() == [[0, 3], [1, -1], [2, -1]]
    assert counts.tolist() == [2, 1, 1]


@given(placements(), st.randoms(use_true_random=False))
def test_a_slot_stands_in_as_many_columns_as_it_should(case, random):
    placement, experts = case
    columns = np.array([random.randint(1, 9) for _ in placement.ravel()]).reshape(placement.shape)
    table, counts = logical_to_physical(placement, experts, columns)
    for expert in range(experts):
        row = table[expert, : counts[expert]]
        assert (table[expert, counts[expert] :] == -1).all()
        slots, found = np.unique(row, return_counts=True)
        assert slots.tolist() == np.flatnonzero(placement.ravel() == expert).tolist()
        assert found.tolist() == columns.ravel()[slots].tolist()


def test_the_columns_of_a_slot_are_spread():
    table, counts = logical_to_physical(np.array([[0], [0], [0]]), 1, np.array([[4], [2], [2]]))
    assert counts.tolist() == [8]
    assert table.tolist() == [[0, 1, 2, 0, 0, 1, 2, 0]]
    for width in range(2, 9):  # a few columns in a row hold no slot more than its share, but one
        for start in range(9 - width):
            found = np.bincount(table[0, start : start + width], minlength=3)
            assert (found <= np.ceil(width * np.array([4, 2, 2]) / 8) + 1).all()


@given(placements(), st.randoms(use_true_random=False), st.booleans())
def test_each_rank_sends_to_one_replica_and_ranks_divide_by_shares(case, random, uniform):
    placement, experts = case
    assume(all(len(set(held)) == len(held) for held in placement.tolist()))
    cells = placement.ravel()
    columns = np.array([random.randint(1, 9) for _ in cells]).reshape(placement.shape)
    chosen = chosen_replicas(placement, experts, None if uniform else columns)
    ranks, slots = placement.shape
    assert chosen.shape == (ranks, experts)
    assert chosen.dtype == np.int32
    assert (cells[chosen] == np.arange(experts)).all()
    shares = np.ones(cells.size) if uniform else columns.ravel()
    for expert in range(experts):
        held = np.flatnonzero(cells == expert)
        senders = (chosen[:, expert, None] == held).sum(axis=0)
        exact = ranks * shares[held] / shares[held].sum()
        assert (np.abs(senders - exact) < 1).all()
        for slot, count in zip(held, senders, strict=True):
            if count:
                assert chosen[slot // slots, expert] == slot  # nothing leaves a rank for nothing


def test_a_replica_without_senders_gets_nothing_from_its_own_rank_either():
    chosen = chosen_replicas(np.array([[0, 1], [0, 2]]), 3, np.array([[1, 1], [9, 1]]))
    assert chosen.tolist() == [[2, 1, 3], [2, 1, 3]]


def test_planned_senders_are_carried_out_to_the_rank():
    placement = np.array([[0, 1], [0, 2], [0, 3], [4, 5]])
    columns = np.array([[2, 1], [1, 1], [1, 1], [1, 1]])
    chosen = chosen_replicas(placement, 6, columns)
    assert chosen[:, 0].tolist() == [0, 2, 4, 0]
