import numpy as np
import pytest

from flash_eplb.planners.baselines import Static
from flash_eplb.planners.engine_loop import Pace
from flash_eplb.planners.flashlb import FlashLB
from flash_eplb.planners.par import episode_par
from flash_eplb.planners.plan import make_plan
from flash_eplb.planners.recording import Counts
from flash_eplb.planners.replay import Delay, Replay, linear_placement, step_time, stretches
from flash_eplb.planners.swap import Swap

LAYERS, EXPERTS, RANKS, SLOTS = 3, 16, 4, 5
START = linear_placement(LAYERS, EXPERTS, RANKS, SLOTS)
PACE = Pace(episode_steps=4, window_episodes=8, min_episodes=4, plan_interval=4, timeout_steps=0)


def drift(steps=480, seed=0):
    """int64 [steps, layers, experts]: two topics, from the one slowly to the other."""
    random = np.random.default_rng(seed)
    topics = random.permuted(np.tile(np.arange(1, 17.0) ** -1.1, (2, LAYERS, 1)), axis=2)
    part = np.linspace(0, 1, steps)[:, None, None]
    return random.poisson(300 * ((1 - part) * topics[0] + part * topics[1]))


def play(heat, policy, delay=None, pace=PACE, start=START, spans=None):
    replay = Replay(policy, start, EXPERTS, pace, delay or Delay(4, 2, 2))
    for number, counts in enumerate(heat):
        replay.add(Counts(counts, spans[number] if spans else 1))
    return replay.outcome()


def test_static_has_the_par_of_its_placement():
    heat = drift()
    found = play(heat, Static(RANKS, SLOTS))
    steps = episode_par(heat, START).mean(axis=1)
    assert found.step_par == pytest.approx((steps.mean(), np.percentile(steps, 95)))
    episodes = episode_par(heat.reshape(-1, 4, LAYERS, EXPERTS).sum(axis=1), START).mean(axis=1)
    assert found.episode_par == pytest.approx((episodes.mean(), np.percentile(episodes, 95)))
    assert (found.steps, found.episodes) == (480, 120)
    assert (found.plans, found.moves, found.rounds, found.refused) == (0, 0, 0, 0)
    assert (found.placement == START).all()
    # the peak by other means: each replica has an even share of its expert
    peak = 0.0
    for layer in range(LAYERS):
        counts = np.bincount(START[layer].ravel(), minlength=EXPERTS)
        load = (heat[:, layer] / counts)[:, START[layer]].sum(axis=2)
        peak += load.max(axis=1).sum()
    assert found.peak == pytest.approx(peak)


def test_flashlb_beats_static_where_heat_drifts():
    heat = drift()
    static = play(heat, Static(RANKS, SLOTS))
    found = play(heat, FlashLB(RANKS, SLOTS))
    assert found.step_par[0] < static.step_par[0] - 0.1
    assert found.episode_par[0] < static.episode_par[0] - 0.1
    assert found.plans >= 2
    assert found.peak < static.peak
    assert step_time(found, static, 0.6) == pytest.approx(0.4 + 0.6 * found.peak / static.peak)
    assert step_time(static, static, 0.6) == 1
    assert step_time(found, static, 0) == 1


def test_two_replays_are_the_same_but_for_the_time_of_planning():
    heat = drift(200)
    one, two = (play(heat, FlashLB(RANKS, SLOTS)).as_json() for _ in range(2))
    for name in one:
        assert name.startswith("planning_ms") or one[name] == two[name]


class Watched(Swap):
    """Swap that notes what it is asked."""

    def __init__(self):
        super().__init__(RANKS, SLOTS)
        self.asked = []

    def plan(self, heat, placement):
        self.asked.append((heat.copy(), placement.copy()))
        return super().plan(heat, placement)


def test_a_policy_sees_the_windows_that_a_planner_would_show_it():
    heat = drift(80)
    policy = Watched()
    play(heat, policy, Delay(0, 1, 99))
    episodes = heat.reshape(-1, 4, LAYERS, EXPERTS).sum(axis=1)
    # the first at 4 episodes; its plan commits within the next one, and 4 after that is the next
    first, second = policy.asked[:2]
    assert (first[0] == episodes[:4]).all()
    assert (first[1] == START).all()
    assert (second[0] == episodes[:8]).all()
    assert (second[1] != START).any()


def test_the_next_plan_comes_an_interval_after_the_last_round_of_the_one_before():
    heat = drift(80)
    policy = Watched()
    play(heat, policy, Delay(20, 1, 99))
    episodes = heat.reshape(-1, 4, LAYERS, EXPERTS).sum(axis=1)
    # made at 4 episodes, committed at 9, and 4 more; the window holds 8
    assert (policy.asked[1][0] == episodes[5:13]).all()


class Once:
    """Turns the ranks around at the first plan."""

    def __init__(self):
        self.calls = 0

    def plan(self, heat, placement):
        self.calls += 1
        return placement[:, ::-1] if self.calls == 1 else placement


