import re
from dataclasses import replace

import numpy as np
import pytest
from heats import scrambled
from hypothesis import given, settings
from hypothesis import strategies as st

from flash_eplb.ipc.placement import PlacementError, apply_moves
from flash_eplb.planners.plan import make_plan
from flash_eplb.planners.rounds import schedule


@st.composite
def changes(draw):
    """(before, wanted, experts): two random valid placements, often without redundancy."""
    ranks, slots, layers = draw(st.integers(2, 7)), draw(st.integers(1, 5)), draw(st.integers(1, 3))
    full = ranks * slots
    experts = full if draw(st.booleans()) else draw(st.integers(max(2, slots), full))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    shape = (layers, ranks, slots, experts)
    return scrambled(rng, *shape), scrambled(rng, *shape), experts


def assert_valid(placement, experts):
    for layer in placement.tolist():
        assert {expert for rank in layer for expert in rank} == set(range(experts))
        for rank in layer:
            assert len(set(rank)) == len(rank)


def sets(placement):
    return [[set(rank) for rank in layer] for layer in placement.tolist()]


def moves_in_python(placement, moves):
    """The placement after `moves`, each source checked against the placement before them all."""
    old, new = placement.tolist(), placement.tolist()
    written = set()
    for layer, expert, source_rank, source_slot, rank, slot in moves.tolist():
        assert old[layer][source_rank][source_slot] == expert
        assert expert not in old[layer][rank]
        assert (layer, rank, slot) not in written
        written.add((layer, rank, slot))
        new[layer][rank][slot] = expert
    return np.array(new)


def assert_carries_out(plan, rounds, rows, experts):
    placement = plan.before
    for step in rounds:
        placement = moves_in_python(placement, step.moves)
        assert (placement == step.placement).all()
        assert_valid(placement, experts)
        assert len(step.moves) > 0
        assert max(step.moves["rank"].tolist().count(r) for r in range(placement.shape[1])) <= rows
    assert (placement == plan.placement).all()


@given(changes(), st.sampled_from([1, 2, 8]), st.sampled_from([None, 1, 2]))
@settings(deadline=None, max_examples=300)
def test_rounds_lead_through_valid_placements(change, rows, ranks_per_node):
    before, wanted, experts = change
    plan = make_plan(before, wanted, ranks_per_node=ranks_per_node)
    assert (plan.before == before).all()
    assert sets(plan.placement) == sets(wanted)
    assert_carries_out(plan, plan.rounds(rows), rows, experts)


@given(changes())
@settings(deadline=None)
def test_experts_that_stay_keep_their_slot(change):
    before, wanted, _ = change
    placement = make_plan(before, wanted).placement
    for old, new, want in zip(before.tolist(), placement.tolist(), wanted.tolist(), strict=True):
        for rank in range(len(old)):
            for slot, expert in enumerate(old[rank]):
                if expert in want[rank]:
                    assert new[rank][slot] == expert


@given(changes())
@settings(deadline=None)
def test_the_moves_of_a_plan_lead_to_its_placement(change):
    before, wanted, _ = change
    plan = make_plan(before, wanted)
    assert (moves_in_python(plan.before, plan.moves) == plan.placement).all()
    assert (apply_moves(plan.before, plan.moves) == plan.placement).all()
    old, new = sets(before), sets(wanted)
    changed = [layer for layer in range(len(old)) if old[layer] != new[layer]]
    assert sorted(plan.layers.tolist()) == changed
    assert bool(plan) == bool(changed)


def test_a_cycle_through_full_ranks_takes_one_round():
    before = np.arange(6).reshape(1, 6, 1)
    plan = make_plan(before, np.roll(before, 1, axis=1))
    (only,) = plan.rounds(1)
    assert len(only.moves) == 6


