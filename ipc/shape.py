"""The shape of an EP group: what collectors, planner and loaders must agree on."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

MOST_RANKS = 4096
MOST_CELLS = 2**22
"""Slots of all layers and ranks together: 128 layers of 32768, more than any model has."""


class ShapeError(ValueError):
    """A shape that no group can have; the text says which of its numbers is wrong."""


def one_line(error: Exception) -> str:
    """What `error` says of bytes that may be anybody's: printable, at most 200 characters."""
    return "".join(c if c.isprintable() else "?" for c in str(error)[:200])


class ModelShape(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One model registered with the engine (a drafter comes before the main model)."""

    name: Annotated[str, Meta(max_length=4096)]
    layers: Annotated[int, Meta(ge=1, le=4096)]


class GroupShape(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Everything about an EP group that does not change while it runs.

    The bounds hold for what is read from a header; `check_shape` tells whether it fits together.

    Attributes:
        models: in the order in which the engine registered them; their layers are concatenated.
        experts: logical experts per layer (E).
        ranks: EP ranks.
        slots: physical experts per rank (S).
        counting: EP ranks whose heat adds up to the group's heat; the others count the same
            tokens again (tensor-parallel copies).
        row_bytes: bytes of one expert's weights, per layer.
        staging_rows: rows per rank that a round may fill.
        ring_slots: steps of heat that the ring holds.
        counts_own_slots: a rank counts what arrived at its own S slots from all ranks' batches, so
            the ranks' heat is put side by side; otherwise it counts its own batch over all P slots,
            and the heat of `counting` is added up.
        routes_by_source: a rank sends all of its tokens for an expert to one replica, so that
            replicas share the expert's tokens by whole ranks; otherwise token by token.
    """

    models: Annotated[tuple[ModelShape, ...], Meta(min_length=1, max_length=64)]
    experts: Annotated[int, Meta(ge=1, le=2**15 - 1)]  # the board's cells are int16
    ranks: Annotated[int, Meta(ge=1, le=MOST_RANKS)]
    slots: Annotated[int, Meta(ge=1, le=2**15 - 1)]
    counting: Annotated[tuple[int, ...], Meta(min_length=1, max_length=MOST_RANKS)]
    row_bytes: tuple[Annotated[int, Meta(ge=1, le=2**40)], ...]
    staging_rows: Annotated[int, Meta(ge=1, le=2**16)]
    ring_slots: Annotated[int, Meta(ge=1, le=2**20)]
    counts_own_slots: bool = False
    routes_by_source: bool = False

    @property
    def layers(self) -> int:
        """Mixture-of-experts layers of all models together."""
        return sum(model.layers for model in self.models)

    @property
    def columns(self) -> int:
        """Physical experts of a layer over all ranks (P)."""
        return self.ranks * self.slots

    @property
    def heat_columns(self) -> int:
        """Physical experts that one rank counts: P, or S of them."""
        return self.slots if self.counts_own_slots else self.columns


def check_shape(shape: GroupShape) -> None:
    """Refuse a shape whose numbers, each within its bounds, do not fit together.

    Raises:
        ShapeError: naming the numbers and what is wrong with them.
    """
    layers, experts, ranks, slots = shape.layers, shape.experts, shape.ranks, shape.slots
    if len(shape.row_bytes) != layers:
        raise ShapeError(f"row_bytes has {len(shape.row_bytes)} entries for {layers} layers")
    if text := why_no_placement(experts, ranks, slots):
        raise ShapeError(text)
    if layers * shape.columns > MOST_CELLS:
        raise ShapeError(
            f"{layers} layers x {ranks} ranks x {slots} slots are more than {MOST_CELLS}"
        )
    absent = [rank for rank in shape.counting if not 0 <= rank < ranks]
    if absent:
        raise ShapeError(f"counting names rank {absent[0]}; ranks are 0..{ranks - 1}")
    if len(set(shape.counting)) < len(shape.counting):
        raise ShapeError("counting names a rank twice")


def why_no_placement(experts: int, ranks: int, slots: int) -> str:
    """Why so many experts cannot be on so many slots, and how many slots can hold them; or ""."""
    if slots <= experts <= ranks * slots:
        return ""
    return (
        f"{experts} experts on {ranks} ranks x {slots} slots: every expert needs a slot, and no "
        f"rank holds one twice; that takes {-(-experts // ranks)} to {experts} slots per rank"
    )
