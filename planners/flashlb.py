"""FlashLB: replica counts and placement searched together, over many episodes, layer by layer.

The three ideas are those of the policy of that name in vLLM-Ascend: a joint search of counts and
placement, many episodes at once, and plans only for the layers that are worth it. The search is
ours: see `search.py`, `improve.py` and `place.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import product

import numpy as np

from ..ipc.round import MOST_COLUMNS
from .check import amount, checked_heat, checked_placement, one_of, tamed, whole
from .columns import Columns, divided_par, follow
from .efforts import EFFORTS, effort_of
from .forecast import DOUBT, forecast
from .memory import MERGED, Memory, is_alike
from .partway import Going, moves_between, part_of_the_way
from .plan import Plan, align_all, make_plan, plan_between
from .promises import Promises, hoped
from .search import Terms, measure, search_layers
from .window import Offer, Window

EVERY_LAYER_PRICE = 0.001
"""`move_price` of a plan for every layer: enough that nothing moves for nothing."""

FIRST_SHARE = 0.03
"""Share of the price of moves that a layer without a promise pays: its plan gains for long."""

FAR = 3.0
"""Times the price of moves that a layer with a promise pays if all is placed anew."""

BEYOND_NOISE = 2.0
"""Standard errors above `min_gain` that a gain must be where counts are largely chance; twice as
many if the layer has no promise, for a planner that starts must not undo what is there."""

NEWEST = 8
"""Episodes, the newest, on which a plan can be confirmed if the heat has changed before them."""

PARTS = 8
"""Layers whose plan does not fit `max_moves` that are searched again with what is left."""


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
        ranks: EP ranks, at least 1.
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
        max_moves: most moves in one plan; None for no limit.
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
        move_price: float = 0.05,
        floor: float = 0.05,
        tolerance: float = 0.02,
        half_life: float = 64,
        max_moves: int | None = None,
        max_layers: int | None = None,
        threads: int = 1,
    ) -> None:
        self.ranks = whole("ranks", ranks, 1)
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
        self._planned = np.empty((0, self.ranks, self.slots_per_rank), np.int32)
        self._columns = np.empty(self._planned.shape, np.int16)
        self._division = None
        if routing != "uniform":
            self._division = Columns(self.max_columns, routing == "by_source", self._spread)

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
        window = self._window(tokens, today, every_layer)
        now, error = self._measure(window.tokens, today, columns=self._columns)
        shown: np.ndarray = now
        if window.noise.any():
            shown = self._measure(tokens, today, columns=self._columns)[0]
        before: np.ndarray = now
        rerouted = np.empty(0, np.int64)
        if self._division is not None:
            rerouted = self._division.rerouted(window, shown, self.min_excess, self.min_gain)
        if len(rerouted):  # that is free, so what moves has to win more
            before, error = self._measure(window.tokens, today, columns=window.columns)
        due = np.flatnonzero(before > 1)
        if not every_layer:
            due = self._promises.due(window, before, error)
        if not room or self.ranks == 1:
            due = due[:0]
        slots = self.ranks * self.slots_per_rank
        terms = Terms(
            price=(EVERY_LAYER_PRICE if every_layer else self.move_price) / slots,
            far_price=0.0,  # `_find` knows it
            most_moves=slots,
            scratch=True,
            today=True,
            max_columns=0 if self.routing == "uniform" else self.max_columns,
            by_source=self.routing == "by_source",
        )
        going = [] if every_layer else self._still_going(window, before, due, terms)
        due = np.array([layer for layer in due.tolist() if layer not in self._going], np.int64)
        offers = self._offers(window, before, due, terms)
        if not every_layer:
            offers = [offer for offer in offers if offer.gain >= self.min_gain]
            offers = self._confirmed(window, offers, terms)
        offers = sorted([*going, *offers], key=lambda offer: -offer.gain / offer.moves)
        taken = {offer.layer: offer for offer in self._fitting(window, before, offers, terms, room)}
        self._promises.remember(offers, taken, every_layer)
        self._going.remember(offers, taken)
        return self._plan(window, shown, before, taken, rerouted)

    def forget(self) -> None:
        """The last plan was not carried out: the layers are not where it wanted them."""
        self._planned[:] = -1

    def _window(self, tokens: np.ndarray, today: np.ndarray, every_layer: bool) -> Window:
        """What is planned from: the heat, what to expect from it, and what is remembered."""
        kept = self._kept(today)
        past, worth = self._memory.recall(tokens)
        alike = kept & is_alike(past, tokens)
        settled = kept & self._promises.made
        expected, error = tokens, np.zeros(len(today))
        if not every_layer:
            expected, error = forecast(tokens, past * alike[:, None], MERGED)
            error *= settled | (expected is not tokens)  # the first plan of short windows is free
        return Window(
            seen=tokens,
            tokens=expected,
            noise=error * math.sqrt(self.ranks),
            past=past,
            worth=worth,
            alike=alike & ((error == 0) | (expected is tokens)),  # else it is in what is expected
            kept=kept,
            settled=settled,
            anew=every_layer,
            today=today,
            columns=self._columns,
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
            self._division.give_up(window.seen, wanted, columns)
            self._columns = columns.copy()
        if window.noise.any():
            after = self._measure(window.seen, wanted, columns=columns)[0]
        self._planned = wanted.copy()
        others = [layer for layer in rerouted.tolist() if layer not in taken]
        near = self.ranks_per_node
        return plan_between(window.today, wanted, before, after, columns, near, others)

    def _kept(self, today: np.ndarray) -> np.ndarray:
        """Whether each layer has the placement that the last plan gave it; forgets the others."""
        if self._planned.shape != today.shape:
            self._planned = np.full_like(today, -1)
            self._columns = np.ones(today.shape, np.int16)
        kept = (self._planned == today).all(axis=(1, 2))
        if self._division is not None:
            self._columns[~kept] = self._division.initial(today[~kept])
        self._promises.keep(kept)
        self._going.keep(kept)
        return kept

    def _offers(
        self, window: Window, before: np.ndarray, layers: np.ndarray, terms: Terms
    ) -> list[Offer]:
        """For each of `layers` what pays for its moves, best gain per move first."""
        found, moves = self._find(window, layers, terms)
        # never worse than uniform routing on the heat that was given, where that is possible at all
        heat = window.tokens if self.routing == "by_source" else window.seen
        columns: np.ndarray = np.ones(found.shape, np.int16)
        if self._division is not None:
            columns = self._division.proved(heat, found, layers)
        after, _ = self._measure(window.tokens, found, layers, columns)
        gains = before[layers] - after
        prices = np.where(window.settled[layers], 1, FIRST_SHARE) * terms.price
        pays = np.flatnonzero((moves > 0) & (gains > prices * moves))
        order = pays[np.argsort(-gains[pays] / moves[pays], kind="stable")]
        return [
            Offer(
                layer=int(layers[i]),
                placement=found[i],
                columns=columns[i],
                par=float(after[i]),
                gain=float(gains[i]),
                moves=int(moves[i]),
                promise=float(after[i]),
            )
            for i in order
        ]

    def _confirmed(self, window: Window, offers: list[Offer], terms: Terms) -> list[Offer]:
        """The offers that chance does not explain, with what they can promise."""
        clear = []
        for offer in offers:
            noise = window.noise[offer.layer]
            beyond = BEYOND_NOISE * noise * (1 if window.settled[offer.layer] else 2)
            if offer.gain >= self.min_gain + beyond:
                clear.append(offer._replace(promise=offer.par + DOUBT * noise))
        rest = clear
        if window.tokens is not window.seen:  # what is expected is no window with halves
            rest = [offer for offer in clear if not window.noise[offer.layer]]
        repeated = {offer.layer: offer for offer in self._repeated(window, rest, terms)}
        left = {offer.layer for offer in rest} - repeated.keys()
        return [repeated.get(offer.layer, offer) for offer in clear if offer.layer not in left]

    def _repeated(self, window: Window, offers: list[Offer], terms: Terms) -> list[Offer]:
        """The offers of layers whose gain is not that of one half of the window only.

        A plan from the older half of the window must win min_gain on the newer half: by one
        standard error if it wins five times as much, else by three. Its PAR there is what may be
        expected. Where the heat has changed within the window, the older half is of the past: then
        the same is asked of the newest episodes alone, of fewer and fewer.
        """
        newest = len(window.tokens)
        half = newest // 2
        if not window.tokens[:half].any() or not window.tokens[half:].any():
            return offers
        sure = self._won(window, offers, terms)
        while newest >= 4 * NEWEST:
            newest //= 2
            rest = [offer for offer in offers if offer.layer not in sure]
            part = window._replace(tokens=window.tokens[-newest:], alike=window.alike & False)
            sure |= self._won(part, self._changed(window, rest, newest), terms)
        return [sure[offer.layer] for offer in offers if offer.layer in sure]

    def _won(self, window: Window, offers: list[Offer], terms: Terms) -> dict[int, Offer]:
        """By layer, the offers that plans from the older half of `window` confirm on the newer."""
        if not offers:
            return {}
        half = len(window.tokens) // 2
        layers = np.array([offer.layer for offer in offers], np.int64)
        found, _ = self._find(window._replace(tokens=window.tokens[:half]), layers, terms)
        columns = self._planned_columns(window.tokens[:half], found, layers)
        newer = window.tokens[half:, layers]
        ratios = _ratios(newer, found, columns)
        gains = _ratios(newer, window.today[layers], window.columns[layers]) - ratios
        error = gains.std(axis=0) / math.sqrt(len(gains)) * _rareness(len(gains))
        doubt = np.minimum(DOUBT * error, np.maximum(error, 4 * self.min_gain))
        sure = gains.mean(axis=0) - doubt >= self.min_gain
        unseen = ratios.mean(axis=0)
        return {
            offer.layer: offer._replace(
                promise=float(np.clip(unseen[i], offer.promise, hoped(offer.promise)))
            )
            for i, offer in enumerate(offers)
            if sure[i]
        }

    def _changed(self, window: Window, offers: list[Offer], newest: int) -> list[Offer]:
        """The offers of layers whose PAR in the `newest` episodes is clearly above that before."""
        if not offers:
            return []
        layers = np.array([offer.layer for offer in offers], np.int64)
        tokens = window.tokens[:, layers]
        ratios = _ratios(tokens, window.today[layers], window.columns[layers])
        before, now = ratios[:-newest], ratios[-newest:]
        error = np.sqrt(before.var(axis=0) / len(before) + now.var(axis=0) / len(now))
        apart = np.abs(now.mean(axis=0) - before.mean(axis=0))
        changed = apart > np.maximum(DOUBT * error, self.min_gain)
        return [offer for offer, is_so in zip(offers, changed, strict=True) if is_so]

    def _still_going(
        self, window: Window, before: np.ndarray, due: np.ndarray, terms: Terms
    ) -> list[Offer]:
        """What is left of the offers that were carried out in part; they were confirmed then.

        Where the heat has changed another is looked for; where no more is won by what is left, it
        stays at that.
        """
        offers = []
        for offer in self._going.offers():
            layer = np.array([offer.layer])
            par = self._measure(window.tokens, offer.placement[None], layer, offer.columns[None])
            offer = offer._replace(
                par=float(par[0, 0]),
                gain=float(before[offer.layer] - par[0, 0]),
                moves=moves_between(window.today[offer.layer], offer.placement),
            )
            is_worth = offer.moves and offer.gain > FIRST_SHARE * terms.price * offer.moves
            if offer.layer not in due or offer.par > hoped(offer.promise) + self.min_gain:
                self._going.drop(offer.layer)
            elif is_worth:
                offers.append(offer)
            else:
                self._promises.settle(offer.layer, float(before[offer.layer]))
        return offers

    def _part(self, window: Window, before: np.ndarray, offer: Offer, room: int) -> list[Offer]:
        """As much of an offer as fits into `room` moves; none if nothing does."""
        layer, today = offer.layer, window.today[offer.layer]
        wanted = align_all(today[None], offer.placement[None], window.tokens.shape[2])[0]
        reached = part_of_the_way(window.tokens, layer, today, wanted, room)
        moves = moves_between(today, reached)
        if not moves:
            return []
        chosen = np.array([layer])
        columns: np.ndarray = np.ones((1, *reached.shape), np.int16)
        if self._division is not None:
            columns = self._division.proved(window.tokens, reached[None], chosen)
        par = float(self._measure(window.tokens, reached[None], chosen, columns)[0, 0])
        gain = float(before[layer]) - par
        return [
            offer._replace(placement=reached, columns=columns[0], par=par, gain=gain, moves=moves)
        ]

    def _fitting(
        self, window: Window, before: np.ndarray, offers: list[Offer], terms: Terms, room: int
    ) -> Iterator[Offer]:
        """The offers that fit `room` moves and max_layers, and parts of some that do not fit."""
        layers, tries = 0, PARTS
        for offer in offers:
            parts = [offer]
            if offer.moves > room:
                parts = []
                if room and tries > 0:
                    parts = self._part(window, before, offer, room)
                    parts = parts or self._near(window, before, offer, terms, room)
                tries -= 1
            for part in parts:
                if layers == self.max_layers:
                    return
                room -= part.moves
                layers += 1
                yield part

    def _near(
        self, window: Window, before: np.ndarray, offer: Offer, terms: Terms, room: int
    ) -> list[Offer]:
        """Another offer for that layer, of `room` moves; it must win its share of min_gain."""
        near = terms._replace(most_moves=room, scratch=False)
        least = 0.0 if window.anew else self.min_gain / offer.moves
        found = self._offers(window, before, np.array([offer.layer]), near)
        return [part for part in found if part.gain >= least * part.moves]

    def _find(
        self, window: Window, layers: np.ndarray, terms: Terms
    ) -> tuple[np.ndarray, np.ndarray]:
        """Placements int32[n, ranks, slots] for `layers`, and the moves int64[n] they take."""
        found = np.empty((len(layers), self.ranks, self.slots_per_rank), np.int32)
        moves = np.empty(len(layers), np.int64)
        for kept, settled, alike in product((False, True), repeat=3):
            mine = (window.kept[layers] == kept) & (window.settled[layers] == settled)
            mine &= window.alike[layers] == alike
            if not mine.any():
                continue
            heat, weights = window.with_past() if alike else window.alone()
            price = terms.price * (1 if settled else FIRST_SHARE)
            far_price = price * (FAR if settled and not window.anew else 1)
            search = partial(search_layers, heat, weights, window.today)
            effort = effort_of(self.effort, self.ranks * self.slots_per_rank, len(heat))
            today = kept or not window.anew or not terms.scratch  # else it is new altogether
            rest = (effort, terms._replace(price=price, far_price=far_price, today=today))

            def work(part: np.ndarray, search=search, rest=rest) -> None:
                found[part], moves[part] = search(layers[part], *rest)

            self._spread(work, np.flatnonzero(mine))
        return found, moves

    def _measure(
        self,
        tokens: np.ndarray,
        placement: np.ndarray,
        layers: np.ndarray | None = None,
        columns: np.ndarray | None = None,
    ) -> np.ndarray:
        """(PAR, its standard error) [2, n] of placement[i] on `layers`[i], all of them if None;
        with `columns`[i] where they are planned."""
        layers = np.arange(tokens.shape[1]) if layers is None else layers
        if self._division is not None and columns is not None:
            return self._division.measure(tokens, placement, layers, columns)
        par = np.empty((2, len(layers)))

        def work(part: np.ndarray) -> None:
            par[:, part] = measure(tokens, placement[part], layers[part])

        self._spread(work, np.arange(len(layers)))
        return par

    def _spread(self, work: Callable[[np.ndarray], None], rows: np.ndarray) -> None:
        """Call `work` on parts of `rows`, in as many threads as there are; kernels free the GIL."""
        parts = [rows[i :: self.threads] for i in range(min(self.threads, len(rows)))]
        if len(parts) < 2:
            for part in parts:
                work(part)
            return
        with ThreadPoolExecutor(len(parts)) as pool:
            list(pool.map(work, parts))

    def _planned_columns(
        self, tokens: np.ndarray, placement: np.ndarray, layers: np.ndarray
    ) -> np.ndarray:
        """int16[n, R, S], with which placements of `layers` are measured."""
        if self._division is None:
            return np.ones(placement.shape, np.int16)
        return self._division.planned(tokens, placement, layers)


def _ratios(tokens: np.ndarray, placement: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """PAR of each episode [T, n] of placements of all layers of `tokens`."""
    return divided_par(np.ascontiguousarray(tokens), placement, np.arange(len(placement)), columns)


def _rareness(count: int) -> float:
    """By how much more than a normal deviate one must allow for whose error `count` samples tell.

    About the ratio of the quantiles beyond DOUBT of Student's t distribution and the normal one.
    """
    return count / (count - 3) if count > 3 else 4.0


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
    part_of_the_way(tokens.astype(np.float64), 0, plan.before[0], plan.placement[0], 1)
    plan.rounds(1)
