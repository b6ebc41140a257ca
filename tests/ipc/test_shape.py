"""What a header may say of a group: the bounds of each number, and how they fit together."""

import os
import sys
from pathlib import Path

import msgspec
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from fuzz_targets import SHAPE, header_of

from flash_eplb.ipc.liveness import SegmentError
from flash_eplb.ipc.names import rank_name
from flash_eplb.ipc.rank_segment import RankHeader, RankSegment, check_header, segment_bytes
from flash_eplb.ipc.shape import MOST_CELLS, ModelShape, ShapeError, check_shape

FIELDS = msgspec.to_builtins(SHAPE)
NAME = rank_name("a", 0)


def refusal(header):
    """The one sentence with which a segment of this header is refused."""
    with pytest.raises(SegmentError) as error:
        check_header(NAME, header, segment_bytes(SHAPE))
    text = str(error.value)
    assert text.startswith(f"shared memory {NAME} ")
    assert text.isprintable()
    assert len(text) < 500
    return text


def test_the_header_that_a_worker_writes_is_accepted():
    found = check_header(NAME, header_of("a"), segment_bytes(SHAPE))
    assert found == RankHeader(SHAPE, 0, "a")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"experts": 0}, "Expected `int` >= 1 - at `$.shape.experts`"),
        ({"experts": 2**15}, "Expected `int` <= 32767 - at `$.shape.experts`"),
        ({"experts": 10**18}, "Expected `int` <= 32767 - at `$.shape.experts`"),
        ({"ranks": 0}, "Expected `int` >= 1 - at `$.shape.ranks`"),
        ({"ranks": -1}, "Expected `int` >= 1 - at `$.shape.ranks`"),
        ({"ranks": 10**6}, "Expected `int` <= 4096 - at `$.shape.ranks`"),
        ({"slots": -3}, "Expected `int` >= 1 - at `$.shape.slots`"),
        ({"slots": 2**64 - 1}, "Expected `int` <= 32767 - at `$.shape.slots`"),
        ({"ring_slots": 0}, "Expected `int` >= 1 - at `$.shape.ring_slots`"),
        ({"ring_slots": -1}, "Expected `int` >= 1 - at `$.shape.ring_slots`"),
        ({"ring_slots": 10**18}, "Expected `int` <= 1048576 - at `$.shape.ring_slots`"),
        ({"staging_rows": -5}, "Expected `int` >= 1 - at `$.shape.staging_rows`"),
        ({"models": []}, "Expected `array` of length >= 1 - at `$.shape.models`"),
        ({"models": [{"name": "m", "layers": -2}]}, "at `$.shape.models[0].layers`"),
        ({"models": [{"name": "m", "layers": 10**18}]}, "at `$.shape.models[0].layers`"),
        ({"counting": []}, "Expected `array` of length >= 1 - at `$.shape.counting`"),
        ({"counting": [0, 2]}, "counting names rank 2; ranks are 0..1"),
        ({"counting": [-1]}, "counting names rank -1; ranks are 0..1"),
        ({"counting": [1, 1]}, "counting names a rank twice"),
        ({"row_bytes": [1]}, "row_bytes has 1 entries for 2 layers"),
        ({"row_bytes": [1, 0]}, "Expected `int` >= 1 - at `$.shape.row_bytes[1]`"),
        ({"experts": 7}, "7 experts on 2 ranks x 3 slots: every expert needs a slot"),
        ({"experts": 2}, "2 experts on 2 ranks x 3 slots: every expert needs a slot, and no rank"),
        ({"of_version_3": 1}, "Object contains unknown field `of_version_3`"),
        ({"\n\x1b[2J" * 99: 1}, "unknown field `??[2J??[2J"),
        ({"experts": None}, "Expected `int`, got `None` - at `$.shape.experts`"),
    ],
)
def test_a_shape_that_no_group_has_is_refused(changes, reason):
    text = refusal(header_of("a", shape=FIELDS | changes))
    assert reason in text
    assert text.endswith("; run the same flash_eplb in the workers and the planner")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"rank": 2}, "has a wrong header: it says rank 2 of 2 ranks"),
        ({"rank": -1}, "Expected `int` >= 0 - at `$.rank`"),
        ({"session": "x" * 33}, "Expected `str` of length <= 32 - at `$.session`"),
        ({"later": 1}, "Object contains unknown field `later`"),
        ({"shape": 1}, "Expected `object`, got `int` - at `$.shape`"),
        ({"rank": 1}, "was made as '/eplb.a.rank.1' and has got this name since; remove it"),
        ({"session": "b"}, "was made as '/eplb.b.rank.0' and has got this name since; remove it"),
        ({"session": "b\n"}, r"was made as '/eplb.b\n.rank.0' and has got this name since"),
    ],
)
def test_a_header_of_another_segment_is_refused(changes, reason):
    assert reason in refusal(header_of("a", **changes))


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"\xc0",
        msgspec.msgpack.encode({"rank": "x"}),
        b"\x81\xa4ran\xff\x01",
        b"\x91" * 9999,
        b"\xdf\xff\xff\xff\xff",
        os.urandom(100),
    ],
)
def test_a_header_that_describes_no_rank_is_refused(header):
    assert "has a wrong header: it describes no rank: " in refusal(header)


def test_cells_without_number_are_refused():
    layers = MOST_CELLS // 2**15
    wide = msgspec.structs.replace(
        SHAPE, ranks=1, slots=2**15 - 1, experts=2**15 - 1, counting=(0,), row_bytes=(1,) * layers
    )
    check_shape(msgspec.structs.replace(wide, models=(ModelShape("m", layers),)))
    more = msgspec.structs.replace(
        wide, models=(ModelShape("m", layers + 1),), row_bytes=(1,) * (layers + 1)
    )
    with pytest.raises(
        ShapeError, match="129 layers x 1 ranks x 32767 slots are more than 4194304"
    ):
        check_shape(more)


def test_a_worker_does_not_make_what_nobody_opens(session):
    for shape, rank, reason in [
        (msgspec.structs.replace(SHAPE, experts=7), 0, "7 experts on 2 ranks x 3 slots"),
        (msgspec.structs.replace(SHAPE, ring_slots=0), 0, "Expected `int` >= 1"),
        (SHAPE, 2, "it says rank 2 of 2 ranks"),
    ]:
        with pytest.raises(
            SegmentError, match=f"^EP rank {rank} cannot describe its group: "
        ) as error:
            RankSegment.create(session, shape, rank, 1)
        assert reason in str(error.value)
        assert not os.path.exists(f"/dev/shm{rank_name(session, rank)}")
