"""A plan: where each expert goes, and the rounds of moves that take it there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from ..ipc.placement import MOVE, PlacementError, check_placement
from .check import optional, whole
from .rounds import schedule, spread_sources
from .slots import align_layers


@dataclass(frozen=True, eq=False)
class PlannedRound:
    """Moves that take effect together.

    Attributes:
        moves: MOVE[n]; every source holds its expert when the round starts.
        placement: int32[layers, ranks, slots], the full placement after the round.
        columns: int16[n, ranks, slots], routing columns of the n layers that the round changes, by
            their numbers; None if every slot has one. An expert has its planned columns as soon as
            its slots are those of the plan.
        rerouted: int32[n], ascending: of a round that moves nothing, the layers that get other
            columns.
    """

    moves: np.ndarray
    placement: np.ndarray
    columns: np.ndarray | None = None
    rerouted: np.ndarray | None = None

    @property
    def layers(self) -> np.ndarray:
        """The layers that the round changes, ascending."""
        return np.unique(self.moves["layer"]) if self.rerouted is None else self.rerouted


@dataclass(frozen=True, eq=False)
class Plan:
    """A new placement and the layers it changes; false when it changes none. See `make_plan`.

    Attributes:
        before: int32[layers, ranks, slots], the placement the plan starts from.
        placement: int32[layers, ranks, slots], the placement it leads to. An expert that stays
            on its rank stays in its slot.
        layers: int32[picked], the layers that change, best gain per move first.
        par_before: float64[layers], PAR of `before` on the heat the plan was made from; nan
            where it was not measured.
        par_after: float64[layers], the same of `placement`, and of `columns` if they were planned.
        columns: int16[layers, ranks, slots], routing columns of each slot: its share of the
            columns of its expert is its share of the expert's tokens.
        ranks_per_node: consecutive ranks that share a node, from which sources are taken first;
            None if distance is of no matter.
        rerouted: int32[n], ascending: layers in which no expert moves and that get `columns`.
        why: of a plan that changes nothing, the reason, for a log; "" if the policy tells none.
    """

    before: np.ndarray
    placement: np.ndarray
    layers: np.ndarray
    par_before: np.ndarray
    par_after: np.ndarray
    columns: np.ndarray
    ranks_per_node: int | None = None
    rerouted: np.ndarray = field(default_factory=lambda: np.empty(0, np.int32))
    why: str = ""

    def __bool__(self) -> bool:
        """Whether the plan changes anything."""
        return len(self.changed) > 0

    @property
    def changed(self) -> np.ndarray:
        """The layers that move experts, in the order of `layers`, and those that are rerouted."""
        return np.concatenate([self.layers, self.rerouted])

    @property
    def moves(self) -> np.ndarray:
        """MOVE[n], the whole plan as one round: by layer as in `layers`, then rank and slot."""
        changed = [
            np.insert(np.argwhere(self.before[layer] != self.placement[layer]), 0, layer, axis=1)
            for layer in self.layers
        ]
        writes = np.concatenate([np.empty((0, 3), np.int64), *changed])
        sent = np.zeros(self.before.shape[1], np.int64)
        return _moves(self.before, self.placement, writes, self._near, sent)

    def rounds(self, rows: int) -> list[PlannedRound]:
        """Cut the plan into rounds that write at most `rows` slots on any rank.

        After each round the placement is valid, and after the last it equals `placement`. Layers
        come in the order of `layers`; a later layer fills the rows an earlier one leaves free.
        In each round the busiest sender sends as few rows as it can, with sources on the
        destination's own node first; see `rounds.spread_sources`. What needs no move comes first,
        in a round by itself.

        Args:
            rows: staging rows per rank, over all layers together; at least 1.

        Raises:
            ValueError: `rows` is not a whole number of at least 1.
        """
        rows = min(whole("rows", rows, 1), self.before.size)
        round_of = schedule(self.before, self.placement, self.layers, rows)
        writes = np.argwhere(round_of >= 0)
        turns = round_of[tuple(writes.T)]
        writes = writes[np.argsort(turns, kind="stable")]
        sizes = np.bincount(turns)
        sent = np.zeros(self.before.shape[1], np.int64)
        current = self.before
        rounds = []
        if len(self.rerouted):
            columns = self.columns[self.rerouted]
            rounds.append(PlannedRound(np.empty(0, MOVE), current, columns, self.rerouted))
        for chunk in np.split(writes, np.cumsum(sizes)[:-1]) if len(writes) else []:
            moves = _moves(current, self.placement, chunk, self._near, sent)
            current = current.copy()
            current[tuple(chunk.T)] = moves["expert"]
            columns = self._columns_under(current, np.unique(moves["layer"]))
            rounds.append(PlannedRound(moves, current, columns))
        return rounds

    @property
    def _near(self) -> int:
        """Consecutive ranks that share a node: all of them if distance is of no matter."""
        ranks = self.before.shape[1]
        return min(self.ranks_per_node or ranks, ranks)

    def _columns_under(self, placement: np.ndarray, layers: np.ndarray) -> np.ndarray | None:
        """Columns of `layers` under a placement on the way to the plan's; None if all are 1."""
        if (self.columns[layers] == 1).all():
            return None
        columns = self.columns[layers].copy()
        for layer, shares in zip(layers, columns, strict=True):
            here, there = placement[layer], self.placement[layer]
            on_their_way = np.concatenate([here[here != there], there[here != there]])
            shares[np.isin(here, on_their_way)] = 1
        return columns