def test_a_walk_that_crosses_itself_is_cut_into_simple_cycles():
    # 0 -> 1 -> 2 -> 0 and 1 -> 3 -> 1 share rank 1: as one cycle it would write rank 1 twice.
    before = np.array([[[0, 10], [1, 2], [3, 11], [4, 12]]])
    wanted = np.array([[[3, 10], [0, 4], [1, 11], [2, 12]]])
    rename = {e: i for i, e in enumerate(sorted({*before.ravel().tolist()}))}
    before, wanted = (np.vectorize(rename.get)(x) for x in (before, wanted))
    plan = make_plan(before, wanted)
    rounds = plan.rounds(1)
    assert_carries_out(plan, rounds, 1, 8)
    assert sorted(len(step.moves) for step in rounds) == [2, 3]


def test_a_path_is_written_from_its_end():
    # 0 gives its expert to 1, 1 to 2; rank 2 can drop expert 3, of which rank 0 has a replica.
    before = np.array([[[0, 3], [1, 4], [2, 3]]])
    wanted = np.array([[[4, 3], [0, 4], [2, 1]]])
    plan = make_plan(before, wanted)
    assert plan.placement.tolist() == [[[4, 3], [0, 4], [2, 1]]]
    (only,) = plan.rounds(1)
    assert only.moves["rank"].tolist() == [0, 1, 2]


def test_layers_come_in_the_order_of_their_gain_per_move():
    before = np.array([[[0, 1], [2, 3]]] * 4)
    wanted = before.copy()
    wanted[0] = [[2, 1], [0, 3]]
    wanted[2] = [[2, 3], [0, 1]]
    wanted[3] = [[0, 3], [2, 1]]
    plan = make_plan(
        before,
        wanted,
        par_before=np.array([1.5, 1.2, 1.9, 1.5]),
        par_after=np.array([1.4, 1.2, 1.5, 1.1]),
    )
    assert plan.layers.tolist() == [3, 2, 0]
    assert plan.moves["layer"].tolist() == [3, 3, 2, 2, 2, 2, 0, 0]
    assert plan.rounds(1)[0].moves["layer"].tolist() == [3, 3]
    assert plan.par_after.tolist() == [1.4, 1.2, 1.5, 1.1]


def test_layers_without_a_measured_par_come_in_their_own_order():
    before = np.array([[[0, 1], [2, 3]]] * 3)
    plan = make_plan(before, before[:, ::-1])
    assert plan.layers.tolist() == [0, 1, 2]
    assert np.isnan(plan.par_before).all()


def test_another_order_of_slots_is_no_change():
    before = np.array([[[0, 1], [2, 3]]])
    plan = make_plan(before, before[:, :, ::-1])
    assert not plan
    assert plan.rounds(1) == []
    assert len(plan.moves) == 0
    assert (plan.placement == before).all()


def test_a_plan_of_no_layers_is_empty():
    nothing = np.empty((0, 2, 2), np.int32)
    assert make_plan(nothing, nothing).rounds(3) == []


def test_no_rank_sends_everything():
    # Ranks 0..3 all hold experts 0..3, and each of the others needs one or two of them.
    before = np.array([[[0, 1, 2, 3]] * 4 + [[4, 5, 6, 7]] * 4])
    wanted = before.copy()
    wanted[0, 4:] = [[0, 1, 6, 7], [4, 2, 3, 7], [4, 5, 0, 1], [2, 5, 6, 3]]
    (only,) = make_plan(before, wanted).rounds(2)
    sent = np.bincount(only.moves["source_rank"], minlength=8)
    assert sent.tolist() == [2, 2, 2, 2, 0, 0, 0, 0]


def test_sources_on_the_same_node_come_first():
    before = np.array([[[0, 1], [2, 3], [0, 4], [2, 5]]])
    wanted = np.array([[[0, 1], [2, 3], [0, 4], [0, 5]]])
    for near, source in ((None, 0), (1, 0), (2, 2), (4, 0)):
        plan = make_plan(before, wanted, ranks_per_node=near)
        assert plan.ranks_per_node == near
        assert plan.rounds(1)[0].moves["source_rank"].tolist() == [source]
        assert plan.moves["source_rank"].tolist() == [source]


