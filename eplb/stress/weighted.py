"""One rank of the small engine: real rows of mixed types, which travel over gloo."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from ...loaders import transport
from ...loaders.digest import row_digest
from ...loaders.moe_engine import MoeEngine, MoeShape, expert_tensors, run_alone
from ...loaders.staging import slot_views
from ..config import Config
from ..group import Group
from ..worker import Worker
from .figures import Figures, Order, Rank
from .rows import Columns
from .setup import MODEL, Setup

COMPARE_EVERY = 128  # steps
_TOKENS = 12


class _Engine(MoeEngine):
    """The small engine, which keeps the routing columns of each slot for the synthetic heat."""

    def __init__(self, shape: MoeShape, rank: int, group: Any):
        self.columns = Columns((shape.layers, shape.ranks, shape.slots))
        super().__init__(shape, rank, group)

    def tables(
        self, layers: np.ndarray, placement: np.ndarray, columns: np.ndarray | None = None
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        self.columns.promise(layers, columns)
        return super().tables(layers, placement, columns)


class WeightedRank:
    """A rank whose worker is the one that vLLM would have; the arguments are those of `RowRank`."""

    def __init__(self, setup: Setup, config: Config, figures: Figures, rank: int, generation: int):
        torch.set_num_threads(1)
        self._setup = setup
        self._config = config
        self._figures = figures
        self._told = figures.ranks[rank]
        self._rank = rank
        self._step = self._commits = 0
        self._seed = torch.Generator().manual_seed(setup.seed * 100 + rank)
        sizes = setup.layers, setup.experts, setup.ranks, setup.slots
        self._shape = MoeShape(*sizes, seed=setup.seed)
        if rank == 0:
            self._master = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
            self._told[Rank.PORT] = self._master.port

    def open(self) -> None:
        """All ranks are there: connect."""
        setup, rank = self._setup, self._rank
        store = dist.TCPStore("127.0.0.1", int(self._figures.ranks[0, Rank.PORT]), is_master=False)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=setup.ranks)
        everyone = dist.group.WORLD
        assert everyone is not None
        self._engine = _Engine(self._shape, rank, dist.new_group(backend="gloo"))
        group = Group(rank, setup.ranks, everyone, store, tuple(range(setup.ranks)))
        models = [(MODEL, setup.layers)]
        self._worker = Worker(self._config, group, self._engine, models, setup.experts)
        self._expected = np.array(
            [
                [self._digest(expert_tensors(self._shape, layer, e)) for e in range(setup.experts)]
                for layer in range(setup.layers)
            ]
        )
        self._flip_bits(transport.PeerToPeer)
        self._worker.step(
            is_dummy=True
        )  # what was counted before the first step counts for nothing
        if self._worker.refused:
            raise RuntimeError(f"the group cannot be balanced: {self._worker.refused}")
        self._step = 1

    @property
    def epoch(self) -> int:
        """Rounds committed."""
        return self._worker.epoch

    @property
    def placement(self) -> np.ndarray:
        """int32 [layers, ranks, slots], as it is committed."""
        return self._worker.placement

    @property
    def columns(self) -> np.ndarray:
        """int16 [layers, ranks, slots], the routing columns that are committed."""
        return self._engine.columns.committed

    def step(self, heat: np.ndarray, tokens: int, flags: int) -> None:
        """A forward pass in which `heat` (int32 [layers, ranks * slots]) was counted."""
        self._step += 1
        if self._step % COMPARE_EVERY == 0:
            self._compare()
        self._worker.forward(tokens)
        self._engine.loads[0].numpy()[:] = heat
        self._worker.step(is_dummy=False, phase=flags)
        if self._worker.epoch > self._commits:
            self._commits = self._worker.epoch
            self._engine.columns.commit()
            self._told[Rank.EPOCH] = self._commits
            self._check()
        self._told[Rank.STOPPED] = self._worker.has_stopped
        self._told[Rank.STEP] = self._step

    def _digest(self, tensors: list[torch.Tensor]) -> int:
        return row_digest(slot_views([tensor.unsqueeze(0) for tensor in tensors], 0))

    def _check(self) -> None:
        """After a commit: every slot holds what the placement names."""
        placement = self._worker.placement
        for layer, tensors in enumerate(self._engine.weights):
            for slot, expert in enumerate(placement[layer, self._rank]):
                wrong = row_digest(slot_views(tensors, slot)) != self._expected[layer, expert]
                self._told[Rank.WRONG] += int(wrong)
        self._told[Rank.CHECKED] += 1

    def _compare(self) -> None:
        """All ranks, at the same step: tokens through the real layers, and through one process."""
        tokens = torch.randint(-8, 9, (_TOKENS, self._shape.hidden), generator=self._seed).float()
        skew = torch.zeros(self._shape.experts)
        kept = self._engine.loads[0].clone()
        found = self._engine.forward(tokens, skew)
        self._engine.loads[0].copy_(kept)
        differ = (found != run_alone(self._shape, tokens, skew)).any(1)
        self._told[Rank.COMPARED] += _TOKENS
        self._told[Rank.DIFFER] += int(differ.sum())

    def _flip_bits(self, owner: type) -> None:
        """Let a bit arrive turned around when the supervisor asks this rank for it."""
        original, order, told = owner.exchange, self._figures.order, self._told  # type: ignore[attr-defined]

        def exchange(one: Any, moves: Any, leaving: Any, arriving: Any) -> None:
            original(one, moves, leaving, arriving)
            due = order[Order.FLIP_RANK] == self._rank + 1
            if due and arriving and told[Rank.FLIPPED] < order[Order.FLIPS]:
                arriving[0].views[0][0] ^= 4
                told[Rank.FLIPPED] = order[Order.FLIPS]

        owner.exchange = exchange  # type: ignore[attr-defined]

    def close(self) -> None:
        """Remove what this rank owns."""
        self._worker.close()
        time.sleep(0.05)  # the stager's thread ends before its group does
        dist.destroy_process_group()
