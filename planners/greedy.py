"""Greedy: a plain policy that places the heaviest replicas first and swaps while that gains."""

from __future__ import annotations

import math

import numpy as np

from ..ipc.placement import PlacementError, check_placement
from .par import episode_par
from .plan import Plan, make_plan
from .search import scale_heat, search_layer
from .swaps import held_by, moved


class Greedy:
    """Plans the layers whose balance can be won back, and remembers what it promised.

    A layer is planned if its PAR exceeds 1 by more than `min_excess`, unless it has the placement
    of its last plan and keeps what that plan promised. A plan must win `min_gain`, and
    the price of its moves, on all episodes; and a plan made from every other episode must win
    `min_gain` on the rest, beyond its standard error, so that chance moves no weights. A window of
    a single episode cannot be checked so.

    Args:
        ranks: EP ranks, at least 2.
        slots_per_rank: slots of each layer on each rank, at least 1.
        z: standard deviations over its mean at which an expert's heat is reckoned.
        min_excess: PAR - 1 up to which a layer is left alone.
        min_gain: least PAR a layer's plan must win.
        move_price: PAR that moving all slots of a layer must win; fewer moves, in proportion.
        tolerance: PAR above its promise at which a layer is planned again.
        max_moves: most moves in one plan; None for no limit.
        max_layers: most layers in one plan; None for no limit.

    Raises:
        ValueError: an argument is out of range; it names the argument, value and range.
    """

    def __init__(
        self,
        ranks: int,
        slots_per_rank: int,
        *,
        z: float = 0.67,
        min_excess: float = 0.05,
        min_gain: float = 0.02,
        move_price: float = 0.1,
        tolerance: float = 0.03,
        max_moves: int | None = None,
        max_layers: int | None = None,
    ) -> None:
        self.ranks = _whole("ranks", ranks, 2)
        self.slots_per_rank = _whole("slots_per_rank", slots_per_rank, 1)
        self.z = _amount("z", z)
        self.min_excess = _amount("min_excess", min_excess)
        self.min_gain = _amount("min_gain", min_gain)
        self.move_price = _amount("move_price", move_price)
        self.tolerance = _amount("tolerance", tolerance)
        self.max_moves = None if max_moves is None else _whole("max_moves", max_moves, 1)
        self.max_layers = None if max_layers is None else _whole("max_layers", max_layers, 1)
        self._promised = np.empty(0)
        self._planned = np.empty((0, self.ranks, self.slots_per_rank), np.int32)

    def plan(self, heat: np.ndarray, placement: np.ndarray, every_layer: bool = False) -> Plan:
        """The plan for the heat of one window; an empty one if nothing is worth its moves.

        Args:
            heat: tokens[episodes, layers, experts], finite and not negative, any real dtype.
            placement: int[layers, ranks, slots], today's placement.
            every_layer: look at all layers, whatever was promised, and take every gain that pays
                for its moves; `max_moves` and `max_layers` still hold.

        Raises:
            ValueError: heat or placement is unfit; it names the argument, value and what is
                allowed. A placement that loses or doubles an expert is a PlacementError.
        """
        heat = _shares(_checked_heat(heat))
        placement = self._checked_placement(placement, heat)
        before = episode_par(heat, placement).mean(axis=0)
        self._forget(placement)
        due = np.flatnonzero(before > 1.0) if every_layer else self._due(before)
        wanted, after, promised = placement.copy(), before.copy(), before.copy()
        for layer in due:
            found = self._search(heat[:, layer], placement[layer])
            after_found = episode_par(heat[:, layer], found).mean()
            if not self._pays(before[layer] - after_found, placement[layer], found, every_layer):
                continue
            gain, expected = self._unseen(heat[:, layer], placement[layer])
            if every_layer or gain >= self.min_gain:
                wanted[layer], after[layer] = found, after_found
                promised[layer] = max(after_found, expected)
        plan = self._cap(make_plan(placement, wanted, par_before=before, par_after=after))
        self._remember(plan, promised)
        return plan

    def _forget(self, placement: np.ndarray) -> None:
        """Drop the promises made for another placement than a layer has now."""
        if self._planned.shape != placement.shape:
            self._promised = np.full(len(placement), np.nan)
            self._planned = placement.copy()
        in_place = (self._planned == placement).all(axis=(1, 2))
        self._promised[~in_place] = np.nan

    def _due(self, before: np.ndarray) -> np.ndarray:
        """The layers with an excess and without a promise kept."""
        kept = before <= self._promised + self.tolerance
        return np.flatnonzero((before > 1.0 + self.min_excess) & ~kept)

    def _search(self, heat: np.ndarray, placement: np.ndarray) -> np.ndarray:
        most = placement.size if self.max_moves is None else min(self.max_moves, placement.size)
        price = self.move_price / placement.size
        return search_layer(scale_heat(heat, self.ranks), placement, self.z, price, most)

    def _pays(
        self, gain: float, placement: np.ndarray, found: np.ndarray, every_layer: bool
    ) -> bool:
        experts = int(placement.max()) + 1
        moves = moved(found, held_by(placement, experts))
        worth = gain - self.move_price * moves / placement.size
        return moves > 0 and worth > 0 and (every_layer or gain >= self.min_gain)

    def _unseen(self, heat: np.ndarray, placement: np.ndarray) -> tuple[float, float]:
        """(gain less its standard error, PAR) on every other episode of a plan from the rest."""
        seen, unseen = heat[::2], heat[1::2]
        if not seen.any() or not unseen.any():
            return math.inf, 1.0
        ratios = episode_par(unseen, self._search(seen, placement))
        gains = episode_par(unseen, placement) - ratios
        return gains.mean() - gains.std() / math.sqrt(len(gains)), ratios.mean()

    def _cap(self, plan: Plan) -> Plan:
        """The layers of `plan` that fit `max_layers` and `max_moves`, best gain per move first."""
        moves = (plan.before != plan.placement).sum(axis=(1, 2))
        room = math.inf if self.max_moves is None else self.max_moves
        picked: list[int] = []
        for layer in plan.layers:
            if len(picked) != self.max_layers and moves[layer] <= room:
                picked.append(int(layer))
                room -= moves[layer]
        if len(picked) == len(plan.layers):
            return plan
        wanted, after = plan.before.copy(), plan.par_before.copy()
        wanted[picked], after[picked] = plan.placement[picked], plan.par_after[picked]
        return make_plan(plan.before, wanted, par_before=plan.par_before, par_after=after)

    def _remember(self, plan: Plan, promised: np.ndarray) -> None:
        """Keep the promises of `plan`, but none of a layer that wanted more than `max_moves`."""
        self._planned[plan.layers] = plan.placement[plan.layers]
        moves = (plan.before != plan.placement).sum(axis=(1, 2))
        curbed = self.max_moves is not None and moves >= self.max_moves - 1
        self._promised[plan.layers] = np.where(curbed, np.nan, promised)[plan.layers]

    def _checked_placement(self, placement: np.ndarray, heat: np.ndarray) -> np.ndarray:
        placement = np.asarray(placement)
        shape = (heat.shape[1], self.ranks, self.slots_per_rank)
        if placement.shape != shape:
            raise ValueError(
                f"placement has shape {placement.shape}; it must be {shape}, "
                "[layers of heat, ranks, slots_per_rank]"
            )
        try:
            check_placement(placement, heat.shape[2])
        except PlacementError as error:
            raise PlacementError(f"placement: {error}") from None
        return np.array(placement, dtype=np.int32, order="C")


