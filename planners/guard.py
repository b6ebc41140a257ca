"""Between the planner and its policy: nothing that a policy does or returns can do harm."""

from __future__ import annotations

import logging
import traceback
from dataclasses import fields, replace
from typing import Any, NamedTuple

import numpy as np

from ..ipc.placement import check_placement
from ..ipc.round import MOST_COLUMNS
from .par import episode_par
from .plan import Plan, PlannedRound, make_plan
from .policy import Policy

log = logging.getLogger("flash_eplb.planner")


class Proposal(NamedTuple):
    """A checked plan and its rounds; none of them if the plan changes nothing."""

    plan: Plan
    rounds: list[PlannedRound]


class Guard:
    """Calls a policy, checks what it returns, and says once what is wrong with it.

    Args:
        policy: ours or a user's.
        ranks_per_node: consecutive ranks that share a node, for plans that do not say it; None if
            distance is of no matter.
    """

    def __init__(self, policy: Policy, ranks_per_node: int | None = None):
        self._policy = policy
        self._ranks_per_node = ranks_per_node
        self._said: set[tuple] = set()

    def propose(self, heat: np.ndarray, placement: np.ndarray, rows: int) -> Proposal | None:
        """What the policy plans; None if it failed or its plan is not valid, which is logged.

        A reason, that is the lines of code that led to it, is logged as an error once and from
        then on only for debugging.

        Args:
            heat: tokens[episodes, layers, experts].
            placement: int32[layers, ranks, slots], today's; the policy gets copies of both.
            rows: staging rows per rank that a round may fill.
        """
        try:
            found = self._policy.plan(heat.copy(), placement.copy())
        except BaseException as error:  # a policy that fails, costs balance only
            text = "the policy failed; experts stay where they are until the next plan"
            log.log(self._level(error), text, exc_info=True)
            return None
        try:
            plan = checked_plan(found, heat, placement, self._ranks_per_node)
            return Proposal(plan, plan.rounds(rows))
        except BaseException as error:  # arrays and plans of a user's own run their code here
            text = "what the policy returned is refused, experts stay where they are: %s"
            log.log(self._level(error), text, error)
            self.forget()
            return None

    def reach(self, wanted: np.ndarray, placement: np.ndarray, rows: int) -> Proposal:
        """The plan that leads to a placement that is given; its PAR are nan, for there is no heat.

        Args:
            wanted: int[layers, ranks, slots].
            placement: int32[layers, ranks, slots], today's.
            rows: staging rows per rank that a round may fill.

        Raises:
            PlacementError: one of the placements is not valid.
        """
        plan = make_plan(placement, wanted, ranks_per_node=self._ranks_per_node)
        return Proposal(plan, plan.rounds(rows))

    def forget(self) -> None:
        """The last plan was not carried out to its end: nothing of it may be relied on."""
        forget = getattr(self._policy, "forget", None)
        if not callable(forget):
            return
        try:
            forget()
        except BaseException as error:
            text = "the policy failed to forget its last plan, which was not carried out"
            log.log(self._level(error), text, exc_info=True)

    def _level(self, error: BaseException) -> int:
        lines = traceback.walk_tb(error.__traceback__)
        reason = (type(error), *((frame.f_code, line) for frame, line in lines))
        if reason in self._said:
            return logging.DEBUG
        self._said.add(reason)
        return logging.ERROR


def checked_plan(
    found: Any, heat: np.ndarray, placement: np.ndarray, ranks_per_node: int | None = None
) -> Plan:
    """A plan that leads from `placement` to what a policy wants, whatever form that has.

    Of a plan as `make_plan` makes it all counts, and a `ranks_per_node` that it lacks is added. Of
    any other only the placement counts: the plan is made anew, and its PAR measured. What is
    returned is never the policy's own object, which may be of a class of its own.

    Args:
        found: a Plan, or int[layers, ranks, slots].
        heat: tokens[episodes, layers, experts], what the policy was given.
        placement: int32[layers, ranks, slots], the same.
        ranks_per_node: consecutive ranks that share a node; None if distance is of no matter.

    Raises:
        ValueError: `found` is neither, or of another shape, or no valid placement.
    """
    given = _copied(found) if isinstance(found, Plan) else None
    wanted = np.asarray(found) if given is None else given.placement
    if wanted.dtype.kind not in "iu":
        kind = f"of type {type(found).__name__} and holds {wanted.dtype}"
        raise ValueError(
            f"it is {'None' if found is None else kind}; it must be a Plan or an int array "
            "[layers, ranks, slots]"
        )
    if wanted.shape != placement.shape:
        raise ValueError(
            f"its placement has shape {wanted.shape}; it must be {placement.shape}, "
            "[layers, ranks, slots]"
        )
    check_placement(wanted, heat.shape[2])
    plan = make_plan(placement, wanted)
    if given is not None and _is_sound(given, plan):
        return replace(given, ranks_per_node=given.ranks_per_node or ranks_per_node)
    before, after = (episode_par(heat, slots).mean(axis=0) for slots in (placement, wanted))
    return make_plan(
        placement, wanted, par_before=before, par_after=after, ranks_per_node=ranks_per_node
    )


def _copied(found: Plan) -> Plan:
    """A plain plan of what stands in `found`, unchecked, as arrays of our own."""
    values = {field.name: getattr(found, field.name) for field in fields(Plan)}
    near, why = values.pop("ranks_per_node"), values.pop("why")
    arrays = {name: np.array(value, order="C") for name, value in values.items()}
    return Plan(**arrays, ranks_per_node=near, why=why if type(why) is str else "")


def _is_sound(found: Plan, made: Plan) -> bool:
    """Whether `found` is what `make_plan` gave for the same change, but for PAR, order, columns."""
    for name in ("before", "placement", "layers", "par_before", "par_after", "columns"):
        one, two = getattr(found, name), getattr(made, name)
        if one.dtype != two.dtype or one.shape != two.shape:
            return False
    near = found.ranks_per_node
    return (
        np.array_equal(found.before, made.before)
        and np.array_equal(found.placement, made.placement)
        and np.array_equal(np.sort(found.layers), np.sort(made.layers))
        and _is_routable(found)
        and _names_layers(found.rerouted, np.setdiff1d(np.arange(len(made.before)), made.layers))
        and (near is None or (type(near) is int and near > 0))
    )


def _is_routable(found: Plan) -> bool:
    """Whether each expert has columns, and no more than the engine's tables can hold."""
    if not (found.columns > 0).all():
        return False
    pairs = zip(found.placement, found.columns, strict=True)
    return all(
        np.bincount(placement.ravel(), columns.ravel()).max() <= MOST_COLUMNS
        for placement, columns in pairs
    )


def _names_layers(named: np.ndarray, among: np.ndarray) -> bool:
    """Whether `named` is int32, ascending, and holds only numbers of `among`."""
    return named.dtype == np.int32 and np.array_equal(named, np.intersect1d(named, among))


def warmup() -> None:
    """Compile, or load from the cache, every kernel that checking and cutting rounds needs."""
    heat = np.array([[[9, 5, 1, 1]]])
    placement = np.array([[[0, 1, 2], [2, 3, 0]]], np.int32)
    plan = checked_plan(placement[:, ::-1], heat, placement)
    plan.rounds(1)
