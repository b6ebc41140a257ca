"""Policies to compare with: one that moves nothing and one that moves everything anywhere."""

from __future__ import annotations

import numpy as np
from numba import njit

from .check import checked_heat, checked_placement, optional, shares, whole
from .par import episode_par
from .plan import Plan, make_plan


class Static:
    """Never moves anything; its plans only measure.

    Args:
        ranks: EP ranks, at least 1.
        slots_per_rank: slots of each layer on each rank, at least 1.
        ranks_per_node: as every policy takes it; of no matter here.

    Raises:
        ValueError: an argument is out of range; it names the argument, value and range.
    """

    def __init__(self, ranks: int, slots_per_rank: int, ranks_per_node: int | None = None) -> None:
        self.ranks = whole("ranks", ranks, 1)
        self.slots_per_rank = whole("slots_per_rank", slots_per_rank, 1)
        self.ranks_per_node = optional("ranks_per_node", ranks_per_node, 1)

    def plan(self, heat: np.ndarray, placement: np.ndarray) -> Plan:
        """An empty plan.

        Args:
            heat: tokens[episodes, layers, experts], finite and not negative, any real dtype.
            placement: int[layers, ranks, slots], today's placement.

        Raises:
            ValueError: heat or placement is unfit; it names the argument, value and what is
                allowed. A placement that loses or doubles an expert is a PlacementError.
        """
        heat = checked_heat(heat)
        placement = checked_placement(placement, heat, self.ranks, self.slots_per_rank)
        ratios = episode_par(shares(heat), placement).mean(axis=0)
        return make_plan(placement, placement, par_before=ratios, par_after=ratios)


class Random:
    """A random valid placement at each plan, whatever the heat: it makes loaders work.

    Replica counts are random too. Two objects with one seed give the same sequence of plans.

    Args:
        ranks: EP ranks, at least 1.
        slots_per_rank: slots of each layer on each rank, at least 1.
        ranks_per_node: consecutive ranks that share a node, whose weights are taken first; None if
            distance is of no matter.
        seed: of the sequence of plans, at least 0.

    Raises:
        ValueError: an argument is out of range; it names the argument, value and range.
    """

    def __init__(
        self,
        ranks: int,
        slots_per_rank: int,
        ranks_per_node: int | None = None,
        *,
        seed: int = 0,
    ) -> None:
        self.ranks = whole("ranks", ranks, 1)
        self.slots_per_rank = whole("slots_per_rank", slots_per_rank, 1)
        self.ranks_per_node = optional("ranks_per_node", ranks_per_node, 1)
        self._random = np.random.default_rng(whole("seed", seed, 0))

    def plan(self, heat: np.ndarray, placement: np.ndarray) -> Plan:
        """The plan to the next random placement; its PAR is mostly worse than today's.

        Args:
            heat: tokens[episodes, layers, experts], finite and not negative, any real dtype.
            placement: int[layers, ranks, slots], today's placement.

        Raises:
            ValueError: heat or placement is unfit; it names the argument, value and what is
                allowed. A placement that loses or doubles an expert is a PlacementError.
        """
        heat = checked_heat(heat)
        placement = checked_placement(placement, heat, self.ranks, self.slots_per_rank)
        heat = shares(heat)
        wanted = placement.copy()
        for layer in wanted:
            layer[:] = self._placed(heat.shape[2])
        before = episode_par(heat, placement).mean(axis=0)
        after = episode_par(heat, wanted).mean(axis=0)
        return make_plan(
            placement,
            wanted,
            par_before=before,
            par_after=after,
            ranks_per_node=self.ranks_per_node,
        )

    def _placed(self, experts: int) -> np.ndarray:
        """int32[ranks, slots]: one layer, dealt out like cards and then shuffled by exchanges."""
        ranks, slots = self.ranks, self.slots_per_rank
        spare = experts * (ranks - 1)  # each expert may have up to `ranks` replicas
        extra = self._random.choice(spare, ranks * slots - experts, replace=False) % experts
        counts = 1 + np.bincount(extra, minlength=experts)
        order = self._random.permutation(experts)
        # All replicas of an expert lie side by side, so dealing puts them on different ranks.
        dealt = np.repeat(order, counts[order]).reshape(slots, ranks)
        layer = np.ascontiguousarray(dealt.T, dtype=np.int32)
        _shuffle(layer, experts, self._random.integers(layer.size, size=(4 * layer.size, 2)))
        return layer


@njit(nogil=True, cache=True)
def _shuffle(layer, experts, pairs):
    """Exchange the experts of each pair of slots in turn, where no rank would get one twice."""
    slots = layer.shape[1]
    held = np.zeros((len(layer), experts), np.bool_)
    for rank in range(len(layer)):
        for expert in layer[rank]:
            held[rank, expert] = True
    for pair in pairs:
        (a, i), (b, j) = divmod(pair[0], slots), divmod(pair[1], slots)
        one, two = layer[a, i], layer[b, j]
        if held[a, two] or held[b, one]:
            continue
        layer[a, i], layer[b, j] = two, one
        held[a, one] = held[b, two] = False
        held[a, two] = held[b, one] = True


def warmup() -> None:
    """Compile, or load from the cache, every kernel of these policies."""
    heat = np.array([[[9, 5, 1, 1]], [[8, 5, 2, 1]]])
    placement = np.array([[[0, 1, 2], [2, 3, 0]]])
    Random(2, 3).plan(heat, placement)
