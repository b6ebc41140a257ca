import contextlib

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flash_eplb.ipc.placement import MOVE, apply_moves, check_placement
from flash_eplb.ipc.round import (
    Round,
    RoundError,
    check_round,
    decode_round,
    encode_round,
    record_limit,
    round_identity,
)
from flash_eplb.ipc.shape import GroupShape, ModelShape

NUMBERS = st.integers(0, 2**63 - 1)
ROUNDS = st.builds(
    Round,
    generation=NUMBERS,
    plan=NUMBERS,
    sequence=NUMBERS,
    last=st.booleans(),
    epoch=NUMBERS,
    layers=NUMBERS,
    ranks=NUMBERS,
    slots=NUMBERS,
    moves=st.binary(max_size=200),
    columns=st.binary(max_size=200),
)
SHAPE = GroupShape(
    models=(ModelShape("draft", 1), ModelShape("main", 1)),
    experts=4,
    ranks=2,
    slots=3,
    counting=(0, 1),
    row_bytes=(10, 10),
    staging_rows=2,
    ring_slots=8,
)
PLACEMENT = np.array([[[0, 1, 2], [3, 0, 1]], [[0, 1, 2], [3, 2, 1]]], np.int32)


def round_of(moves, **changes):
    """A round of `moves` (rows as in MOVE, or bytes) for SHAPE."""
    if not isinstance(moves, bytes):
        moves = np.array(moves, MOVE).tobytes()
    fields = {"layers": 2, "ranks": 2, "slots": 3, **changes}
    return Round(generation=1, plan=1, sequence=1, last=True, epoch=0, moves=moves, **fields)


@given(ROUNDS)
def test_a_round_comes_back(round_):
    assert decode_round(encode_round(round_)) == round_


@given(st.lists(st.tuples(*[st.integers(-(2**31), 2**31 - 1)] * 6), max_size=5))
def test_moves_come_back(rows):
    moves = np.array(rows, MOVE)
    assert decode_round(encode_round(round_of(moves.tobytes()))).move_array().tolist() == rows


@given(ROUNDS, st.data())
def test_another_value_in_any_field_gives_another_identity(round_, data):
    field = data.draw(st.sampled_from(Round.__struct_fields__))
    value = getattr(
        data.draw(ROUNDS.filter(lambda r: getattr(r, field) != getattr(round_, field))), field
    )
    other = msgspec.structs.replace(round_, **{field: value})
    assert round_identity(encode_round(other)) != round_identity(encode_round(round_))


@given(st.binary(max_size=300))
def test_an_identity_fits_a_signed_word_and_is_not_zero(record):
    assert 0 < round_identity(record) < 2**63
    assert round_identity(record) == round_identity(bytes(record))


@given(st.binary(max_size=300))
def test_arbitrary_bytes_are_refused_or_a_round(record):
    with contextlib.suppress(RoundError):
        assert isinstance(decode_round(record), Round)


