"""What FlashLB refuses, and how it says so."""

import numpy as np
import pytest
from checker import assert_leads, assert_measured, assert_same
from heats import initial, window, zipf

import flash_eplb
from flash_eplb.ipc.placement import PlacementError
from flash_eplb.planners.flashlb import FlashLB
from flash_eplb.planners.plan import Plan

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("argument", "value", "allowed"),
    [
        ("ranks", 0, "it must be a whole number of at least 1 and at most 1024"),
        ("ranks", 1025, "it must be a whole number of at least 1 and at most 1024"),
        ("ranks", 2.5, "it must be a whole number of at least 1"),
        ("ranks", "4", "it must be a whole number of at least 1"),
        ("slots_per_rank", 0, "it must be a whole number of at least 1"),
        ("slots_per_rank", True, "it must be a whole number of at least 1"),
        ("ranks_per_node", 0, "it must be a whole number of at least 1"),
        ("effort", "slow", "it must be one of fast, balanced, thorough"),
        ("effort", None, "it must be one of fast, balanced, thorough"),
        ("routing", "x", "it must be one of uniform, weighted, by_source"),
        ("max_columns", 3, "it must be a whole number of at least 4"),
        ("max_columns", 1024.0, "it must be a whole number of at least 4"),
        ("threads", 0, "it must be a whole number of at least 1"),
        ("max_moves", -1, "it must be a whole number of at least 0"),
        ("max_moves", 2.0, "it must be a whole number of at least 0"),
        ("max_layers", -1, "it must be a whole number of at least 0"),
        ("max_layers", False, "it must be a whole number of at least 0"),
        *[
            (name, value, "it must be a finite number of at least 0")
            for name in ("min_excess", "min_gain", "move_price", "floor", "tolerance", "half_life")
            for value in (-0.1, NAN, INF, "1", None, True)
        ],
    ],
)
def test_settings_out_of_range_are_named(argument, value, allowed):
    with pytest.raises(ValueError) as error:
        FlashLB(**{"ranks": 4, "slots_per_rank": 2, argument: value})
    assert str(error.value).startswith(f"{argument} is {value!r}; {allowed}")


@pytest.mark.parametrize("most", [3, 1024, 1025, 2**15, 2**40])
def test_columns_stay_true_or_are_refused_beyond_what_an_engine_holds(most):
    heat = np.array([[[900, 10, 200, 30]]])
    try:
        planner = FlashLB(3, 2, routing="weighted", max_columns=most)
    except ValueError as error:
        assert most > 1024
        assert str(error).startswith(f"max_columns is {most}; it must be")  # noqa: PT017
        return
    assert most <= 1024
    for slots in (initial(1, 3, 2, 4), np.array([[[0, 1], [2, 0], [0, 3]]])):
        assert_measured(planner.plan(heat, slots, every_layer=True), heat)


def test_settings_that_numpy_made_are_taken():
    planner = FlashLB(np.int64(2), np.uint8(2), max_moves=np.int32(1), min_gain=np.float32(0.01))
    assert planner.plan(np.ones((1, 1, 4)), initial(1, 2, 2, 4)).moves.size == 0


@pytest.mark.parametrize("value", [-1, 1.5, "3", True])
def test_a_limit_that_is_none_is_named(value):
    with pytest.raises(ValueError) as error:
        FlashLB(4, 2).plan(np.ones((3, 2, 8)), initial(2, 4, 2, 8), max_moves=value)
    assert str(error.value).startswith(f"max_moves is {value!r}; it must be a whole number")


@pytest.mark.parametrize(
    ("heat", "message"),
    [
        (np.zeros((2, 8)), "heat is float64 of shape (2, 8); it must be real numbers"),
        (np.zeros((1, 1, 2, 8)), "heat is float64 of shape (1, 1, 2, 8); it must be real numbers"),
        (np.zeros((0, 2, 8)), "heat is float64 of shape (0, 2, 8); it must be real numbers"),
        (np.zeros((1, 2, 8), complex), "heat is complex128 of shape (1, 2, 8)"),
        (np.zeros((1, 2, 8), bool), "heat is bool of shape (1, 2, 8)"),
        (np.zeros((1, 2, 8), object), "heat is object of shape (1, 2, 8)"),
        (np.zeros((1, 2, 8), "U3"), "heat is <U3 of shape (1, 2, 8)"),
        (np.zeros((1, 2, 8), "m8[s]"), "heat is timedelta64[s] of shape (1, 2, 8)"),
        (None, "heat is object of shape ()"),
        ([[[1, 2], [3]]], "heat is no array: "),
        (np.zeros((1, 3, 8)), "placement has shape (2, 4, 2); it must be (3, 4, 2)"),
        (np.zeros((1, 2, 9)), "placement: layer 0: expert 8 has no slot"),
        (np.zeros((1, 2, 7)), "placement: layer 0: rank 3 slot 1 holds expert 7"),
    ],
)
def test_heat_of_the_wrong_form_is_named(heat, message):
    with pytest.raises(ValueError) as error:
        FlashLB(4, 2).plan(heat, initial(2, 4, 2, 8))
    assert str(error.value).startswith(message)


