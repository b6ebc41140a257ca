"""Who sends what, beside a bound that a max-flow solver proves; nothing here asks the planner."""

from itertools import permutations, product

import networkx as nx
import numpy as np
import pytest
from checker import carried_out
from heats import scrambled

from flash_eplb.planners.plan import Plan, make_plan
from flash_eplb.planners.rounds import spread_sources

NODES = [None, 1, 2, 3]


def plan_of(seed, near):
    """A plan between two random placements, on 2 to 6 ranks, and staging rows for its rounds."""
    rng = np.random.default_rng(seed)
    ranks, slots, layers = (int(n) for n in rng.integers([2, 1, 1], [7, 6, 4]))
    experts = int(rng.integers(max(2, slots), ranks * slots + 1))
    before, wanted = (scrambled(rng, layers, ranks, slots, experts) for _ in range(2))
    return make_plan(before, wanted, ranks_per_node=near), int(rng.choice([1, 2, 8]))


def may_send(placement, layer, expert, rank, near):
    """The ranks that a rank may take an expert from: itself, else its node's, else all holders."""
    holders = {r for r, held in enumerate(placement[layer].tolist()) if expert in held}
    node = {r for r in holders if near is None or r // near == rank // near}
    return holders & {rank} or node or holders


def least_of_the_busiest(choices, ranks):
    """The fewest rows that the busiest rank sends if each row goes from one of its choices."""
    limit = -(-len(choices) // ranks)
    while _most_rows(choices, limit) < len(choices):
        limit += 1
    return limit


def _most_rows(choices, limit):
    """How many rows can be sent if no rank sends more than `limit`."""
    flow = nx.DiGraph()
    flow.add_nodes_from(["from", "to"])
    for row, ranks in enumerate(choices):
        flow.add_edge("from", ("row", row), capacity=1)
        for rank in ranks:
            flow.add_edge(("row", row), ("rank", rank), capacity=1)
            flow.add_edge(("rank", rank), "to", capacity=limit)
    return nx.maximum_flow_value(flow, "from", "to")


def loads(senders, ranks):
    """Rows that each rank sends, int64[ranks]."""
    return np.bincount(np.array(senders, int), minlength=ranks)


def assert_sent_well(placement, moves, near):
    """Each source is among the nearest, and the busiest sender is at the bound."""
    ranks = placement.shape[1]
    choices, senders = [], []
    for layer, expert, source, _, rank, _ in moves.tolist():
        allowed = may_send(placement, layer, expert, rank, near)
        assert source in allowed
        if source != rank:
            choices.append(allowed)
            senders.append(source)
    assert loads(senders, ranks).max() == least_of_the_busiest(choices, ranks)


def steps(plan, rows):
    """(placement before, moves) of each round, and of the whole plan as one."""
    placement = plan.before
    for part in plan.rounds(rows):
        yield placement, part.moves
        placement = part.placement
    yield plan.before, plan.moves


@pytest.mark.parametrize("near", NODES)
def test_the_busiest_sender_of_each_round_sends_as_little_as_a_solver_finds(near):
    for seed in range(100):
        plan, rows = plan_of(seed, near)
        for placement, moves in steps(plan, rows):
            assert_sent_well(placement, moves, near)


@pytest.mark.parametrize("near", NODES)
def test_a_row_crosses_once_to_each_rank_that_lacks_it_and_none_to_another(near):
    for seed in range(100):
        plan, rows = plan_of(seed, near)
        for placement, moves in steps(plan, rows):
            sent = list(zip(moves["layer"], moves["expert"], moves["rank"], strict=True))
            assert len(set(sent)) == len(sent)
            carried_out(placement, moves)  # no rank holds already what it receives
        kept = plan.before == plan.placement
        assert len(plan.moves) == kept.size - kept.sum()
        assert sum(len(part.moves) for part in plan.rounds(rows)) == len(plan.moves)


def random_writes(rng):
    """(placement, writes, experts, sent) of a round that may write what a rank has elsewhere."""
    ranks, slots, layers = (int(n) for n in rng.integers([2, 1, 1], [7, 4, 3]))
    experts = int(rng.integers(max(2, slots), ranks * slots + 1))
    placement = scrambled(rng, layers, ranks, slots, experts).astype(np.int32)
    everywhere = np.argwhere(placement >= 0)
    writes = everywhere[np.sort(rng.permutation(len(everywhere))[: rng.integers(1, 7)])]
    arriving = rng.integers(experts, size=len(writes)).astype(np.int32)
    return placement, writes, arriving, rng.integers(4, size=ranks)


def costs(load, sent):
    """What a round is judged by: for each row its number on its sender, then what that sent before.

    The highest first: of two rounds, the one whose list is smaller is the better one.
    """
    all_rows = [(n + 1, sent[rank]) for rank, rows in enumerate(load) for n in range(rows)]
    return sorted(all_rows, reverse=True)


@pytest.mark.parametrize("near", NODES)
def test_no_other_choice_of_sources_is_more_even_or_spares_who_has_sent(near):
    rng = np.random.default_rng(near or 0)
    for _ in range(150):
        placement, writes, experts, sent = random_writes(rng)
        ranks = len(sent)
        before = sent.copy()
        sources = spread_sources(placement, writes, experts, near or ranks, sent)
        choices = []
        for (layer, rank, _), expert, (source, slot) in zip(
            writes.tolist(), experts.tolist(), sources.tolist(), strict=True
        ):
            assert placement[layer, source, slot] == expert
            allowed = may_send(placement, layer, expert, rank, near)
            assert source in allowed
            choices += [sorted(allowed)] if source != rank else []
        others = (costs(loads(senders, ranks), before) for senders in product(*choices))
        assert costs(sent - before, before) == min(others)


@pytest.mark.parametrize("order", permutations(range(3)))
def test_a_rank_copies_what_it_holds_and_that_is_no_sending(order):
    # One rank has two slots exchanged; another needs expert 0, which it and the third one hold.
    before = np.array([[[0, 1, 2], [0, 6, 7], [3, 4, 5]]], np.int32)[:, order]
    after = np.array([[[1, 0, 2], [0, 6, 7], [3, 4, 0]]], np.int32)[:, order]
    made = make_plan(before, before)
    plan = Plan(before, after, np.array([0]), made.par_before, made.par_after, made.columns)
    exchanged, holder, taker = (order.index(rank) for rank in range(3))
    sources = {taker: [min(exchanged, holder)], exchanged: [exchanged, exchanged], holder: []}
    assert plan.moves["source_rank"].tolist() == [r for rank in range(3) for r in sources[rank]]