@given(ROUNDS, st.data())
def test_a_damaged_record_is_refused_or_a_round(round_, data):
    record = bytearray(encode_round(round_))
    for _ in range(data.draw(st.integers(1, 3))):
        record[data.draw(st.integers(0, len(record) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(RoundError):
        assert isinstance(decode_round(bytes(record)), Round)


WHOLE = encode_round(round_of(b"", layers=1, ranks=1, slots=1))


@pytest.mark.parametrize(
    "record",
    [
        b"",
        WHOLE[:-1],
        WHOLE + b"\x00",
        WHOLE.replace(b"Round", b"Sound"),
        WHOLE.replace(b"Round", b"Roun\xff"),
        msgspec.msgpack.encode({"type": "Round"}),
        msgspec.msgpack.encode(["Round", 2**63, 1, 1, True, 0, 1, 1, 1, b""]),
        msgspec.msgpack.encode(["Round", -1, 1, 1, True, 0, 1, 1, 1, b""]),
        msgspec.msgpack.encode(["Round", 1, 1, 1, 1, 0, 1, 1, 1, b""]),
        msgspec.msgpack.encode(["Round", 1, 1, 1, True, 0, 1, 1, 1, "text"]),
        b"\x9b" + WHOLE[1:] + b"\x91" * 100_000,
    ],
    ids=[
        "empty",
        "cut",
        "too long",
        "another type",
        "no text",
        "a map",
        "above a word",
        "below zero",
        "no truth value",
        "no bytes",
        "deeply nested",
    ],
)
def test_what_is_no_round_is_refused(record):
    assert isinstance(decode_round(WHOLE), Round)
    with pytest.raises(RoundError, match=r"^not a round: "):
        decode_round(record)


@given(
    models=st.integers(1, 3),
    ranks=st.integers(1, 4),
    slots=st.integers(1, 4),
    staging_rows=st.integers(1, 9),
)
def test_the_longest_round_fits_the_limit(models, ranks, slots, staging_rows):
    shape = GroupShape(
        tuple(ModelShape("m", 2) for _ in range(models)),
        *(1, ranks, slots, (0,), (1,) * models, staging_rows, 8),
    )
    moves = min(ranks * staging_rows, shape.layers * shape.columns)
    most = 2**63 - 1
    columns = bytes(min(moves, shape.layers) * 2 * shape.columns)
    longest = Round(
        *(most, most, most, True, most, most, most, most), bytes(moves * MOVE.itemsize), columns
    )
    assert len(encode_round(longest)) <= record_limit(shape)


def test_a_good_round_gives_the_placement_after_it():
    # rank 1 gives up a replica of expert 1 for one of expert 2 in layer 0
    round_ = round_of([(0, 2, 0, 2, 1, 2)])
    before = PLACEMENT.copy()
    after = check_round(round_, SHAPE, PLACEMENT)
    assert after.tolist() == [[[0, 1, 2], [3, 0, 2]], PLACEMENT[1].tolist()]
    assert (before == PLACEMENT).all()


@pytest.mark.parametrize(
    ("round_", "reason"),
    [
        (
            round_of([(0, 2, 0, 2, 1, 2)], slots=4),
            "made for (layers, ranks, slots) = (2, 2, 4), this group has (2, 2, 3)",
        ),
        (
            round_of([(0, 2, 0, 2, 1, 2)], ranks=3),
            "made for (layers, ranks, slots) = (2, 3, 3), this group has (2, 2, 3)",
        ),
        (
            round_of([(0, 2, 0, 2, 1, 2)], layers=1),
            "made for (layers, ranks, slots) = (1, 2, 3), this group has (2, 2, 3)",
        ),
        (round_of([]), "it moves nothing"),
        (round_of(b"x" * 25), "25 bytes of moves are no multiple of 24"),
        (round_of([(1, 0, 0, 0, 1, 0)]), "layer 1: expert 3 has no slot"),
        (
            round_of([(0, 1, 0, 1, 1, 1)]),
            "layer 0: expert 1 stands twice on rank 1",
        ),
        (
            round_of([(0, 3, 0, 1, 1, 2)]),
            "move 0: layer 0 rank 0 slot 1 holds expert 1, not expert 3",
        ),
        (round_of([(0, 3, 1, 3, 0, 1)]), "move 0: source_slot is 3; it must be in 0..2"),
        (round_of([(0, 1, 0, 1, 1, 2)]), "move 0: layer 0 rank 1 slot 2 holds expert 1 already"),
        (
            round_of([(0, 2, 0, 2, 1, 2), (0, 0, 0, 0, 1, 2)]),
            "moves 0 and 1 both write layer 0 rank 1 slot 2",
        ),
        (
            # all of it valid, but three experts come to rank 0
            round_of([(0, 0, 0, 0, 0, 1), (0, 1, 0, 1, 0, 0), (1, 3, 1, 0, 0, 2)]),
            "it fills 3 rows on one rank, EPLB_STAGING_ROWS is there for 2",
        ),
    ],
    ids=[
        "other slots",
        "other ranks",
        "other layers",
        "empty",
        "half a move",
        "drops an expert",
        "doubles an expert",
        "wrong source",
        "out of range",
        "already there",
        "same slot twice",
        "too many rows",
    ],
)
def test_a_bad_round_is_refused_with_its_reason(round_, reason):
    with pytest.raises(RoundError) as error:
        check_round(round_, SHAPE, PLACEMENT)
    assert str(error.value) == reason


def test_exactly_the_staging_rows_may_be_filled():
    round_ = round_of([(0, 0, 0, 0, 0, 1), (0, 1, 0, 1, 0, 0)])
    after = check_round(round_, SHAPE, PLACEMENT)
    assert after[0].tolist() == [[1, 0, 2], [3, 0, 1]]


NEAR = st.tuples(*[st.integers(-1, 4)] * 6)
ANY = st.tuples(*[st.integers(-(2**31), 2**31 - 1)] * 6)


@given(
    st.one_of(
        st.binary(max_size=100),
        st.lists(st.one_of(NEAR, ANY), max_size=5),
        st.lists(NEAR, max_size=2),
    )
)
def test_any_moves_are_refused_or_give_a_valid_placement(moves):
    round_ = round_of(moves)
    with contextlib.suppress(RoundError):
        after = check_round(round_, SHAPE, PLACEMENT)
        check_placement(after, SHAPE.experts)
        assert (after == apply_moves(PLACEMENT, round_.move_array())).all()
        assert np.bincount(round_.move_array()["rank"]).max() <= SHAPE.staging_rows


GOOD = [(0, 2, 0, 2, 1, 2)]  # rank 1 gives up a replica of expert 1 for one of expert 2 in layer 0


def columns_of(cells):
    return np.array(cells, "<i2").tobytes()


def test_columns_come_back_for_the_layers_that_change():
    assert round_of(GOOD).column_array() is None
    cells = [[[1, 2, 3], [4, 5, 1020]]]
    round_ = decode_round(encode_round(round_of(GOOD, columns=columns_of(cells))))
    assert round_.column_array().tolist() == cells
    check_round(round_, SHAPE, PLACEMENT)


@pytest.mark.parametrize(
    ("cells", "reason"),
    [
        ([1, 1, 1], "6 bytes of routing columns for 1 layers of 2 x 3 slots"),
        ([[[1, 0, 1], [1, 1, 1]]], "a slot has 0 routing columns; it must have 1 or more"),
        (
            [[[1, 1, 5], [1, 1, 1020]]],
            "layer 0 expert 2 has 1025 routing columns; the table holds 1024",
        ),
    ],
)
def test_columns_that_no_table_holds_are_refused(cells, reason):
    with pytest.raises(RoundError) as error:
        check_round(round_of(GOOD, columns=columns_of(cells)), SHAPE, PLACEMENT)
    assert str(error.value) == reason


BY_SOURCE = msgspec.structs.replace(SHAPE, routes_by_source=True)


def rerouting(layers, **changes):
    columns = np.ones((len(layers), SHAPE.ranks, SHAPE.slots), "<i2").tobytes()
    fields = {"moves": b"", "columns": columns, "rerouted": np.array(layers, "<i4").tobytes()}
    return msgspec.structs.replace(round_of([(0, 2, 0, 2, 1, 2)]), **fields | changes)


def test_a_round_may_change_columns_alone():
    round_ = rerouting([0])
    assert decode_round(encode_round(round_)) == round_
    assert round_.changed_layers().tolist() == [0]
    assert round_.column_array().shape == (1, SHAPE.ranks, SHAPE.slots)
    assert (check_round(round_, BY_SOURCE, PLACEMENT) == PLACEMENT).all()


@pytest.mark.parametrize(
    ("round_", "text"),
    [
        (rerouting([0], columns=b""), "moves experts or has no columns"),
        (rerouting([0], moves=round_of([(0, 2, 0, 2, 1, 2)]).moves), "moves experts or has no"),
        (rerouting([SHAPE.layers]), "they must ascend from 0 to"),
        (rerouting([-1]), "they must ascend from 0 to"),
        (rerouting([0, 0]), "they must ascend from 0 to"),
        (rerouting([0], rerouted=b"123"), "3 bytes of layers are no multiple of 4"),
        (rerouting([0], columns=bytes(2)), "bytes of routing columns for 1 layers"),
        (rerouting([0], rerouted=b""), "it moves nothing"),
    ],
)
def test_rerouting_that_does_not_fit_is_refused(round_, text):
    with pytest.raises(RoundError, match=text):
        check_round(round_, BY_SOURCE, PLACEMENT)


def test_rerouting_of_all_layers_fits_the_limit():
    layers = range(BY_SOURCE.layers)
    assert len(encode_round(rerouting(layers))) <= record_limit(BY_SOURCE)
