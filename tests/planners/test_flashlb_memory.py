"""What FlashLB remembers, and when that counts; equal calls give equal plans."""

import numpy as np
import pytest
from checker import assert_same, ratios
from heats import initial, loosened, shuffled, stuck, window, zipf

from flash_eplb.planners.flashlb import FlashLB


def drifting(rng, layers, experts, windows, episodes=12, tokens=3000, change=0.5):
    """Windows whose popularity changes from one to the next."""
    popularity = zipf(rng, layers, experts)
    for _ in range(windows):
        yield window(rng, popularity, episodes, tokens)
        popularity = popularity * np.exp(rng.normal(0, change, popularity.shape))
        popularity /= popularity.sum(axis=1, keepdims=True)


def test_earlier_windows_count_while_the_placement_is_the_planned_one():
    rng = np.random.default_rng(1)
    first, last = drifting(rng, 3, 64, 2, change=0.02)
    old, new = FlashLB(8, 9), FlashLB(8, 9)
    placement = old.plan(first, initial(3, 8, 9, 64)).placement
    ours = old.plan(last, placement, every_layer=True)
    theirs = new.plan(last, placement, every_layer=True)
    assert all((ours.placement[k] != theirs.placement[k]).any() for k in range(3))


def test_a_layer_of_another_placement_is_planned_as_by_a_new_object():
    rng = np.random.default_rng(2)
    first, second, last = drifting(rng, 4, 64, 3)
    for every_layer in (False, True):
        old, new = FlashLB(8, 9), FlashLB(8, 9)
        placement = old.plan(first, initial(4, 8, 9, 64)).placement
        placement = old.plan(second, placement).placement.copy()
        placement[1] = initial(1, 8, 9, 64)[0]
        placement[3, :, [0, 4]] = placement[3, :, [4, 0]]
        ours = old.plan(last, placement, every_layer)
        theirs = new.plan(last, placement, every_layer)
        assert 1 in ours.layers
        for layer in (1, 3):
            assert (ours.placement[layer] == theirs.placement[layer]).all()
            assert ours.par_after[layer] == theirs.par_after[layer]


def test_a_promise_holds_only_for_the_placement_it_was_made_for():
    heat, placement = stuck()
    planner = FlashLB(4, 2)
    promised = planner.plan(heat, placement).placement
    other = np.ascontiguousarray(promised[:, ::-1])
    assert planner.plan(loosened(other), other)


def test_a_promise_is_forgotten_once_the_placement_was_another():
    heat, placement = stuck()
    planner = FlashLB(4, 2, floor=9)
    promised = planner.plan(heat, placement).placement
    assert not planner.plan(loosened(promised), promised)
    assert not planner.plan(np.ones((8, 1, 8)), placement)
    assert planner.plan(loosened(promised), promised)


def test_a_plan_that_was_not_carried_out_leaves_the_promises_of_other_layers():
    heat, placement = stuck()
    planner = FlashLB(4, 2, floor=9)
    promised = planner.plan(np.repeat(heat, 2, axis=1), np.repeat(placement, 2, axis=0)).placement
    other = np.ones(8, int)
    other[promised[0, 0]] = 9
    heat = np.stack([np.tile(other, (8, 1)), loosened(promised[1:])[:, 0]], axis=1)
    for _ in range(2):
        assert planner.plan(heat, promised).layers.tolist() == [0]
        planner.forget()


def test_earlier_windows_of_other_heat_do_not_count():
    rng = np.random.default_rng(1)
    first, last = drifting(rng, 3, 64, 2)
    plans = []
    for half_life in (64, 0):
        planner = FlashLB(8, 9, half_life=half_life)
        placement = planner.plan(first, initial(3, 8, 9, 64)).placement
        plans.append(planner.plan(last, placement, every_layer=True))
    assert_same(*plans)


def test_earlier_windows_make_plans_from_few_tokens_better():
    left = np.zeros(2)  # of the excess, over twelve models: four alone say little
    for seed in range(4, 16):
        popularity = zipf(np.random.default_rng(seed), 4, 64, 0.8)
        for i, half_life in enumerate((64, 0)):
            draws = np.random.default_rng(seed + 1)
            planner, placement = FlashLB(8, 9, half_life=half_life), initial(4, 8, 9, 64)
            for _ in range(8):
                heat = window(draws, popularity, 8, 400)
                placement = planner.plan(heat, placement, every_layer=True).placement
            left[i] += (ratios(window(draws, popularity, 64), placement) - 1).mean()
    assert left[0] < 0.8 * left[1]


