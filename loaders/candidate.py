"""A round that a rank would start: checked, with the placement that it leads to."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ..ipc.round import Round, check_round
from ..ipc.shape import GroupShape
from .inbox import HOME, Pending

if TYPE_CHECKING:
    import torch

    from .engine import Engine


class Candidate(NamedTuple):
    """A round that may be carried out.

    Attributes:
        identity: `round_identity` of its record.
        round: what the record says.
        moves: `MOVE` records of the round.
        after: int32 [layers, ranks, slots], the placement after it.
    """

    identity: int
    round: Round
    moves: np.ndarray
    after: np.ndarray

    @property
    def is_planners(self) -> bool:
        """Whether it came from a planner, and does not bring experts back."""
        return self.round.generation != HOME

    def tables(self, engine: Engine) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """See `Engine.tables`: those after the round."""
        layers, columns = self.round.changed_layers(), self.round.column_array()
        return engine.tables(layers, self.after, columns)


def checked(pending: Pending, shape: GroupShape, placement: np.ndarray) -> Candidate:
    """`pending` as a round that starts from `placement`; RoundError if it cannot be right."""
    after = check_round(pending.round, shape, placement)
    return Candidate(*pending, pending.round.move_array(), after)
