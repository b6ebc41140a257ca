from dataclasses import replace

import numpy as np
import pytest

from flash_eplb.eplb.stress.measure import Sample
from flash_eplb.eplb.stress.setup import Setup, decoded
from flash_eplb.eplb.stress.stress import FaultRecord, Outcome
from flash_eplb.eplb.stress.verdicts import limit, verdicts

SETUP = Setup("/x", "s", 2, 8, 2, 5, "drift", 0, 64, 2, 100.0, False, 2)
SHARES = {"loop": 0.1, "planning": 0.0, "ranks": 0.5, "supervisor": 0.1}


def samples(par=1.1, unmoved=1.5, count=40, fault=False, epochs=0):
    return [
        (Sample(n / 2, 100.0, np.full(2, par), np.full(2, unmoved), n * epochs, 0), fault)
        for n in range(count)
    ]


def good(**changes):
    """The outcome of a stress in which all held."""
    return Outcome(
        **{
            "samples": samples(),
            "read": 100,
            "commits": 3,
            "checked": 6,
            "moves": 20,
            "steps": 500,
            "agree": True,
            "shares": SHARES,
            **changes,
        }
    )


def broken(outcome, setup=SETUP, policy="flashlb"):
    return [v.promise for v in verdicts(outcome, setup, policy) if v.holds is False]


def unjudged(outcome, setup=SETUP, policy="flashlb"):
    return [v.promise for v in verdicts(outcome, setup, policy) if v.holds is None]


def test_all_holds():
    found = verdicts(good(), SETUP, "flashlb")
    assert [v.holds for v in found] == [True] * 9
    figures = {v.promise: v.figure for v in found}
    assert figures["the ranks are evener"] == "PAR 1.100, 1.500 if nothing had moved"
    assert figures["it runs to its end"] == "500 steps"


@pytest.mark.parametrize(
    ("changes", "promise"),
    [
        ({"trouble": "host 0 ended with 1"}, "it runs to its end"),
        ({"longest_stall": 10.5}, "no hang"),
        ({"wrong": 1}, "no wrong weight"),
        ({"differ": 1}, "no wrong weight"),
        ({"wrong": 1, "checked": 0}, "no wrong weight"),
        ({"torn": 1}, "no torn record"),
        ({"unaccounted": 1}, "no unaccounted record"),
        ({"agree": False}, "the ranks agree"),
        ({"lost": 1}, "the planner keeps in step"),
        ({"samples": samples(par=1.6)}, "the ranks are evener"),
        ({"faults": [FaultRecord("bit-flips", 1.0, "not noticed")]}, "bit-flips"),
        ({"left": ["/eplb.s.rank.0"]}, "nothing is left behind"),
    ],
)
def test_each_promise_can_be_broken(changes, promise):
    assert broken(good(**changes)) == [promise]


def test_without_a_step_nothing_is_said_of_hangs():
    never = Outcome(trouble="the planner ended with 1")
    assert broken(never) == ["it runs to its end"]
    assert {"no hang", "the planner keeps in step", "the ranks agree"} <= set(unjudged(never))


def test_a_fault_counts_by_its_worst():
    faults = [FaultRecord("rank-slow", s, t) for s, t in [(1.0, ""), (4.2, ""), (2.0, "")]]
    found = {v.promise: v for v in verdicts(good(faults=faults), SETUP, "flashlb")}
    assert found["rank-slow"].holds
    assert found["rank-slow"].figure.startswith("3 times; ")
    assert "within 4.2 s" in found["rank-slow"].figure
    faults[1].trouble = "no plan was committed"
    assert broken(good(faults=faults)) == ["rank-slow"]


def test_what_was_not_seen_is_not_judged():
    assert unjudged(good(read=0)) == ["no torn record"]
    assert unjudged(good(checked=0)) == ["no wrong weight"]
    assert unjudged(good(samples=samples(count=6))) == ["the ranks are evener"]
    assert unjudged(good(samples=samples(fault=True))) == ["the ranks are evener"]
    assert unjudged(good(interrupted=True)) == ["no unaccounted record", "the ranks agree"]


def test_at_full_speed_the_planner_need_not_keep_up():
    setup = replace_setup(rate=0.0)
    assert unjudged(good(lost=9), setup) == ["the planner keeps in step"]


def test_of_balanced_heat_nothing_moves_after_a_while():
    setup = replace_setup(scenario="balanced")
    assert broken(good(samples=samples(par=1.0, unmoved=1.1)), setup) == []
    moving = samples(par=1.0, unmoved=1.1, epochs=1)
    assert broken(good(samples=moving), setup) == ["nothing moves without reason"]


@pytest.mark.parametrize("policy", ["static", "random"])
def test_a_policy_that_does_not_balance_is_not_judged_by_it(policy):
    assert unjudged(good(samples=samples(par=1.6)), policy=policy) == ["the ranks are evener"]


def test_ranks_are_not_called_evener_where_nothing_has_moved():
    still = good(commits=0, samples=samples(par=1.5))
    assert (unjudged(still), broken(still)) == (["the ranks are evener"], [])
    assert broken(good(commits=0), replace_setup(scenario="balanced")) == []


def test_an_adversary_is_not_judged():
    setup = replace_setup(scenario="adversarial")
    assert unjudged(good(samples=samples(par=1.6)), setup) == ["the ranks are evener"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "Nothing limits it at 100 steps/s; its loop, alone on a core, would keep up with"),
        ({"lost": 5, "shares": SHARES | {"loop": 0.9}}, "The planner's loop limits it"),
        (
            {"lost": 5},
            "Rings of EPLB_RING_STEPS=8 are too short for 100 steps/s on this machine: 5 ",
        ),
        ({"lost": 5, "shares": SHARES | {"ranks": 1.7}}, "This machine's 2 cores limit it"),
        ({"shares": SHARES | {"ranks": 1.7}}, "This machine's 2 cores limit it"),
        ({"faults": [FaultRecord("rank-slow")]}, "100 steps/s, with faults"),
        ({"shares": {}}, "What limits it was not measured."),
        ({"samples": samples()[:2]}, "Nothing limits it at 100 steps/s"),
        ({"samples": []}, "What limits it was not measured."),
        ({"trouble": "it hangs"}, "What limits it was not measured."),
    ],
)
def test_what_limits_the_planner(changes, words):
    assert limit(replace(good(most_behind=21), **changes), ring_steps=8, cores=2).startswith(words)


def test_how_deep_the_rings_had_to_be():
    assert limit(good(most_behind=21), 8, 2).endswith("The rings had to hold 21 steps.")


def test_a_setup_is_handed_on_whole():
    assert decoded(SETUP.encoded()) == SETUP


def replace_setup(**changes):
    import msgspec

    return msgspec.structs.replace(SETUP, **changes)
