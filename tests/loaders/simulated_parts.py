"""What is simulated of a rank: its vote's collective, its stagers, and the engine.

The collective is exact: the n-th vote of a rank meets the n-th of the others, and a rank that would
wait for them does not move. The rows of a stager arrive one by one, or late, or never.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from flash_eplb.loaders.copies import Copies
from flash_eplb.loaders.errand import Errand, Result, my_rows
from flash_eplb.loaders.vote import Ballot, Outcome, to_outcome, to_words

if TYPE_CHECKING:
    from simulated_rank import SimulatedRank


class Votes:
    """The collective: all ranks' words, in the order in which each rank issued them."""

    def __init__(self, ranks: int):
        self.words: list[list[list[int]]] = [[] for _ in range(ranks)]

    def is_complete(self, number: int) -> bool:
        """Whether every rank has issued vote `number`."""
        return min(map(len, self.words)) > number

    def outcome(self, number: int) -> Outcome:
        """Of vote `number`."""
        columns = zip(*(words[number] for words in self.words), strict=True)
        return to_outcome(list(map(min, columns)))


class SimulatedVote:
    """Stands for `Vote`."""

    def __init__(self, rank: SimulatedRank):
        self._rank = rank
        self._votes = rank.simulation.votes
        self._consumed = 0

    def issue(self, ballot: Ballot) -> None:
        self._rank.check_candidate(ballot.candidate)
        self._votes.words[self._rank.number].append(to_words(ballot, self._rank.number))

    def is_owed(self) -> bool:
        return self._consumed < len(self._votes.words[self._rank.number])

    def would_wait(self) -> bool:
        return self.is_owed() and not self._votes.is_complete(self._consumed)

    def consume(self) -> Outcome | None:
        if not self.is_owed():
            return None
        assert not self.would_wait(), "the schedule ran a rank that waits for a vote"
        self._consumed += 1
        return self._votes.outcome(self._consumed - 1)


class Transfer:
    """What a stager does for one errand: (row, move) that come or have landed on `rank`."""

    def __init__(self, errand: Errand, rank: int):
        self.errand = errand
        mine = errand.moves[my_rows(errand.moves, rank)]
        self.coming = list(zip(errand.rows, mine, strict=True))
        self.landed: list[tuple[int, Any]] = []
        self.is_given_up = False


class SimulatedStager:
    """Stands for `Stager`; the schedule lets it advance, fail or hang."""

    def __init__(self, rank: SimulatedRank):
        self._rank = rank
        self.result: Result | None = None
        self.busy = self.is_hung = False
        self.waits = False
        rank.stagers = [*(stager for stager in rank.stagers if stager.busy), self]

    def begin(self, errand: Errand) -> None:
        assert not self.busy, "a stager got an errand before it was done with another"
        self.busy, self.result = True, None
        self.transfer = Transfer(errand, self._rank.number)
        self._rank.see_begin(self.transfer)

    @property
    def may_fail(self) -> bool:
        """Whether it is at something that other ranks have a part in."""
        return self.busy and not self.is_hung and self.transfer.errand.beat is None

    def leave(self) -> None:
        pass

    def close(self) -> None:
        pass

    def advance(self) -> None:
        """The next row arrives, or, after the last, the result stands."""
        transfer = self.transfer
        if transfer.coming:
            row, move = transfer.coming.pop(0)
            self._rank.receive(transfer, row, move)
            transfer.landed.append((row, move))
            return
        if transfer.errand.beat is not None:
            self._rank.check_beat(transfer.errand.beat)
        whole = all(self._rank.is_whole(row, move) for row, move in transfer.landed)
        assert whole or transfer.is_given_up, "a row of the round under way is not its expert"
        self._end("" if whole else "another digest")
        if whole and not transfer.is_given_up:
            self._rank.see_staged(transfer)

    def fail(self) -> None:
        self._rank.see_failure(self.transfer)
        self._end("simulated")

    def hang(self) -> None:
        self.is_hung = True

    def wake(self) -> None:
        self.is_hung = False

    def _end(self, error: str) -> None:
        live, staged = [], []
        for row, move in self.transfer.landed:
            live.extend(self._rank.live_views(move["layer"], move["slot"]))
            staged.extend(self._rank.staging.views(row, int(move["layer"])))
        if self.transfer.errand.tables is not None and not error:
            parts, values = self.transfer.errand.tables()
            live, staged = live + parts, staged + values
        copies = Copies(live, staged)
        self.result = Result(self.transfer.errand.identity, error, copies=copies)
        self.busy = self.is_hung = False


class SimulatedEngine:
    """Implements `engine.Engine`; `live` int32 [layers, slots, WIDTH] lies under its tensors."""

    counts_own_slots = False
    routes_by_source = False

    def __init__(self, placement: np.ndarray, live: np.ndarray):
        self.placement = placement
        self.live = live
        self.weights = [
            [torch.from_numpy(layer[:, :3]), torch.from_numpy(layer[:, 3:])] for layer in live
        ]
        self.loads: list[torch.Tensor] = []
        self.buffer: list[torch.Tensor] = []
        self.communicators: list[Any] = []
        self.routed = placement.copy()
        self.columns = np.ones_like(placement)
        self.kept = (self.routed, self.columns)

    def replaced(self, layer: int) -> str:
        return ""

    def tables(
        self, layers: np.ndarray, placement: np.ndarray, columns: np.ndarray | None
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        live = [torch.from_numpy(table[layer]) for table in self.kept for layer in layers]
        shares = np.ones_like(placement[layers]) if columns is None else columns
        values = [torch.tensor(cells) for made in (placement[layers], shares) for cells in made]
        return live, values
