"""A round of a plan on the wire, and the checks that every loader makes before it believes one."""

from __future__ import annotations

import hashlib
from typing import Annotated

import msgspec
import numpy as np

from .placement import MOVE, PlacementError, apply_moves, check_placement, try_moves
from .shape import GroupShape, one_line

MOST_COLUMNS = 1024
"""Routing columns that an expert may have: the width of vLLM's table."""

Number = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
"""What fits into a shared word; a record with other numbers is refused."""


class RoundError(ValueError):
    """A round that must not be carried out; the text says what is wrong with it."""


class Round(msgspec.Struct, frozen=True, tag=True, array_like=True, forbid_unknown_fields=True):
    """One step from a valid placement to the next: the slots to be written, all at once.

    Attributes:
        generation: of the planner that wrote it.
        plan: number of the plan within the generation; a higher one supersedes a lower one.
        sequence: number of the round within the generation.
        last: whether this is the plan's last round.
        epoch: number of committed rounds that it starts from.
        layers, ranks, slots: shape of the placement it was made for.
        moves: `MOVE` records, as bytes.
        columns: int16[n, ranks, slots] of the n layers that it changes, by their numbers, as bytes:
            routing columns of each slot after the round; empty if all slots have one.
        rerouted: int32[n], ascending, as bytes: of a round that moves nothing, the layers whose
            columns change.
    """

    generation: Number
    plan: Number
    sequence: Number
    last: bool
    epoch: Number
    layers: Number
    ranks: Number
    slots: Number
    moves: bytes
    columns: bytes = b""
    rerouted: bytes = b""

    def move_array(self) -> np.ndarray:
        """The moves as a `MOVE` array."""
        if len(self.moves) % MOVE.itemsize:
            raise RoundError(f"{len(self.moves)} bytes of moves are no multiple of {MOVE.itemsize}")
        return np.frombuffer(self.moves, MOVE)

    def changed_layers(self) -> np.ndarray:
        """Numbers of the layers that it changes, ascending; RoundError if the bytes are none."""
        if not self.rerouted:
            return np.unique(self.move_array()["layer"])
        if len(self.rerouted) % 4:
            raise RoundError(f"{len(self.rerouted)} bytes of layers are no multiple of 4")
        return np.frombuffer(self.rerouted, "<i4")

    def column_array(self) -> np.ndarray | None:
        """int16[n, ranks, slots] of the layers that it changes; None if routing is uniform.

        Raises:
            RoundError: the bytes are not as many as that takes.
        """
        if not self.columns:
            return None
        layers = len(self.changed_layers())
        if len(self.columns) != 2 * layers * self.ranks * self.slots:
            raise RoundError(
                f"{len(self.columns)} bytes of routing columns for {layers} layers of "
                f"{self.ranks} x {self.slots} slots"
            )
        return np.frombuffer(self.columns, "<i2").reshape(layers, self.ranks, self.slots)


# Made here: two threads that are the first to decode a type at once crash the process in msgspec.
_DECODER = msgspec.msgpack.Decoder(Round)


def encode_round(round_: Round) -> bytes:
    """The record's bytes."""
    return msgspec.msgpack.encode(round_)


def decode_round(record: bytes) -> Round:
    """The round in `record`; RoundError if there is none."""
    try:
        return _DECODER.decode(record)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise RoundError(f"not a round: {one_line(error)}") from error


def round_identity(record: bytes) -> int:
    """A positive 63-bit digest: two ranks hold the same round only if these are equal."""
    digest = hashlib.blake2b(record, digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 1) | 1


def record_limit(shape: GroupShape) -> int:
    """Bytes that the longest round of this group needs."""
    moves = min(shape.staging_rows * shape.ranks, shape.layers * shape.columns)
    return 128 + moves * MOVE.itemsize + shape.layers * (4 + 2 * shape.columns)


def check_round(round_: Round, shape: GroupShape, placement: np.ndarray) -> np.ndarray:
    """The placement after `round_`, if the round may be carried out from `placement`.

    Args:
        round_: what the planner sent.
        shape: of this group.
        placement: int32 [layers, ranks, slots], what is committed now: valid.

    Raises:
        RoundError: another shape, too many rows for a rank, a source that does not hold its
            expert, an expert dropped, or one doubled on a rank, or routing columns that no table
            holds.
    """
    wanted = (shape.layers, shape.ranks, shape.slots)
    if (round_.layers, round_.ranks, round_.slots) != wanted:
        raise RoundError(
            f"made for (layers, ranks, slots) = "
            f"{(round_.layers, round_.ranks, round_.slots)}, this group has {wanted}"
        )
    moves = round_.move_array()
    if round_.rerouted:
        _check_rerouted(round_, shape)
    elif not len(moves):
        raise RoundError("it moves nothing")
    try:
        fields = moves.view(np.int32).reshape(-1, 6)
        right, after = try_moves(placement, fields, shape.experts, shape.staging_rows)
        if not right:  # these say what is wrong
            after = apply_moves(placement, moves)
            check_placement(after, shape.experts)
    except PlacementError as error:
        raise RoundError(str(error)) from error
    if not right:
        rows = int(np.bincount(moves["rank"], minlength=shape.ranks).max())
        raise RoundError(
            f"it fills {rows} rows on one rank, EPLB_STAGING_ROWS is there for {shape.staging_rows}"
        )
    most = shape.ranks if shape.routes_by_source else MOST_COLUMNS
    _check_columns(round_, after, shape.experts, most)
    return after


def _check_rerouted(round_: Round, shape: GroupShape) -> None:
    layers = round_.changed_layers()
    if round_.moves or not round_.columns:
        raise RoundError("it names layers to be rerouted, and moves experts or has no columns")
    if (np.diff(layers) < 1).any() or layers[0] < 0 or layers[-1] >= shape.layers:
        raise RoundError(
            f"the layers to be rerouted are {layers.tolist()}; they must ascend from 0 to "
            f"{shape.layers - 1}"
        )


def _check_columns(round_: Round, after: np.ndarray, experts: int, most: int) -> None:
    columns = round_.column_array()
    if columns is None:
        return
    if columns.min() < 1:
        raise RoundError(f"a slot has {columns.min()} routing columns; it must have 1 or more")
    for layer, shares in zip(round_.changed_layers(), columns, strict=True):
        total = np.bincount(after[layer].ravel(), shares.ravel(), experts)
        if total.max() > most:
            raise RoundError(
                f"layer {layer} expert {total.argmax()} has {int(total.max())} routing columns; "
                f"the table holds {most}"
            )
