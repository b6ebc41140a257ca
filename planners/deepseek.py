"""The policy of DeepSeek's EPLB: replicas by load, packed to nodes and ranks by the window's sum.

Source: the algorithm that DeepSeek published as "Expert Parallelism Load Balancer" (2025), with a
hierarchical and a global form; vLLM's default policy is another implementation of it. Here an
expert never stands twice on a rank.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from .check import amount, checked_heat, checked_placement, optional, shares, whole
from .par import episode_par
from .plan import Plan, make_plan


class DeepSeek:
    """Places all experts afresh, by their tokens in the whole window.

    Each redundant slot goes to the expert with the most tokens per replica; then the replicas,
    heaviest first, go to the rank with the fewest tokens that has a free slot. The hierarchical
    form first packs groups of consecutive experts to the nodes in the same way, and replicates and
    packs within each node. It is used where there are several nodes, all of the same size, and
    `groups` divides the experts and is a multiple of the nodes; the global form, which knows no
    nodes, otherwise.

    Args:
        ranks: EP ranks, at least 1.
        slots_per_rank: slots of each layer on each rank, at least 1.
        ranks_per_node: consecutive ranks that share a node; None for a single node.
        groups: groups of experts that a token's experts are chosen from together; None for one.
        min_excess: PAR - 1 up to which a layer is left alone; 0 leaves only perfect ones.
        min_gain: least PAR a layer's new placement must win; None, as in DeepSeek's own, takes it
            even where it loses.

    Raises:
        ValueError: an argument is out of range; it names the argument, value and range.
    """

    def __init__(
        self,
        ranks: int,
        slots_per_rank: int,
        ranks_per_node: int | None = None,
        groups: int | None = None,
        *,
        min_excess: float = 0.0,
        min_gain: float | None = None,
    ) -> None:
        self.ranks = whole("ranks", ranks, 1)
        self.slots_per_rank = whole("slots_per_rank", slots_per_rank, 1)
        self.ranks_per_node = optional("ranks_per_node", ranks_per_node, 1)
        near = self.ranks_per_node or self.ranks
        self.nodes = self.ranks // near if self.ranks % near == 0 else 1
        self.groups = optional("groups", groups, 1) or 1
        self.min_excess = amount("min_excess", min_excess)
        self.min_gain = None if min_gain is None else amount("min_gain", min_gain)

    def plan(self, heat: np.ndarray, placement: np.ndarray) -> Plan:
        """The plan for the heat of one window. Layers without heat stay as they are.

        Args:
            heat: tokens[episodes, layers, experts], finite and not negative, any real dtype.
            placement: int[layers, ranks, slots], today's placement.

        Raises:
            ValueError: heat or placement is unfit; it names the argument, value and what is
                allowed. A placement that loses or doubles an expert is a PlacementError.
        """
        heat = checked_heat(heat)
        placement = checked_placement(placement, heat, self.ranks, self.slots_per_rank)
        ratios = shares(heat)
        before = episode_par(ratios, placement).mean(axis=0)
        due = np.flatnonzero(before > 1.0 + self.min_excess)
        wanted, after = placement.copy(), before.copy()
        wanted[due] = self._placed(_window_sum(heat[:, due]))
        after[due] = episode_par(ratios[:, due], wanted[due]).mean(axis=0)
        if self.min_gain is not None:
            idle = (before - after < self.min_gain) | (after >= before)
            wanted[idle], after[idle] = placement[idle], before[idle]
        return make_plan(
            placement,
            wanted,
            par_before=before,
            par_after=after,
            ranks_per_node=self.ranks_per_node,
        )

    def _placed(self, weights: np.ndarray) -> np.ndarray:
        """int32[layers, ranks, slots] for float64[layers, experts]."""
        experts = weights.shape[1]
        nodes, groups = self.nodes, self.groups
        fits = experts % groups == 0 and groups % nodes == 0
        # A node whose experts are fewer than a rank's slots would have to hold one twice on a rank.
        if not fits or experts // nodes < self.slots_per_rank:
            nodes, groups = 1, 1
        return _place_layers(weights, self.ranks, self.slots_per_rank, nodes, groups)


def _window_sum(heat: np.ndarray) -> np.ndarray:
    """Tokens float64[layers, experts] of the window, each layer times a power of two.

    The factor changes no comparison and keeps the sum finite.
    """
    exponent = np.frexp(heat.max(axis=(0, 2), initial=0.0))[1]
    return np.ascontiguousarray(np.ldexp(heat, -exponent[:, None]).sum(axis=0))


@njit(nogil=True, cache=True)
def _place_layers(weights, ranks, slots, nodes, groups):
    """int32[layers, ranks, slots] for float64[layers, experts], layer by layer."""
    layers, experts = weights.shape
    placement = np.empty((layers, ranks, slots), np.int32)
    size = experts // groups
    near = ranks // nodes
    for layer in range(layers):
        in_group = weights[layer].copy().reshape(groups, size).sum(axis=1)
        packed = _pack(in_group, np.arange(groups), nodes, groups // nodes)
        for node in range(nodes):
            members = np.empty(experts // nodes, np.int64)
            for place, group in enumerate(packed[node]):
                members[place * size : (place + 1) * size] = np.arange(size) + group * size
            local = weights[layer][members]
            counts = _replicate(local, near * slots, near)
            replicas = np.repeat(np.arange(len(members)), counts)
            units = (local / counts)[replicas]
            own = _pack(units, replicas, near, slots)
            for rank in range(near):
                for slot in range(slots):
                    expert = members[replicas[own[rank, slot]]]
                    placement[layer, node * near + rank, slot] = expert
    return placement


@njit(nogil=True, cache=True)
def _replicate(weights, slots, most):
    """Replicas int64[experts] that fill `slots`, at most `most` of each expert.

    Each next one goes to the expert, the first of equals, with the greatest weight per replica.
    """
    counts = np.ones(len(weights), np.int64)
    units = weights.copy()
    for _ in range(slots - len(weights)):
        best = units.argmax()
        counts[best] += 1
        units[best] = weights[best] / counts[best] if counts[best] < most else -1.0
    return counts


@njit(nogil=True, cache=True)
def _pack(weights, kinds, packs, room):
    """int64[packs, room]: the items of each pack, packs * room of them in all.

    Items go, heaviest first, to the lightest pack with room that holds none of their kind. Where
    every pack with room holds one, the item changes places with another: see `_exchange`.
    """
    inside = np.empty((packs, room), np.int64)
    filled = np.zeros(packs, np.int64)
    load = np.zeros(packs)
    held = np.zeros((packs, kinds.max() + 1), np.bool_)
    for item in np.argsort(-weights, kind="mergesort"):
        kind = kinds[item]
        best = -1
        for pack in range(packs):
            open_ = filled[pack] < room and not held[pack, kind]
            if open_ and (best < 0 or load[pack] < load[best]):
                best = pack
        if best < 0:
            best, item = _exchange(item, weights, kinds, inside, filled, load, held)
        inside[best, filled[best]] = item
        filled[best] += 1
        load[best] += weights[item]
        held[best, kinds[item]] = True
    return inside


@njit(nogil=True, cache=True)
def _exchange(item, weights, kinds, inside, filled, load, held):
    """Put `item` into a full pack in place of another item; (pack, item) to place instead.

    Some pack without the item's kind is full, so it holds more kinds than a pack with room, and
    one of them can go there. Of all such exchanges it is the one after which the heavier of the
    two packs is lightest.
    """
    packs, room = inside.shape
    best, best_load = (-1, -1, -1), np.inf
    for full in range(packs):
        if filled[full] < room or held[full, kinds[item]]:
            continue
        for place in range(room):
            other = inside[full, place]
            heavy = load[full] - weights[other] + weights[item]
            for pack in range(packs):
                if filled[pack] == room or held[pack, kinds[other]]:
                    continue
                peak = max(heavy, load[pack] + weights[other])
                if peak < best_load:
                    best, best_load = (full, place, pack), peak
    full, place, pack = best
    other = inside[full, place]
    inside[full, place] = item
    load[full] += weights[item] - weights[other]
    held[full, kinds[item]] = True
    held[full, kinds[other]] = False
    return pack, other


def warmup() -> None:
    """Compile, or load from the cache, every kernel of this policy."""
    heat = np.array([[[9, 5, 1, 1]], [[8, 5, 2, 1]]])
    placement = np.array([[[0, 1, 2], [2, 3, 0]]])
    DeepSeek(2, 3).plan(heat, placement)
