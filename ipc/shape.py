"""The shape of an EP group: what collectors, planner and loaders must agree on."""

from __future__ import annotations

import msgspec


class ModelShape(msgspec.Struct, frozen=True):
    """One model registered with the engine (a drafter comes before the main model)."""

    name: str
    layers: int


class GroupShape(msgspec.Struct, frozen=True):
    """Everything about an EP group that does not change while it runs.

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
    """

    models: tuple[ModelShape, ...]
    experts: int
    ranks: int
    slots: int
    counting: tuple[int, ...]
    row_bytes: tuple[int, ...]
    staging_rows: int
    ring_slots: int

    @property
    def layers(self) -> int:
        """Mixture-of-experts layers of all models together."""
        return sum(model.layers for model in self.models)

    @property
    def columns(self) -> int:
        """Physical experts of a layer over all ranks (P)."""
        return self.ranks * self.slots
