import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flash_eplb.ipc.flags import FLAG_DECODE, FLAG_DUMMY, FLAG_PREFILL
from flash_eplb.ipc.heat_ring import HeatRecords
from flash_eplb.ipc.shape import GroupShape, ModelShape
from flash_eplb.planners.step_heat import Part, StepMatcher, group_heat

MIXED = FLAG_PREFILL | FLAG_DECODE


def records(*rows):
    """HeatRecords of (step, span, epoch, heat) rows, of one layer and one column."""
    steps, spans, epochs, heat = (np.array(column) for column in zip(*rows, strict=True))
    zeros = np.zeros(len(steps), np.int64)
    return HeatRecords(steps, zeros, zeros, zeros, epochs, spans, heat.reshape(-1, 1, 1))


def singly(*steps, epoch=0):
    return records(*[(step, 1, epoch, 10**step) for step in steps])


def taken(matcher):
    """(step, span, epoch, heat per rank) of each match."""
    return [
        (parts[0].step, parts[0].span, parts[0].epoch, [int(part.heat.sum()) for part in parts])
        for parts in matcher.take()
    ]


def test_a_step_is_matched_when_every_rank_has_it():
    matcher = StepMatcher(3, 64)
    matcher.add(0, singly(1, 2))
    matcher.add(1, singly(1, 2, 3))
    assert taken(matcher) == []
    matcher.add(2, singly(1))
    assert taken(matcher) == [(1, 1, 0, [10] * 3)]
    matcher.add(2, singly(2, 3))
    assert taken(matcher) == [(2, 1, 0, [100] * 3)]
    matcher.add(0, singly(3))
    assert taken(matcher) == [(3, 1, 0, [1000] * 3)]
    assert matcher.unmatched == 0


def test_a_rank_that_records_several_steps_as_one_is_matched_with_the_others_sums():
    matcher = StepMatcher(2, 64)
    matcher.add(0, singly(1, 2, 3, 4, 5, 6))
    matcher.add(1, records((1, 1, 0, 7), (4, 3, 0, 8), (5, 1, 0, 9), (7, 2, 0, 9)))
    assert taken(matcher) == [
        (1, 1, 0, [10, 7]),
        (4, 3, 0, [11_100, 8]),
        (5, 1, 0, [10**5, 9]),
    ]
    matcher.add(0, singly(7))
    assert taken(matcher) == [(7, 2, 0, [11_000_000, 9])]
    assert matcher.unmatched == 0


def test_the_sum_of_several_records_may_need_more_bits_than_each_of_them():
    most = np.iinfo(np.int32).max
    matcher = StepMatcher(2, 64)
    for rank, rows in enumerate([((1, 1, 0, most), (2, 1, 0, most)), ((2, 2, 0, most),)]):
        as_read = records(*rows)
        matcher.add(rank, as_read._replace(heat=as_read.heat.astype(np.int32)))
    assert taken(matcher) == [(2, 2, 0, [2 * most, most])]


def test_spans_that_overlap_are_matched_where_they_end_together():
    matcher = StepMatcher(2, 64)
    matcher.add(0, records((2, 2, 0, 1), (4, 2, 0, 10), (5, 1, 0, 100)))
    matcher.add(1, records((1, 1, 0, 1), (3, 2, 0, 10), (5, 2, 0, 100)))
    assert taken(matcher) == [(5, 5, 0, [111, 111])]


@pytest.mark.parametrize("lost", [2, 3])
def test_a_step_that_one_rank_lost_is_left_out_and_counted(lost):
    matcher = StepMatcher(2, 64)
    matcher.add(0, singly(1, 2, 3, 4))
    matcher.add(1, singly(*[step for step in (1, 2, 3, 4) if step != lost]))
    assert [match[0] for match in taken(matcher)] == [s for s in (1, 2, 3, 4) if s != lost]
    assert matcher.unmatched == 1


def test_the_ranks_need_not_begin_with_the_same_step():
    matcher = StepMatcher(2, 64)
    matcher.add(0, singly(4, 5, 6, 7))
    matcher.add(1, singly(6, 7))
    assert [match[0] for match in taken(matcher)] == [6, 7]
    assert matcher.unmatched == 0


def test_steps_of_different_epochs_are_not_mixed():
    matcher = StepMatcher(2, 64)
    matcher.add(0, records((1, 1, 0, 1), (2, 1, 0, 1), (3, 1, 1, 1), (4, 1, 1, 1)))
    matcher.add(1, records((1, 1, 0, 1), (2, 1, 1, 1), (4, 2, 1, 1)))
    assert [match[:3] for match in taken(matcher)] == [(1, 1, 0), (4, 2, 1)]
    assert matcher.unmatched == 1
    matcher.add(0, records((5, 1, 1, 1), (6, 1, 2, 1)))
    matcher.add(
        1,
        records(
            (6, 2, 2, 1),
        ),
    )
    assert taken(matcher) == []  # its two steps lie on both sides of a commit
    assert matcher.unmatched == 3


def test_a_silent_rank_does_not_let_the_others_pile_up():
    matcher = StepMatcher(2, 8)
    for step in range(1, 101):
        matcher.add(0, records((step, 1, 0, step)))
    matcher.add(1, records(*[(step, 1, 0, step) for step in range(95, 101)]))
    assert [match[0] for match in taken(matcher)] == [*range(95, 101)]


