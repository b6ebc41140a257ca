"""Plans that are carried out in parts: each part is valid, fits, and costs no balance."""

import numpy as np
import pytest
from checker import ratios
from heats import initial, shapes, shuffled, window, zipf
from hypothesis import given
from hypothesis import strategies as st

from flash_eplb.ipc.placement import check_placement
from flash_eplb.planners.flashlb import FlashLB
from flash_eplb.planners.offers import LONGEST, Finder
from flash_eplb.planners.partway import moves_between, part_of_the_way
from flash_eplb.planners.plan import make_plan


@given(shape=shapes(), seed=st.integers(0, 2**32), room=st.integers(0, 12))
def test_a_part_of_the_way_is_valid_and_fits_and_costs_no_balance(shape, seed, room):
    ranks, slots, experts = shape
    rng = np.random.default_rng(seed)
    today, wanted = (shuffled(rng, 1, ranks, slots, experts)[0] for _ in range(2))
    wanted = aligned(today, wanted)
    heat = window(rng, zipf(rng, 1, experts), 4)
    here = part_of_the_way(heat.astype(float), 0, today, wanted, room, False)
    check_placement(here[None], experts)
    assert ((here == today) | (here == wanted)).all()
    assert moves_between(today, here) <= room
    assert ratios(heat, here[None])[0] <= ratios(heat, today[None])[0] + 1e-5
    whole = part_of_the_way(heat.astype(float), 0, wanted, wanted, room, False)
    assert (whole == wanted).all()


@given(shape=shapes(), seed=st.integers(0, 2**32), room=st.integers(1, 12))
def test_parts_that_may_cost_balance_lead_to_the_end_or_nowhere(shape, seed, room):
    ranks, slots, experts = shape
    rng = np.random.default_rng(seed)
    here, wanted = (shuffled(rng, 1, ranks, slots, experts)[0] for _ in range(2))
    heat = window(rng, zipf(rng, 1, experts), 4).astype(float)
    left = moves_between(here, wanted)
    while left:
        there = part_of_the_way(heat, 0, here, aligned(here, wanted), room, True)
        check_placement(there[None], experts)
        moves = moves_between(here, there)
        assert moves <= room
        if not moves:  # something that must move together is larger
            assert room < min(left, ranks)
            return
        left -= moves
        assert moves_between(there, wanted) == left
        here = there


def aligned(here, wanted):
    return make_plan(here[None], wanted[None]).placement[0]


def followed(heats, placement, **limits):
    """The moves of each plan, and the placement in the end."""
    planner, moves = FlashLB(*placement.shape[1:], **limits), []
    for heat in heats:
        plan = planner.plan(heat, placement)
        moves.append(len(plan.moves))
        placement = plan.placement
    return moves, placement


@pytest.mark.parametrize(
    ("experts", "ranks", "slots"), [(128, 16, 9), (256, 32, 9), (256, 16, 18), (256, 64, 5)]
)
@pytest.mark.parametrize("most", [4, 30])
def test_a_limit_of_moves_costs_time_and_not_balance(experts, ranks, slots, most):
    rng = np.random.default_rng(0)
    popularity, start = zipf(rng, 1, experts, 1), initial(1, ranks, slots, experts)
    heats = [window(rng, popularity, 64, 20_000) for _ in range(120)]
    moves, placement = followed(heats, start, max_moves=most)
    free, without = followed(heats[:1], start)
    assert max(moves) <= most
    assert sum(moves) < 2 * sum(free)
    assert sum(moves[-10:]) <= most  # chance may ask for one part
    there, reached = (ratios(heats[-1], slots)[0] - 1 for slots in (without, placement))
    assert reached < 1.3 * there + 0.01


@pytest.mark.parametrize("seed", [24, 33])
def test_a_layer_whose_first_moves_win_nothing_gets_where_it_should(seed):
    # All parts of the way that fit lose balance; what follows wins it back.
    rng = np.random.default_rng(seed)
    popularity, start = zipf(rng, 1, 32, 1), initial(1, 8, 5, 32)
    heats = [window(rng, popularity, 64, 20_000) for _ in range(50)]
    moves, placement = followed(heats, start, max_moves=4)
    _, without = followed(heats[:1], start)
    assert max(moves) <= 4
    assert sum(moves[-10:]) == 0
    assert ratios(heats[-1], placement)[0] < ratios(heats[-1], without)[0] + 0.03


def test_what_is_on_its_way_is_given_up_when_the_heat_changes():
    rng = np.random.default_rng(1)
    start, limit = initial(1, 8, 9, 64), {"max_moves": 6}
    first, second = zipf(rng, 1, 64, 1), zipf(rng, 1, 64, 1)
    before = [window(rng, first, 64, 20_000) for _ in range(3)]
    after = [window(rng, second, 64, 20_000) for _ in range(40)]
    moves, placement = followed([*before, *after], start, **limit)
    new = FlashLB(8, 9).plan(after[-1], placement, every_layer=True)
    assert sum(moves[-5:]) == 0
    assert ratios(after[-1], placement)[0] < new.par_after[0] + 0.03


@pytest.mark.parametrize("routing", ["uniform", "weighted", "by_source"])
def test_parts_win_something_but_for_few_that_cost_little(routing):
    won, lost = 0, []
    for seed in range(4):
        rng = np.random.default_rng(seed)
        popularity, placement = zipf(rng, 2, 64, 1.2), initial(2, 8, 9, 64)
        planner = FlashLB(8, 9, routing=routing, max_moves=3)
        for _ in range(25):
            plan = planner.plan(window(rng, popularity, 64, 10**5), placement)
            gains = (plan.par_before - plan.par_after)[plan.layers]
            won += (gains > 0).sum()
            lost += gains[gains <= 0].tolist()
            placement = plan.placement
    assert won > 10 * len(lost)
    assert min(lost, default=0) > -0.05


def test_a_way_that_costs_balance_is_not_looked_for_farther_than_it_may_lead(monkeypatch):
    """With one move a call and hundreds to go it took minutes on a thousand ranks."""
    costly, on_the_way, looks = Finder.costly, Finder._on_the_way, []

    def counted(self, *arguments, **how):
        if how.get("costly"):
            looks[-1] += 1
        return on_the_way(self, *arguments, **how)

    monkeypatch.setattr(Finder, "costly", lambda *a: (looks.append(0), costly(*a))[1])
    monkeypatch.setattr(Finder, "_on_the_way", counted)
    for seed in range(6):
        rng = np.random.default_rng(seed)
        heat = rng.permutation(np.arange(1, 101) ** -1.0) * 3000
        planner = FlashLB(128, 3, routing="by_source", max_moves=1)
        placement = initial(1, 128, 3, 100)
        for number in range(6):
            tokens = rng.poisson(np.roll(heat, 7 * number), (8, 1, 100))
            placement = planner.plan(tokens, placement).placement
    assert looks
    assert max(looks) <= LONGEST