@pytest.mark.parametrize(("first", "each", "rows"), [(0, 1, 99), (5, 3, 2), (16, 8, 1)])
def test_a_round_takes_effect_at_its_step(first, each, rows):
    heat = np.tile(drift(1), (200, 1, 1))
    replay = Replay(Once(), START, EXPERTS, PACE, Delay(first, each, rows))
    changes, before, placement = [], 0, START
    for number, counts in enumerate(heat):
        replay.add(Counts(counts))
        found = replay.outcome()
        if found.rounds > before:
            changes.append(number)
            written = (found.placement != placement).sum(axis=(0, 2))
            assert written.max() <= rows
            before, placement = found.rounds, found.placement
    made = 16  # steps of four episodes
    assert changes == [made + first + n * each for n in range(len(changes))]
    assert len(changes) == (1 if rows == 99 else found.rounds)
    assert found.plans == 1
    assert (np.sort(found.placement) == np.sort(START[:, ::-1])).all()
    assert found.moves == (placement != START).sum()
    assert found.moved_per_plan == pytest.approx(found.moves / START.size)


def test_load_is_counted_under_the_placement_of_each_step():
    heat = drift(80)
    found = play(heat, Once(), Delay(0, 1, 99))
    steps = np.concatenate(
        [episode_par(heat[:16], START), episode_par(heat[16:], found.placement)]
    ).mean(axis=1)
    assert (found.placement != START).any()
    assert found.step_par[0] == pytest.approx(steps.mean())


class Weighted:
    """Once, with columns: the replica of expert 0 on the rank where it stands first has 3 of 4."""

    def __init__(self):
        self.calls = 0

    def plan(self, heat, placement):
        self.calls += 1
        wanted = placement[:, ::-1] if self.calls == 1 else placement
        plan = make_plan(placement, wanted)
        first = np.argmax(plan.placement.reshape(LAYERS, -1) == 0, axis=1)
        plan.columns.reshape(LAYERS, -1)[np.arange(LAYERS), first] = 3
        return plan


def test_planned_routing_weights_divide_the_heat():
    heat = drift(80)
    found = play(heat, Weighted(), Delay(0, 1, 99))
    pars = list(episode_par(heat[:16], START).mean(axis=1))
    for counts in heat[16:]:
        load = np.zeros((LAYERS, RANKS))
        for layer in range(LAYERS):
            slots = found.placement[layer].ravel().tolist()
            for place, expert in enumerate(slots):
                share = 1 / slots.count(expert)
                if expert == 0:
                    share = 0.75 if place == slots.index(0) else 0.25
                load[layer, place // SLOTS] += share * counts[layer, expert]
        pars.append((load.max(axis=1) / load.mean(axis=1)).mean())
    assert START[0].ravel().tolist().count(0) == 2
    assert found.step_par[0] == pytest.approx(np.mean(pars))


def test_records_of_several_steps_count_as_many():
    heat = drift(40)
    found = play(heat, Static(RANKS, SLOTS), spans=[2] * 40)
    assert (found.steps, found.episodes) == (80, 20)


def test_steps_without_tokens_do_not_count_and_layers_without_them_neither():
    heat = drift(40)
    heat[::2] = 0
    heat[:, 1] = 0
    found = play(heat, Static(RANKS, SLOTS))
    assert (found.steps, found.episodes) == (20, 5)
    expected = episode_par(heat[1::2][:, [0, 2]], START[[0, 2]]).mean()
    assert found.step_par[0] == pytest.approx(expected)


def test_a_policy_that_fails_is_counted_and_the_replay_goes_on(caplog):
    class Failing:
        def plan(self, heat, placement):
            raise ZeroDivisionError("bug")

    found = play(drift(80), Failing())
    assert found.refused == 5  # at 4, 8, 12, 16 and 20 episodes
    assert found.plans == 0
    assert "the policy failed" in caplog.text


def test_nothing_at_all_is_none_in_json():
    found = play(drift(0), Static(RANKS, SLOTS)).as_json()
    assert found["step_par_mean"] is None
    assert found["episode_par_p95"] is None
    assert found["steps"] == 0


@pytest.mark.parametrize(("experts", "ranks", "slots"), [(9, 2, 4), (3, 2, 4)])
def test_a_shape_that_no_placement_has_is_refused(experts, ranks, slots):
    with pytest.raises(ValueError, match=f"{experts} experts on {ranks} ranks x {slots} slots: "):
        linear_placement(1, experts, ranks, slots)


def test_vllm_s_start_is_valid_wherever_a_shape_is():
    found = linear_placement(2, 6, 2, 4)
    assert found.tolist() == [[[0, 1, 2, 3], [4, 5, 0, 1]]] * 2


def test_stretches_are_means_of_equal_parts():
    assert stretches([], 5) == []
    assert stretches([1.0, 3.0], 5) == [1.0, 3.0]
    assert stretches([1.0, 2.0, 3.0, 6.0], 2) == [1.5, 4.5]
    assert len(stretches([1.0] * 1001, 240)) == 240