def test_a_placement_of_rows_of_several_lengths_is_named():
    with pytest.raises(ValueError, match=r"^placement is no array: .*; give rows of one length$"):
        FlashLB(4, 2).plan(np.ones((3, 1, 8)), [[[0, 1], [2, 3], [4, 5], [6]]])


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("value", [NAN, INF, -INF, -1.0])
def test_an_unfit_value_of_heat_is_named(value, dtype):
    heat = np.ones((3, 2, 8), dtype)
    heat[2, 1, 5] = value
    with pytest.raises(ValueError) as error:
        FlashLB(4, 2).plan(heat, initial(2, 4, 2, 8))
    assert str(error.value) == f"heat[2, 1, 5] is {value}; it must be finite and at least 0"


def test_a_negative_count_is_named():
    heat = np.ones((3, 2, 8), np.int8)
    heat[1, 0, 7] = -128
    with pytest.raises(
        ValueError, match=r"^heat\[1, 0, 7\] is -128; it must be finite and at least"
    ):
        FlashLB(4, 2).plan(heat, initial(2, 4, 2, 8))


@pytest.mark.parametrize(
    ("rank", "experts", "message"),
    [
        (3, [7, 7], "placement: layer 1: expert 7 stands twice on rank 3"),
        (3, [6, 0], "placement: layer 1: expert 7 has no slot"),
        (2, [8, 5], "placement: layer 1: rank 2 slot 0 holds expert 8; experts are 0..7"),
        (2, [4, -1], "placement: layer 1: rank 2 slot 1 holds expert -1; experts are 0..7"),
    ],
)
def test_an_invalid_placement_is_named(rank, experts, message):
    placement = initial(2, 4, 2, 8)
    placement[1, rank] = experts
    with pytest.raises(PlacementError) as error:
        FlashLB(4, 2).plan(np.ones((3, 2, 8)), placement)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize("shape", [(2, 4, 3), (2, 2, 4), (1, 4, 2), (2, 8), (2, 4, 2, 1)])
def test_a_placement_of_the_wrong_shape_is_named(shape):
    with pytest.raises(ValueError) as error:
        FlashLB(4, 2).plan(np.ones((3, 2, 8)), np.zeros(shape, int))
    message = f"placement has shape {shape}; it must be (2, 4, 2)"
    assert str(error.value).startswith(message)


def test_a_placement_that_is_not_whole_numbers_is_named():
    with pytest.raises(PlacementError, match="placement is float64"):
        FlashLB(4, 2).plan(np.ones((3, 2, 8)), initial(2, 4, 2, 8).astype(float))


def test_a_refused_call_leaves_no_trace():
    rng = np.random.default_rng(1)
    popularity = zipf(rng, 2, 64)
    planner, twin = FlashLB(8, 9), FlashLB(8, 9)
    placement = initial(2, 8, 9, 64)
    for _ in range(3):
        heat = window(rng, popularity, 8, 2000)
        other = window(rng, popularity, 8, 2000)
        broken = other.astype(float)
        broken[-1, -1, -1] = NAN
        lost = placement.copy()
        lost[0, 0, 0] = lost[0, 0, 1]
        for bad in ((broken, placement), (other, lost), (other, placement, False, -1)):
            with pytest.raises(ValueError):
                planner.plan(*bad)
        plan = planner.plan(heat, placement, every_layer=True)
        assert_same(plan, twin.plan(heat, placement, every_layer=True))
        placement = plan.placement


def test_plain_lists_are_taken():
    plan = FlashLB(2, 2).plan([[[9, 9, 1, 1]]] * 4, [[[0, 1], [2, 3]]])
    assert_leads(plan, np.array([[[0, 1], [2, 3]]]), 4)
    np.testing.assert_allclose(plan.par_after, 1)


def test_sources_on_the_same_node_come_first():
    heat = np.array([[[8, 1, 1, 1, 8, 1]]] * 4)
    placement = np.array([[[4, 1], [2, 4], [0, 3], [0, 5]]])  # nodes: ranks 0 and 1, 2 and 3
    for near in (None, 2):
        plan = FlashLB(4, 2, ranks_per_node=near).plan(heat, placement)
        assert plan.ranks_per_node == near
        assert_leads(plan, placement, 6)


def test_the_package_names_it():
    assert flash_eplb.FlashLB is FlashLB
    assert flash_eplb.Plan is Plan