def make_plan(
    before: np.ndarray,
    wanted: np.ndarray,
    *,
    par_before: np.ndarray | None = None,
    par_after: np.ndarray | None = None,
    ranks_per_node: int | None = None,
) -> Plan:
    """The plan that leads from `before` to `wanted`.

    Only the set of experts on each rank of `wanted` counts; the slots are chosen by `align`.

    Args:
        before: int[layers, ranks, slots], a valid placement.
        wanted: int[layers, ranks, slots], a valid placement of the same experts.
        par_before: float[layers], PAR of `before`; None leaves it nan.
        par_after: float[layers], PAR of `wanted`; None leaves it nan.
        ranks_per_node: consecutive ranks that share a node; None if distance is of no matter.

    Raises:
        ValueError: the shapes differ, or `ranks_per_node` is no whole number of at least 1.
        PlacementError: `before` or `wanted` is not valid.
    """
    before, wanted = np.asarray(before), np.asarray(wanted)
    if before.shape != wanted.shape:
        raise ValueError(f"wanted has shape {wanted.shape}; before has {before.shape}")
    experts = int(before.max()) + 1 if before.size else 0
    _check_named("before", before, experts)
    _check_named("wanted", wanted, experts)
    before = np.array(before, dtype=np.int32, order="C")
    placement = np.array(wanted, dtype=np.int32, order="C")
    align_layers(before, placement, experts)
    pars = [
        np.full(len(before), np.nan) if value is None else np.array(value, dtype=np.float64)
        for value in (par_before, par_after)
    ]
    for name, value in zip(("par_before", "par_after"), pars, strict=True):
        if value.shape != before.shape[:1]:
            raise ValueError(f"{name} has shape {value.shape}; it must be {before.shape[:1]}")
    near = optional("ranks_per_node", ranks_per_node, 1)
    columns = np.ones(before.shape, np.int16)
    return plan_between(before, placement, pars[0], pars[1], columns, near)


def plan_between(
    before: np.ndarray,
    placement: np.ndarray,
    par_before: np.ndarray,
    par_after: np.ndarray,
    columns: np.ndarray,
    ranks_per_node: int | None,
    rerouted: Sequence[int] = (),
) -> Plan:
    """`make_plan` for what is known to be right: placements int32, valid, aligned; no checks."""
    layers = _by_gain(before, placement, par_before, par_after)
    others = np.array(rerouted, np.int32)
    return Plan(before, placement, layers, par_before, par_after, columns, ranks_per_node, others)


def align_all(before: np.ndarray, wanted: np.ndarray, experts: int) -> np.ndarray:
    """`wanted` with the slots that let the change run at one row per rank.

    What stays on a rank keeps its slot. Both int32[layers, ranks, slots] and valid: no checks.
    """
    placement = wanted.copy()
    align_layers(before, placement, experts)
    return placement


def _check_named(name: str, placement: np.ndarray, experts: int) -> None:
    try:
        check_placement(placement, experts)
    except PlacementError as error:
        raise PlacementError(f"{name}: {error}") from None


def _by_gain(before, placement, par_before, par_after) -> np.ndarray:
    writes = (before != placement).sum(axis=(1, 2))
    layers = np.flatnonzero(writes)
    gain = (par_before[layers] - par_after[layers]) / writes[layers]
    return layers[np.argsort(-gain, kind="stable")].astype(np.int32)


def _moves(current, placement, writes, near, sent) -> np.ndarray:
    """MOVE[n] for `writes` [n, (layer, rank, slot)], out of `current`; adds to `sent` [ranks]."""
    writes = np.ascontiguousarray(writes)
    moves = np.empty(len(writes), MOVE)
    moves["layer"], moves["rank"], moves["slot"] = writes.T
    moves["expert"] = placement[tuple(writes.T)]
    sources = spread_sources(current, writes, np.ascontiguousarray(moves["expert"]), near, sent)
    moves["source_rank"], moves["source_slot"] = sources.T
    return moves
