"""One rank of an engine without torch: the real segment, loader and vote around one-word rows."""

from __future__ import annotations

import time

import numpy as np

from ...ipc.doorbell import Doorbell
from ...ipc.liveness import SegmentAbsentError
from ...ipc.names import bell_name, rank_name
from ...ipc.rank_segment import RankSegment, why_silent
from ...ipc.status import Field
from ...loaders.loader import Loader
from ...loaders.patrol import Patrol
from ...loaders.stager_pool import StagerPool
from ...loaders.vote import Vote
from ...planners.replay import linear_placement
from ..config import Config
from .figures import Figures, Rank
from .rows import RowEngine, RowStager, contents
from .setup import Setup

_PATIENCE = 600.0  # seconds, as an engine would have in its own collectives


def first_placement(setup: Setup) -> np.ndarray:
    """int32 [layers, ranks, slots]: vLLM's at its start."""
    return linear_placement(setup.layers, setup.experts, setup.ranks, setup.slots)


class RowRank:
    """A rank whose experts are one word each.

    Make all ranks of the group, then `open` them, then `step` them by turns.

    Args:
        setup: of the stress.
        config: the balancer's settings.
        figures: shared by the processes.
        rank: number of it.
        generation: of the group.
    """

    def __init__(self, setup: Setup, config: Config, figures: Figures, rank: int, generation: int):
        self._setup = setup
        self._config = config
        self._told = figures.ranks[rank]
        self._figures = figures
        self._rank = rank
        self._content = contents(setup.layers, setup.experts)
        self._shape = setup.group_shape(config)
        self._stagers: list[RowStager] = []
        self._bell: Doorbell | None = None
        self._box: RankSegment | None = None
        self._step = 0
        placement = first_placement(setup)
        figures.rows[rank] = self._rows_of(placement)
        self._segment = RankSegment.create(setup.session, self._shape, rank, generation)
        if rank == 0:
            self._bell = Doorbell.create(bell_name(setup.session))
        self._engine = RowEngine(placement)

    def open(self) -> None:
        """All ranks have their segments: vote in that of rank 0, and let the planner come."""
        name = rank_name(self._setup.session, 0)
        self._box = RankSegment.open(name, writable=True, published=False)
        config, shape = self._config, self._shape
        self._loader = Loader(
            self._engine,
            self._segment,
            Vote(self._box.ballots, self._rank, self._why_silent, _PATIENCE),
            StagerPool(self._stager, self._rank, shape.staging_rows),  # type: ignore[arg-type]
            Patrol(shape.layers, shape.slots, config.patrol_steps if config.verify else 0),
            config.vote_steps,
            config.plan_timeout_steps,
        )
        self._segment.publish()

    @property
    def epoch(self) -> int:
        """Rounds committed."""
        return self._loader.epoch

    @property
    def placement(self) -> np.ndarray:
        """int32 [layers, ranks, slots], as it is committed."""
        return self._loader.placement

    @property
    def columns(self) -> np.ndarray:
        """int16 [layers, ranks, slots], the routing columns that are committed."""
        return self._engine.columns.committed

    def step(self, heat: np.ndarray, tokens: int, flags: int) -> None:
        """A forward pass in which `heat` (int32 [layers, ranks * slots]) was counted."""
        self._step += 1
        self._segment.heat.push(
            self._step, time.monotonic_ns(), tokens, flags, self._loader.epoch, heat
        )
        for stager in self._stagers:
            stager.advance()
        committed = self._loader.tick()
        if committed:
            self._engine.columns.commit()
            self._told[Rank.EPOCH] = self._loader.epoch
            self._check()
        self._told[Rank.STOPPED] = bool(self._loader.stopped)
        self._segment.status.show(Field.STEP, self._step)
        self._told[Rank.STEP] = self._step
        if self._bell is not None and (committed or self._step % self._config.bell_steps == 0):
            self._bell.ring()

    def _stager(self) -> RowStager:
        made = RowStager(self._figures, self._rank, self._content)
        self._stagers = [*(stager for stager in self._stagers if stager.busy), made]
        return made

    def _rows_of(self, placement: np.ndarray) -> np.ndarray:
        return self._content[np.arange(len(placement))[:, None], placement[:, self._rank]]

    def _check(self) -> None:
        """After a commit: every slot holds what the placement names."""
        wrong = self._figures.rows[self._rank] != self._rows_of(self._loader.placement)
        self._told[Rank.CHECKED] += 1
        self._told[Rank.WRONG] += int(wrong.sum())

    def _why_silent(self, rank: int) -> str:
        """By its name, for a process of many ranks cannot hold all descriptors of each."""
        try:
            return why_silent(self._setup.session, rank)
        except SegmentAbsentError:
            return "is dead, and what it left was removed"

    def close(self) -> None:
        """Remove what this rank owns."""
        if self._bell is not None:
            self._bell.close()
        for segment in (self._box, self._segment):
            if segment is not None:
                segment.close()
