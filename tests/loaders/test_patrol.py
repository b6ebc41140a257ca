import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from flash_eplb.loaders.patrol import Beat, Patrol
from flash_eplb.loaders.stager import Stager


@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 9))
def test_every_expert_has_its_turn_and_none_comes_early(layers, slots, every):
    placement = np.arange(layers * slots).reshape(layers, slots)[::-1]
    patrol = Patrol(layers, slots, every)
    steps = range(1, 2 * layers * slots * every + 1)
    beats = {step: beat for step in steps if (beat := patrol.next(step, placement))}
    assert list(beats) == [step for step in steps if step % every == 0]
    seen = list(beats.values())
    assert seen == 2 * [
        Beat(layer, slot, placement[layer, slot])
        for layer in range(layers)
        for slot in range(slots)
    ]


def test_after_a_pause_one_is_due_and_not_all_that_were_missed():
    patrol = Patrol(2, 2, 10)
    placement = np.zeros((2, 2), int)
    assert patrol.next(95, placement) is not None
    assert patrol.next(96, placement) is None
    assert patrol.next(105, placement) is not None


def test_none_is_looked_at_where_the_patrol_is_off():
    patrol = Patrol(2, 2, 0)
    assert all(patrol.next(step, np.zeros((2, 2), int)) is None for step in range(1000))


def test_looks_that_all_fail_for_one_reason_are_said_once(cluster, monkeypatch, caplog):
    group, looks = cluster(patrol_steps=1), []

    def fail(self, beat):
        looks.append(beat)
        raise MemoryError("out of memory")

    monkeypatch.setattr(Stager, "_look", fail)
    group.tick_until(lambda: len(looks) > 30)
    assert caplog.text.count("a look at a live expert failed: MemoryError") == 3  # one of each rank