def test_what_came_before_a_change_is_not_remembered_again_where_tokens_are_few():
    left = []  # of the PAR, over three models: one alone says little
    for seed in range(3):
        rng = np.random.default_rng(seed)
        before, after = zipf(rng, 1, 128, 0.8), zipf(rng, 1, 128, 0.8)
        heat = np.concatenate([window(rng, before, 192, 60), window(rng, after, 176, 60)])
        unseen = window(rng, after, 400, 60)
        planner, placement, found = FlashLB(16, 9), initial(1, 16, 9, 128), []
        for now in range(64, len(heat), 8):
            placement = planner.plan(heat[now - 64 : now], placement).placement
            found.append(ratios(unseen, placement)[0])
        known = found[-13]  # 72 episodes after the change
        left.append(known / found[(192 - 64) // 8])
        assert max(found[-13:]) < known + 0.02
    assert np.mean(left) < 0.8


def test_windows_that_overlap_give_the_plans_of_their_episodes_once():
    rng = np.random.default_rng(6)
    long = np.concatenate(list(drifting(rng, 3, 64, 4)))
    plans = []
    for starts in ((0, 24), (0, 4, 8, 12, 16, 20, 24)):
        planner, placement = FlashLB(8, 9), initial(3, 8, 9, 64)
        for start in starts:
            limit = None if start in (0, 24) else 0
            heat = long[start : start + 24]
            plan = planner.plan(heat, placement, every_layer=True, max_moves=limit)
            placement = plan.placement
        plans.append(plan)
    assert plans[0]
    assert_same(*plans)


def test_a_model_of_another_shape_starts_afresh():
    rng = np.random.default_rng(7)
    planner = FlashLB(8, 9)
    for layers, experts in ((2, 64), (3, 64), (3, 60), (2, 64)):
        heat, placement = window(rng, zipf(rng, layers, experts)), initial(layers, 8, 9, experts)
        assert_same(planner.plan(heat, placement), FlashLB(8, 9).plan(heat, placement))


def sequence(planner, seed=8, windows=6):
    """Plans for drifting heat, the placement being replaced once from outside."""
    rng = np.random.default_rng(seed)
    placement, plans = initial(5, 8, 9, 64), []
    for number, heat in enumerate(drifting(rng, 5, 64, windows)):
        if number == 3:
            placement = shuffled(rng, 5, 8, 9, 64)
        plans.append(planner.plan(heat, placement, every_layer=number == 4))
        placement = plans[-1].placement
    return plans


@pytest.mark.parametrize("routing", ["uniform", "weighted", "by_source"])
@pytest.mark.parametrize("effort", ["fast", "balanced", "thorough"])
def test_equal_calls_give_equal_plans_in_any_number_of_threads(effort, routing):
    for settings in ({}, {"max_moves": 60}, {"max_layers": 2}):
        make = lambda threads, rest=settings: FlashLB(  # noqa: E731
            8, 9, effort=effort, routing=routing, threads=threads, **rest
        )
        expected = sequence(make(1))
        assert sum(map(bool, expected)) >= 3
        for threads in (1, 2, 3, 16):
            for plan, other in zip(expected, sequence(make(threads)), strict=True):
                assert_same(plan, other)


def test_nothing_is_read_or_written_behind_the_callers_back():
    rng = np.random.default_rng(9)
    heats = [heat.astype(np.float64) for heat in drifting(rng, 3, 64, 4)]
    for routing in ("uniform", "weighted", "by_source"):
        planner, twin = (FlashLB(8, 9, routing=routing, max_layers=2) for _ in range(2))
        placement = initial(3, 8, 9, 64)
        buffer, place = np.empty_like(heats[0]), np.empty_like(placement)
        for heat in heats:
            buffer[:], place[:] = heat, placement
            plan = planner.plan(buffer, place)
            assert (buffer == heat).all()
            assert (place == placement).all()
            assert_same(plan, twin.plan(heat, placement))
            for name in ("before", "placement", "columns", "par_before", "par_after", "layers"):
                for given in (buffer, place):
                    assert not np.shares_memory(getattr(plan, name), given)
            placement = plan.placement
            buffer[:] = 1  # the caller's own, to be used again
            place[:] = 0


def test_a_changed_plan_does_not_change_what_was_promised():
    heat, placement = stuck()
    planner = FlashLB(4, 2, floor=9)
    plan = planner.plan(heat, placement)
    promised = plan.placement.copy()
    plan.placement[:] = 0
    plan.par_after[:] = 0
    assert not planner.plan(loosened(promised), promised)


@pytest.mark.parametrize("routing", ["weighted", "by_source"])
def test_columns_of_a_placement_that_is_gone_are_not_relied_on(routing):
    rng = np.random.default_rng(5)
    hot_first = np.sort(zipf(rng, 3, 64, 1.2))[:, ::-1]  # the first ones have two replicas
    heat, start = window(rng, hot_first) / 2, initial(3, 8, 9, 64)
    old, new = (FlashLB(8, 9, routing=routing) for _ in range(2))
    assert (old.plan(heat, start, max_moves=0).columns > 1).any()
    ours, theirs = (planner.plan(heat, start[:, ::-1]) for planner in (old, new))
    assert_same(ours, theirs)
    assert len(ours.changed) == 3  # each of them gets columns that are known


def test_weights_that_have_become_wrong_are_seen_and_replaced():
    placement = np.array([[[0, 1], [0, 2], [0, 3], [0, 4]]])
    skewed = np.array([[[800, 500, 100, 100, 100]]] * 16)
    planner = FlashLB(4, 2, routing="weighted", min_gain=0.001, max_moves=0)
    first = planner.plan(skewed, placement)
    assert (first.placement == placement).all()
    assert len(set(first.columns[0, :, 0].tolist())) > 1
    even = np.array([[[800, 100, 100, 100, 100]]] * 16)
    stale = ratios(even, placement, first.columns)[0]
    assert stale > 1.1
    later = planner.plan(even, placement)
    assert later.par_before[0] == pytest.approx(stale, abs=1e-4)
    assert later.rerouted.tolist() == [0]
    assert ratios(even, placement, later.columns)[0] == pytest.approx(1, abs=1e-3)
    assert not planner.plan(even, placement)


def abrupt(rng, experts):
    """Popularity of episodes that is another one from the 100th on."""
    before, after = zipf(rng, 1, experts, 1)[0], zipf(rng, 1, experts, 1)[0]
    return np.concatenate([np.tile(before, (100, 1)), np.tile(after, (100, 1))])


def fading(rng, experts):
    """Popularity that becomes more even and less so."""
    skew = 1 + 0.5 * np.sin(2 * np.pi * np.arange(300) / 300)
    return zipf(rng, 1, experts, 1)[0] ** skew[:, None]


def wandering(rng, experts):
    """Popularity that walks at random."""
    steps = 0.02 * rng.normal(size=(300, experts))
    return zipf(rng, 1, experts, 1)[0] * np.exp(steps.cumsum(axis=0))


def followed(popularity, tokens, ranks, slots, seed=0, **settings):
    """PAR of the 8 episodes after each plan, from windows of 64 that overlap, as a planner's do."""
    experts = popularity.shape[1]
    popularity = popularity / popularity.sum(axis=1, keepdims=True)
    heat = np.random.default_rng(seed).poisson(tokens * popularity)[:, None]
    planner, placement, found = (
        FlashLB(ranks, slots, **settings),
        initial(1, ranks, slots, experts),
        [],
    )
    for now in range(8, len(heat), 8):
        placement = planner.plan(heat[max(0, now - 64) : now], placement).placement
        found.append(ratios(heat[now : now + 8], placement).mean())
    return np.array(found)


@pytest.mark.parametrize("family", [abrupt, fading, wandering])
@pytest.mark.parametrize(("ranks", "slots", "experts"), [(8, 9, 64), (16, 9, 128)])
def test_no_heat_that_changes_is_followed_worse_for_earlier_windows(family, ranks, slots, experts):
    excess = np.zeros(2)
    for seed in range(3):
        popularity = family(np.random.default_rng(seed), experts)
        for i, half_life in enumerate((64, 0)):
            par = followed(popularity, 20_000, ranks, slots, half_life=half_life)
            excess[i] += (par[8:] - 1).mean()
    assert excess[0] < 1.05 * excess[1]


@pytest.mark.parametrize(("ranks", "slots", "experts"), [(8, 9, 64), (32, 9, 256), (16, 18, 256)])
def test_an_abrupt_change_is_followed_before_it_fills_the_window(ranks, slots, experts):
    left = []
    for seed in range(3):  # one model in twelve takes a plan more
        par = followed(abrupt(np.random.default_rng(seed), experts), 20_000, ranks, slots)
        stale = par[12]  # the plan of the 104th episode has seen four of them: perhaps a burst
        assert stale > 1.5
        left.append((par[14] - 1) / (stale - 1))  # it has seen 20
    assert np.mean(left) < 0.2


def test_windows_of_a_single_episode_do_not_chase_what_varies():
    rng = np.random.default_rng(1)
    popularity, planner = 10**6 * zipf(rng, 2, 64, 0.9), FlashLB(8, 9)
    heat = rng.poisson(popularity * rng.gamma(20, 1 / 20, (60, *popularity.shape)))
    placement, moves = initial(2, 8, 9, 64), []
    for episode in heat:
        plan = planner.plan(episode[None], placement)
        placement = plan.placement
        moves.append(len(plan.moves))
    assert sum(moves[30:]) < 0.1 * 30 * placement.size
    assert ratios(heat[-30:], placement).mean() < 1.16