def warmup() -> None:
    """Compile, or load from the cache, every kernel that planning and cutting rounds needs."""
    heat = np.array([[[9, 5, 1, 1]], [[8, 5, 2, 1]]])
    placement = np.array([[[0, 1, 2], [2, 3, 0]]])
    Greedy(2, 3).plan(heat, placement, every_layer=True)
    plan = make_plan(placement, placement[:, ::-1])
    plan.rounds(1)


def _whole(name: str, value: int, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
        raise ValueError(f"{name} is {value!r}; it must be a whole number of at least {least}")
    return int(value)


def _amount(name: str, value: float) -> float:
    real = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
    if not real or not 0 <= value < math.inf:
        raise ValueError(f"{name} is {value!r}; it must be a finite number of at least 0")
    return float(value)


def _checked_heat(heat: np.ndarray) -> np.ndarray:
    heat = np.asarray(heat)
    if heat.ndim != 3 or heat.shape[0] == 0 or heat.dtype.kind not in "iuf":
        raise ValueError(
            f"heat is {heat.dtype} of shape {heat.shape}; it must be real numbers "
            "[episodes, layers, experts] of at least one episode"
        )
    fit = np.isfinite(heat) & (heat >= 0)
    if not fit.all():
        where = tuple(int(i) for i in np.argwhere(~fit)[0])
        raise ValueError(f"heat{list(where)} is {heat[where]}; it must be finite and at least 0")
    return heat.astype(np.float64)


def _shares(heat: np.ndarray) -> np.ndarray:
    """Heat over its maximum in each episode and layer, so that no sum of it overflows."""
    peak = heat.max(axis=2, keepdims=True, initial=0.0)
    return heat / np.where(peak > 0, peak, 1.0)