def test_a_plan_does_not_share_memory_with_its_arguments():
    before = np.array([[[0, 1], [2, 3]]], dtype=np.int32)
    wanted = before[:, ::-1].copy()
    plan = make_plan(before, wanted)
    before[:] = wanted[:] = -1
    assert_carries_out(plan, plan.rounds(1), 1, 4)


@pytest.mark.parametrize("rows", [0, -1, 1.5, True, "2", None])
def test_rounds_without_rows_are_refused(rows):
    plan = make_plan(np.array([[[0], [1]]]), np.array([[[1], [0]]]))
    text = re.escape(f"rows is {rows!r}; it must be a whole number of at least 1")
    with pytest.raises(ValueError, match=text):
        plan.rounds(rows)


def test_rows_that_numpy_counted_compile_nothing_new():
    plan = make_plan(np.array([[[0], [1]]]), np.array([[[1], [0]]]))
    plan.rounds(1)
    known = len(schedule.signatures)
    for rows in (np.int32(1), np.uint8(1)):
        assert len(plan.rounds(rows)) == 1
    assert len(schedule.signatures) == known


def test_rows_and_nodes_beyond_all_there_are_are_no_limit():
    before = np.array([[[0, 1], [2, 0]]] * 2)
    plan, near = (
        make_plan(before, before[:, ::-1], ranks_per_node=most) for most in (None, 10**30)
    )
    assert len(near.rounds(10**30)) == 1
    assert (near.moves == plan.moves).all()
    assert (near.rounds(10**30)[0].moves == plan.rounds(4)[0].moves).all()


@pytest.mark.parametrize("near", [0, 1.5, "2", True])
def test_nodes_of_no_whole_number_of_ranks_are_refused(near):
    before = np.array([[[0], [1]]])
    text = f"ranks_per_node is {near!r}; it must be a whole number of at least 1"
    with pytest.raises(ValueError, match=re.escape(text)):
        make_plan(before, before, ranks_per_node=near)


def test_routing_is_uniform_unless_it_is_planned():
    before = np.array([[[0, 1], [2, 0]]] * 3)
    plan = make_plan(before, before[:, ::-1])
    assert plan.columns.dtype == np.int16
    assert plan.columns.shape == before.shape
    assert (plan.columns == 1).all()


@given(changes(), st.sampled_from([1, 2, 8]), st.randoms(use_true_random=False))
def test_an_expert_has_its_planned_columns_as_soon_as_it_has_its_planned_slots(
    change, rows, random
):
    before, wanted, experts = change
    plan = make_plan(before, wanted)
    assert all(part.columns is None for part in plan.rounds(rows))
    planned = np.array([random.randint(2, 9) for _ in range(plan.columns.size)], np.int16)
    plan = replace(plan, columns=planned.reshape(plan.columns.shape))
    last = {}
    for part in plan.rounds(rows):
        layers = sorted({int(layer) for layer in part.moves["layer"]})
        assert part.columns.shape == (len(layers), *before.shape[1:])
        for layer, columns in zip(layers, part.columns, strict=True):
            here, there = part.placement[layer], plan.placement[layer]
            for expert in range(experts):
                arrived = ((here == expert) == (there == expert)).all()
                shares = columns[here == expert]
                assert (shares == (plan.columns[layer][here == expert] if arrived else 1)).all()
            last[layer] = columns
    for layer in plan.layers.tolist():
        assert (last[layer] == plan.columns[layer]).all()


def test_placements_that_do_not_fit_are_refused():
    before = np.array([[[0, 1], [2, 3]]])
    with pytest.raises(PlacementError, match="wanted: layer 0: expert 3 has no slot"):
        make_plan(before, np.array([[[0, 1], [2, 0]]]))
    with pytest.raises(PlacementError, match="before: layer 0: expert 3 stands twice on rank 1"):
        make_plan(np.array([[[0, 1], [3, 3]]]), before)
    with pytest.raises(ValueError, match=r"wanted has shape \(1, 1, 2\); before has \(1, 2, 2\)"):
        make_plan(before, before[:, :1])
    with pytest.raises(ValueError, match=r"par_after has shape \(2,\); it must be \(1,\)"):
        make_plan(before, before, par_after=np.ones(2))
