import numpy as np
import pytest

from flash_eplb.planners.episodes import EpisodeWindow
from flash_eplb.planners.flashlb import FlashLB
from flash_eplb.planners.offline import Trial, all_episodes, measure, plan_offline
from flash_eplb.planners.par import episode_par, par
from flash_eplb.planners.policy import PolicyError
from flash_eplb.planners.recording import Counts, RecordingError
from flash_eplb.planners.replay import linear_placement
from flash_eplb.planners.step_heat import StepHeat

LAYERS, EXPERTS, RANKS, SLOTS = 5, 16, 4, 5
START = linear_placement(LAYERS, EXPERTS, RANKS, SLOTS)


def steps(count=96, seed=0):
    """int64 [steps, layers, experts]: one topic, then another; every fifth step is idle."""
    random = np.random.default_rng(seed)
    topics = random.permuted(np.tile(np.arange(1, 17.0) ** -1.1, (2, LAYERS, 1)), axis=2)
    late = np.arange(count) >= count // 2
    heat = random.poisson(300 * topics[late.astype(int)])
    heat[4::5] = 0
    return heat


def counts(heat, spans=None):
    return (Counts(each, spans[n] if spans else 1) for n, each in enumerate(heat))


def plan(make_policy, heat, at_once=2, told=None):
    tell = (lambda layers: None) if told is None else told.append
    return plan_offline("mine", make_policy, heat, START, at_once, tell)


@pytest.mark.parametrize("spans", [None, [1, 3, 2] * 32])
def test_episodes_are_those_of_a_planner(spans):
    heat = steps()
    window = EpisodeWindow(LAYERS, EXPERTS, 1, 4, 1000)
    window.learn(0, np.tile(np.arange(EXPERTS), (LAYERS, 1)))
    for each in counts(heat, spans):
        window.add(StepHeat(0, 0, each.heat, each.span))
    assert (all_episodes(counts(heat, spans), 4) == window.heat()).all()


def test_too_few_steps_for_an_episode_are_said():
    with pytest.raises(RecordingError, match=r"^there are no 4 steps with tokens, which make"):
        all_episodes(counts(steps(5)[1:]), 4)  # one of them is idle


def test_flashlb_is_asked_for_every_layer():
    heat = all_episodes(counts(steps()), 4)
    quiet = {"min_excess": 9.0, "min_gain": 9.0}  # with which it would leave all alone
    found = plan(lambda: FlashLB(RANKS, SLOTS, **quiet), heat)
    assert (par(heat, found) < par(heat, START) - 0.1).all()
    whole = FlashLB(RANKS, SLOTS).plan(heat, START, every_layer=True).placement
    assert (found == whole).all()


@pytest.mark.parametrize("at_once", [1, 2, 5, 9])
def test_layers_are_planned_in_parts_and_told(at_once):
    heat = all_episodes(counts(steps()), 4)
    shapes, told = [], []

    class Turned:
        def plan(self, heat, placement):
            shapes.append(heat.shape)
            heat[:], placement[:] = 0, placement[:, ::-1]  # which are its own
            return placement

    before = heat.copy()
    found = plan(Turned, heat, at_once, told)
    assert (np.sort(found) == np.sort(START[:, ::-1])).all()
    assert (heat == before).all()
    assert sum(told) == LAYERS
    assert [shape[1] for shape in shapes] == told
    assert max(told) == min(at_once, LAYERS)


def test_a_policy_that_fails_or_returns_nonsense_is_said():
    heat = all_episodes(counts(steps()), 4)

    class Wrong:
        def plan(self, heat, placement):
            return placement * 0

    class Failing:
        def plan(self, heat, placement):
            raise SystemExit("enough")

    with pytest.raises(PolicyError) as error:
        plan(Wrong, heat)
    assert str(error.value) == (
        "what EPLB_POLICY='mine' returned is refused: layer 0: expert 0 stands twice on rank 0"
    )
    with pytest.raises(PolicyError, match=r"^EPLB_POLICY='mine' failed: SystemExit: enough$"):
        plan(Failing, heat)


def test_placements_are_measured_in_one_reading_from_their_episode_on():
    heat = steps()
    busy = heat[heat.any(axis=(1, 2))]
    other = START[:, ::-1].copy()
    other[:, 0], other[:, 3] = START[:, 1], START[:, 0]
    other[:, 1], other[:, 2] = START[:, 3], START[:, 2]
    trials = [Trial(START), Trial(START, 10), Trial(other, 10)]
    found = measure(counts(heat), trials, EXPERTS, 4)
    later = busy[10 * 4 :]
    for outcome, part, placement in zip(
        found, (busy, later, later), (START, START, other), strict=True
    ):
        assert outcome.steps == len(part)
        ratios = episode_par(part, placement).mean(axis=1)
        assert outcome.step_par[0] == pytest.approx(ratios.mean())
        whole = len(part) // 4 * 4
        episodes = part[:whole].reshape(-1, 4, LAYERS, EXPERTS).sum(axis=1)
        assert outcome.episodes == len(episodes)
        ratios = episode_par(episodes, placement).mean(axis=1)
        assert outcome.episode_par[0] == pytest.approx(ratios.mean())
        assert outcome.plans == 0
    assert found[0].peak > found[1].peak