@given(st.data())
def test_what_is_matched_covers_the_same_steps_of_every_rank_and_the_rest_is_counted(data):
    ranks, steps = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 30))
    matcher = StepMatcher(ranks, 64)
    for rank in range(ranks):
        cuts = sorted({*data.draw(st.sets(st.integers(1, steps))), steps})
        rows = [
            (end, end - start, 0, (2**end - 1) - (2**start - 1))
            for start, end in zip([0, *cuts], cuts, strict=False)
            if end == steps or data.draw(st.integers(0, 5))
        ]
        matcher.add(rank, records(*rows))
    matched = 0
    for step, span, _, heats in taken(matcher):
        # the heat of step k is 2**k, so a sum tells which steps are in it
        assert heats == [2**step - 2 ** (step - span)] * ranks
        matched += span
    assert matched + matcher.unmatched <= steps
    assert matched > 0 or ranks > 1


SHAPE = {
    "models": (ModelShape("m", 1),),
    "experts": 2,
    "ranks": 2,
    "slots": 2,
    "counting": (0, 1),
    "row_bytes": (1,),
    "staging_rows": 1,
    "ring_slots": 8,
}
OF_ALL = GroupShape(**SHAPE)
OF_OWN = GroupShape(**SHAPE, counts_own_slots=True)


def parts(*flags, columns=4):
    return [
        Part(9, flag, 3, 2, np.full((1, columns), 10**rank, np.int32))
        for rank, flag in enumerate(flags)
    ]


def test_heat_over_all_slots_is_added_up():
    step = group_heat(parts(0, 0), OF_ALL, "all")
    assert (step.step, step.epoch, step.span) == (9, 3, 2)
    assert step.heat.tolist() == [[11] * 4]
    assert step.heat.dtype == np.int64


def test_heat_of_own_slots_is_put_side_by_side():
    step = group_heat(parts(0, 0, columns=2), OF_OWN, "all")
    assert step.heat.tolist() == [[1, 1, 10, 10]]


@pytest.mark.parametrize(
    ("phase", "flags", "counted"),
    [
        ("all", (FLAG_PREFILL, FLAG_DECODE), 11),
        ("all", (FLAG_DUMMY, FLAG_DECODE), 10),
        ("all", (0, FLAG_DUMMY), 1),
        ("all", (FLAG_DUMMY, FLAG_DUMMY), None),
        ("prefill", (FLAG_PREFILL, FLAG_DECODE), 1),
        ("prefill", (MIXED, FLAG_PREFILL), 11),
        ("prefill", (0, FLAG_DECODE), None),
        ("decode", (FLAG_PREFILL, FLAG_DECODE), 10),
        ("decode", (FLAG_DUMMY, FLAG_DECODE), 10),
        ("decode", (MIXED, 0), None),
    ],
)
def test_each_ranks_own_batch_counts_in_the_phase_that_was_asked_for(phase, flags, counted):
    step = group_heat(parts(*flags), OF_ALL, phase)
    assert (None if step is None else step.heat[0, 0]) == counted


@pytest.mark.parametrize(
    ("phase", "flags", "counts"),
    [
        ("all", (FLAG_DUMMY, 0), True),
        ("all", (FLAG_DUMMY, FLAG_DUMMY), False),
        ("prefill", (FLAG_PREFILL, FLAG_DECODE), True),
        ("decode", (FLAG_PREFILL, FLAG_DECODE), False),
        ("decode", (FLAG_DUMMY, FLAG_DECODE), True),
    ],
)
def test_where_slots_count_what_arrives_the_steps_phase_is_that_of_all_batches(
    phase, flags, counts
):
    assert (group_heat(parts(*flags, columns=2), OF_OWN, phase) is not None) == counts


def test_a_part_is_a_dummy_only_if_all_of_its_steps_are():
    dummy, real = parts(FLAG_DUMMY, 0)
    assert dummy.followed_by(dummy).flags == FLAG_DUMMY
    assert dummy.followed_by(real).flags == real.followed_by(dummy).flags == 0
    assert dummy.followed_by(real).heat.tolist() == [[11] * 4]


def test_what_is_known_of_the_batches_goes_with_their_heat():
    dummy, real = parts(FLAG_DUMMY, FLAG_DECODE)
    told = [dummy._replace(time=9, tokens=5), real._replace(time=8, tokens=7)]
    step = group_heat(told, OF_ALL, "all")
    assert (step.time, step.tokens, step.flags) == (8, 7, FLAG_DECODE)
    own = [part._replace(heat=part.heat[:, :2]) for part in told]
    step = group_heat(own, OF_OWN, "all")
    assert (step.time, step.tokens, step.flags) == (9, 7, FLAG_DECODE)
    both = told[1].followed_by(told[1]._replace(time=10, tokens=3))
    assert (both.time, both.tokens) == (10, 10)


def test_where_ranks_run_the_same_tokens_they_count_once():
    shape = GroupShape(**SHAPE | {"counting": (0,)}, counts_own_slots=True)
    told = [part._replace(tokens=7) for part in parts(0, 0, columns=2)]
    assert group_heat(told, shape, "all").tokens == 7


def test_the_ring_s_time_and_tokens_reach_the_part():
    matcher = StepMatcher(1, 8)
    found = records((1, 1, 0, 5))
    matcher.add(0, found._replace(times=np.array([3]), tokens=np.array([4])))
    ((part,),) = matcher.take()
    assert (part.time, part.tokens) == (3, 4)
