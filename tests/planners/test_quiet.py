"""That a planner which moves nothing tells why."""

import dataclasses

import numpy as np
import pytest
from heats import initial, window, zipf

from flash_eplb.planners.flashlb import FlashLB
from flash_eplb.planners.guard import checked_plan
from flash_eplb.planners.quiet import why_quiet

EXPERTS, RANKS, SLOTS = 32, 8, 5


def planned(tokens=10**6, skew=1.0, slots=SLOTS, calls=1, **settings):
    """The plan of the last of several calls on stationary heat of two layers."""
    rng = np.random.default_rng(0)
    popularity, placement = zipf(rng, 2, EXPERTS, skew), initial(2, RANKS, slots, EXPERTS)
    planner = FlashLB(RANKS, slots, **settings)
    for _ in range(calls):
        plan = planner.plan(window(rng, popularity, 16, tokens), placement)
        placement = plan.placement
    return plan


def test_a_plan_that_moves_something_needs_no_reason():
    assert planned()
    assert planned().why == ""


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"calls": 2}, "each of 2 is even enough, or as even as its last plan promised"),
        ({"min_gain": 3}, "2 of 2 uneven: 2 would win less than 3 or than moves cost"),
        ({"move_price": 100, "calls": 9, "max_moves": 1}, "uneven: 2 would win less than 0.01"),
        ({"tokens": 64, "skew": 0.0}, "no more than chance may, on the heat so far"),
        ({"slots": 4, "max_moves": 1}, "2 more, by moves that do not fit EPLB_MAX_MOVES"),
        ({"max_moves": 0}, "no move is allowed"),
    ],
)
def test_a_plan_that_moves_nothing_says_why(settings, why):
    plan = planned(**settings)
    assert not plan
    assert why in plan.why


def test_each_layer_is_counted_once():
    told = why_quiet(layers=58, uneven=6, winning=3, sure=1, min_gain=0.01)
    assert told == (
        "6 of 58 uneven: 3 would win less than 0.01 or than moves cost, "
        "2 no more than chance may, on the heat so far, "
        "1 more, by moves that do not fit EPLB_MAX_MOVES"
    )


def test_the_reason_of_a_plan_passes_the_guard_if_it_is_text():
    plan, heat = planned(calls=2), np.ones((1, 2, EXPERTS))
    assert checked_plan(plan, heat, plan.before).why == plan.why != ""
    odd = dataclasses.replace(plan, why=[plan])
    assert checked_plan(odd, heat, plan.before).why == ""
