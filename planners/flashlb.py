"""FlashLB: replica counts and placement searched together, over many episodes, layer by layer.

The three ideas are those of the policy of that name in vLLM-Ascend: a joint search of counts and
placement, many episodes at once, and plans only for the layers that are worth it. The search is
ours: see `search.py`, `improve.py` and `place.py`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import numpy as np

from ..ipc.round import MOST_COLUMNS
from .check import amount, checked_heat, checked_placement, one_of, tamed, whole
from .columns import Columns, follow
from .confirm import Confirmation
from .efforts import EFFORTS
from .forecast import forecast
from .memory import MERGED, Memory, is_alike, is_other
from .offers import Finder, spread
from .partway import Going, moves_between, part_of_the_way
from .plan import Plan, align_all, make_plan, plan_between
from .promises import Promises, hoped
from .quiet import why_quiet
from .search import Terms
from .window import Offer, Window

log = logging.getLogger("flash_eplb.planner")

EVERY_LAYER_PRICE = 0.001
"""`move_price` of a plan for every layer: enough that nothing moves for nothing."""

FIRST_PRICE = 1e-6
"""`move_price` of the first plan of a layer, which gains for long: nothing moves for nothing."""

FIRST_SHARE = 0.03
"""Share of `move_price` that it pays where moves are limited, and what is far takes many plans."""

PARTS = 8
"""Layers whose plan does not fit `max_moves` of which a part is looked for."""


class FlashLB:
    """Plans the layers whose balance can be won back, and remembers what it promised.

    A layer is planned if its PAR exceeds 1 by more than `floor`, or by more than `min_excess` and
    it does not have the placement of its last plan or does not keep what that plan promised. The
    plan must win `min_gain`, and the price of its moves, on the window; and a plan made from the
    older half of the window must win `min_gain` on the newer half, and so clearly that chance
    moves no weights. Where counts are largely chance, the plan is for what `forecast` expects
    instead of the window, and must win more than the uncertainty of that.

    What it remembers of a layer (earlier heat, the promise) counts only while that layer has the
    placement that the last plan gave it.

    Args:
        ranks: EP ranks, from 1 to 1,024.
        slots_per_rank: slots of each layer on each rank, at least 1.
        ranks_per_node: consecutive ranks that share a node, whose weights are taken first; None
            if distance is of no matter.
        effort: "fast", "balanced" or "thorough".
        routing: "uniform", or "weighted" to plan how tokens divide among replicas; "by_source"
            where a rank sends all of its tokens for an expert to one of them.
        max_columns: routing columns that an expert may have, from `ranks` to 1,024.
        min_excess: PAR - 1 up to which a layer is left alone.
        min_gain: least PAR a layer's plan must win.
        move_price: PAR that moving all slots of a layer must win; fewer moves, in proportion.
        floor: PAR - 1 above which a layer is looked at whatever was promised.
        tolerance: PAR above its promise at which a layer is planned again; up to three times as
            much where the PAR of episodes varies.
        half_life: episodes after which an episode before the window counts half; 0 forgets all.
        max_moves: most moves in one plan; None for no limit. With 1 nothing moves where there is
            no redundant expert, which is logged once: there two or more change places.
        max_layers: most layers in which experts move in one plan; None for no limit.
        threads: that layers are spread over; the plan does not depend on their number.

    Raises:
        ValueError: an argument is out of range; it names the argument, value and range.
    """

    def __init__(
        self,
        ranks: int,
        slots_per_rank: int,
        ranks_per_node: int | None = None,
        effort: str = "balanced",
        *,
        routing: str = "uniform",
        max_columns: int = 1024,
        min_excess: float = 0.02,
        min_gain: float = 0.01,
        move_price: float = 0.06,
        floor: float = 0.05,
        tolerance: float = 0.02,
        half_life: float = 64,
        max_moves: int | None = None,
        max_layers: int | None = None,
        threads: int = 1,
    ) -> None:
        self.ranks = whole("ranks", ranks, 1, MOST_COLUMNS)  # an expert may be on all of them
        self.slots_per_rank = whole("slots_per_rank", slots_per_rank, 1)
        self.ranks_per_node = None
        if ranks_per_node is not None:
            self.ranks_per_node = whole("ranks_per_node", ranks_per_node, 1)
        self.effort = one_of("effort", effort, tuple(EFFORTS))
        self.routing = one_of("routing", routing, ("uniform", "weighted", "by_source"))
        self.max_columns = whole("max_columns", max_columns, self.ranks, MOST_COLUMNS)
        self.min_excess = amount("min_excess", min_excess)
        self.min_gain = amount("min_gain", min_gain)
        self.move_price = amount("move_price", move_price)
        self._promises = Promises(
            self.min_excess, amount("floor", floor), amount("tolerance", tolerance)
        )
        self.max_moves = None if max_moves is None else whole("max_moves", max_moves, 0)
        self.max_layers = None if max_layers is None else whole("max_layers", max_layers, 0)
        self.threads = whole("threads", threads, 1)
        self._memory = Memory(amount("half_life", half_life))
        self._going = Going()
        self._said_stuck = False
        self._planned = np.empty((0, self.ranks, self.slots_per_rank), np.int32)
        self._columns = np.empty(self._planned.shape, np.int16)
        self._changed = np.empty(0, np.int32)
        self._division = None
        if routing != "uniform":
            in_threads = partial(spread, self.threads)
            self._division = Columns(self.max_columns, routing == "by_source", in_threads)
        self._finder = Finder(
            self.ranks,
            self.slots_per_rank,
            self.effort,
            self.threads,
            self._division,
            self.min_gain,
        )
        self._confirmation = Confirmation(self._finder, self.min_gain)

    def plan(
        self,
        heat: np.ndarray,
        placement: np.ndarray,
        every_layer: bool = False,
        max_moves: int | None = None,
    ) -> Plan:
        """The plan for the heat of one window; an empty one if nothing is worth its moves.

        Args:
            heat: tokens[episodes, layers, experts], finite and not negative, any real dtype;
                oldest episode first. It may overlap the window of the call before.
            placement: int[layers, ranks, slots], today's placement.
            every_layer: look at all layers, whatever was promised, and take what wins anything,
                moves being all but free; `max_moves` and `max_layers` still hold.
            max_moves: most moves in this plan, beside the limit of the object.

        Raises:
            ValueError: heat or placement is unfit; it names the argument, value and what is
                allowed. A placement that loses or doubles an expert is a PlacementError.
        """
        tokens = tamed(checked_heat(heat))
        today = checked_placement(placement, tokens, self.ranks, self.slots_per_rank)
        room = today.size
        for limit in (self.max_moves, max_moves):
            room = room if limit is None else min(room, whole("max_moves", limit, 0))
        self._say_stuck(tokens.shape[2])
        slots = self.ranks * self.slots_per_rank
        price = EVERY_LAYER_PRICE if every_layer else self.move_price
        first = FIRST_SHARE * price if room < today.size else min(FIRST_PRICE, price)
        window = self._window(tokens, today, every_layer, first / slots)
        now, error = self._finder.measure(window.tokens, today, columns=self._columns)
        shown: np.ndarray = now
        if window.tokens is not window.seen:
            shown = self._finder.measure(tokens, today, columns=self._columns)[0]
        before: np.ndarray = now
        rerouted = np.empty(0, np.int64)
        if self._division is not None:
            rerouted = self._division.rerouted(window, shown, self.min_excess, self.min_gain)
        if len(rerouted):  # that is free, so what moves has to win more
            before, error = self._finder.measure(window.tokens, today, columns=window.columns)
        due = np.flatnonzero(before > 1)
        if not every_layer:
            due = self._promises.due(window, before, error)
        if not room or self.ranks == 1:
            due = due[:0]
        terms = Terms(
            price=price / slots,
            far_price=0.0,  # the finder knows it
            most_moves=slots,
            scratch=True,
            today=True,
            max_columns=0 if self.routing == "uniform" else self.max_columns,
            by_source=self.routing == "by_source",
        )
        if every_layer:
            self._going.forget()
        uneven, going = len(due), self._still_going(window, before, due)
        due = np.array([layer for layer in due.tolist() if layer not in self._going], np.int64)
        offers = winning = self._finder.offers(window, before, due, terms)
        if not every_layer:
            winning = [offer for offer in offers if offer.gain >= self.min_gain]
            offers = self._confirmation.confirmed(window, winning, terms)
        winning, offers = [*going, *winning], sorted([*going, *offers], key=self._rank)
        taken = {offer.layer: offer for offer in self._fitting(window, before, offers, terms, room)}
        self._promises.remember(offers, taken, every_layer)
        self._going.remember(offers, taken)
        plan = self._plan(window, shown, before, taken, rerouted)
        if plan:
            return plan
        why = why_quiet(len(today), uneven, len(winning), len(offers), self.min_gain)
        return replace(plan, why=why if room else "no move is allowed")

    def forget(self) -> None:
        """The last plan was not carried out: the layers that it changes may be anywhere."""
        self._planned[self._changed] = -1

    def _say_stuck(self, experts: int) -> None:
        """Once, that no plan fits a limit of one move: an expert that leaves must be elsewhere."""
        is_stuck = self.max_moves == 1 and experts == self.ranks * self.slots_per_rank
        if is_stuck and not self._said_stuck:
            log.warning(
                "max_moves is 1 (EPLB_MAX_MOVES), with which nothing moves: there is no redundant "
                "expert, so two change places at once; give 2 or more, or no cap"
            )
        self._said_stuck = is_stuck

    def _window(
        self, tokens: np.ndarray, today: np.ndarray, every_layer: bool, first_price: float
    ) -> Window:
        """What is planned from: the heat, what to expect from it, and what is remembered."""
        kept = self._kept(today)
        past, worth = self._memory.recall(tokens)
        alike = kept & is_alike(past, tokens)
        settled = kept & self._promises.made
        expected, error = tokens, np.zeros(len(today))
        if not every_layer:
            expected, error = forecast(tokens, past * alike[:, None], MERGED)
            if expected is not tokens:  # where all of the past would count alike
                self._memory.erase((error > 0) & is_other(past, tokens))
            error *= settled | (expected is not tokens)  # the first plan of short windows is free
        return Window(
            seen=tokens,
            tokens=expected,
            noise=error * math.sqrt(min(self.ranks, tokens.shape[2])),  # more ranks share experts
            past=past,
            worth=worth,
            alike=alike & ((error == 0) | (expected is tokens)),  # else it is in what is expected
            kept=kept,
            settled=settled,
            waiting=self._promises.waiting,
            anew=every_layer,
            today=today,
            columns=self._columns,
            first_price=first_price,
        )

    def _plan(
        self,
        window: Window,
        before: np.ndarray,
        after: np.ndarray,
        taken: dict[int, Offer],
        rerouted: np.ndarray,
    ) -> Plan:
        """The plan that carries out the offers `taken`; its placement is expected from now on.

        PAR is `before`, and `after` it where nothing moves and the plan is for the heat that was
        seen; else it is measured on that.
        """
        wanted, after = window.today.copy(), after.copy()
        columns: np.ndarray = np.ones(wanted.shape, np.int16)
        for layer, offer in taken.items():
            wanted[layer], after[layer] = offer.placement, offer.par
        wanted = align_all(window.today, wanted, window.tokens.shape[2])
        if self._division is not None:
            columns = window.columns.copy()
            for layer, offer in taken.items():
                columns[layer] = follow(offer.placement, offer.columns, wanted[layer])
            even = self._division.give_up(window.seen, wanted, columns)
            after[even] = self._finder.measure(window.seen, wanted[even], even, columns[even])[0]
            self._columns = columns.copy()
        if window.tokens is not window.seen:
            after = self._finder.measure(window.seen, wanted, columns=columns)[0]
        self._planned = wanted.copy()
        others = [layer for layer in rerouted.tolist() if layer not in taken]
        near = self.ranks_per_node
        plan = plan_between(window.today, wanted, before, after, columns, near, others)
        self._changed = plan.changed
        return plan

    def _kept(self, today: np.ndarray) -> np.ndarray:
        """Whether each layer has the placement that the last plan gave it; forgets the others."""
        if self._planned.shape != today.shape:
            self._planned = np.full_like(today, -1)
            self._columns = np.ones(today.shape, np.int16)
            self._changed = self._changed[:0]
        kept = (self._planned == today).all(axis=(1, 2))
        if self._division is not None:
            self._columns[~kept] = self._division.initial(today[~kept])
        self._promises.keep(kept)
        self._going.keep(kept)
        return kept

    def _still_going(self, window: Window, before: np.ndarray, due: np.ndarray) -> list[Offer]:
        """What is left of the offers that were carried out in part; they were confirmed then.

        Where the heat has changed another is looked for; where no more is won by what is left, it
        stays at that.
        """
        offers = []
        for offer in self._going.offers():
            layer = np.array([offer.layer])
            par = self._finder.measure(
                window.tokens, offer.placement[None], layer, offer.columns[None]
            )
            offer = offer._replace(
                par=float(par[0, 0]),
                gain=float(before[offer.layer] - par[0, 0]),
                moves=moves_between(window.today[offer.layer], offer.placement),
            )
            is_worth = offer.moves and offer.gain > window.first_price * offer.moves
            if offer.layer not in due or offer.par > hoped(offer.promise) + self.min_gain:
                self._going.drop(offer.layer)
            elif is_worth:
                offers.append(offer)
            else:
                self._promises.settle(offer.layer, float(before[offer.layer]))
        return offers

    def _rank(self, offer: Offer) -> tuple[bool, float]:
        """Best gain per move first, after those that have lost balance for what is to come."""
        return not self._going.has_paid(offer.layer), -offer.gain / offer.moves

    def _fitting(
        self, window: Window, before: np.ndarray, offers: list[Offer], terms: Terms, room: int
    ) -> Iterator[Offer]:
        """The offers that fit `room` moves and max_layers, and parts of some that do not fit.

        What room is left is for first moves that cost balance until others follow. What was begun
        and leads no further, for all the room there is, stays at that.
        """
        whole, layers, tries = room, 0, PARTS
        stuck: list[Offer] = []
        for costly in (False, True):
            for offer in stuck if costly else offers:
                fits = offer.moves <= room
                parts = [offer] if fits else []
                if not fits and room and (costly or tries > 0):
                    parts = self._parts(window, before, offer, terms, room, costly)
                    if not parts and not costly:
                        stuck.append(offer)
                    elif not parts and room == whole and offer.layer in self._going:
                        self._promises.settle(offer.layer, float(before[offer.layer]))
                tries -= not fits
                for part in parts:
                    if layers == self.max_layers:
                        return
                    room -= part.moves
                    layers += 1
                    yield part

    def _parts(
        self,
        window: Window,
        before: np.ndarray,
        offer: Offer,
        terms: Terms,
        room: int,
        costly: bool,
    ) -> list[Offer]:
        """A part of an offer that does not fit, or another one that does; or none."""
        paid = self._going.has_paid(offer.layer)
        if costly:
            new = offer.layer not in self._going and offer.gain >= self.min_gain
            most = math.inf if paid else offer.gain
            wanted = paid or (new and not window.anew)
            return self._finder.costly(window, before, offer, terms, room, most) if wanted else []
        parts = self._finder.part(window, before, offer, terms, room)
        if parts or paid:  # what else there is might lead back
            return parts
        return self._finder.near(window, before, offer, terms, room)


def warmup() -> None:
    """Compile, or load from the cache, every kernel that planning and cutting rounds needs."""
    tokens = np.array([[[9, 5, 1, 1]], [[8, 5, 2, 1]]] * 4)
    placement = np.array([[[0, 1, 2], [2, 3, 0]]])
    for threads in (1, 2):
        planner = FlashLB(2, 3, effort="thorough", routing="weighted", threads=threads)
        planner.plan(tokens, placement, every_layer=True)
    for routing in ("uniform", "by_source"):
        FlashLB(2, 3, min_excess=0, routing=routing).plan(tokens, placement)
    plan = make_plan(placement, placement[:, ::-1])
    part_of_the_way(tokens.astype(np.float64), 0, plan.before[0], plan.placement[0], 1, False)
    plan.rounds(1)
