"""One rank's part: collector and loader around a serving engine's steps.

The adaptor of an engine makes a `Worker` when the engine's models are loaded, calls `forward`
before and `step` after each forward pass, and nothing else. At the first step all ranks agree on
whether they can balance at all; if one cannot, none does, and each says why.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from multiprocessing.util import Finalize

import numpy as np
import torch.distributed as dist

from ..collectors.heat import HeatCollector
from ..ipc.doorbell import Doorbell
from ..ipc.flags import FLAG_DUMMY
from ..ipc.limits import check_files, check_memory
from ..ipc.liveness import SegmentAbsentError, SegmentError
from ..ipc.names import bell_name, rank_name
from ..ipc.rank_segment import RankSegment, segment_bytes, step_bytes
from ..ipc.session import remove_dead, session_lock
from ..ipc.shape import GroupShape, ModelShape
from ..ipc.status import Field
from ..loaders.engine import Engine
from ..loaders.loader import Loader
from ..loaders.patrol import Patrol
from ..loaders.stager import Stager
from ..loaders.stager_pool import StagerPool
from ..loaders.staging import Staging, default_rows, row_bytes
from ..loaders.transports import communicator_name, make_transport, transport_for
from ..loaders.vote import Vote
from .config import Config
from .forms import agree_on_forms
from .group import Group, UnsupportedError
from .planner_watch import PlannerWatch
from .reference import take_reference
from .scales import Scales, agree_on_scales
from .settings import agree_on_settings
from .weight_update import WeightUpdate

log = logging.getLogger("flash_eplb.worker")


class Worker:
    """Balances one rank of an engine.

    Args:
        config: settings, equal on all ranks.
        group: the EP group.
        engine: its experts on this rank.
        models: (name, layers) of the engine's models, in the engine's order.
        experts: logical experts per layer.
        unsupported: why the models cannot be balanced with the weights that they have now, "" if
            they can; asked anew after each update of the weights.
        scales: what all experts of this rank share; asked at the start and after each update.
    """

    def __init__(
        self,
        config: Config,
        group: Group,
        engine: Engine,
        models: list[tuple[str, int]],
        experts: int,
        unsupported: Callable[[], str] = lambda: "",
        scales: Callable[[], Scales] = dict,
    ):
        self._config = config
        self._group = group
        self._engine = engine
        self._unsupported = unsupported
        self._scales = scales
        self._shape = GroupShape(
            models=tuple(ModelShape(name, layers) for name, layers in models),
            experts=experts,
            ranks=group.ranks,
            slots=engine.placement.shape[2],
            counting=group.counting,
            row_bytes=(rows := row_bytes(engine.weights)),
            staging_rows=config.staging_rows or default_rows(max(rows)),
            ring_slots=config.ring_steps,
            counts_own_slots=engine.counts_own_slots,
            routes_by_source=engine.routes_by_source,
        )
        self._step = 0
        self._tokens = 0
        self._in_forward = False
        self._last_step_ns = 0
        self._late = (0, 0)
        self.refused = ""
        self._started = False
        self._is_writing = False  # weights, while the first step has not come
        self._segment: RankSegment | None = None
        self._peers: list[RankSegment] = []
        self._stagers: StagerPool | None = None
        self._bell: Doorbell | None = None
        self._rings_next = False
        self._watch: PlannerWatch | None = None
        self._at_exit: Finalize | None = None

    @property
    def epoch(self) -> int:
        """Rounds committed so far."""
        return self._loader.epoch if self._started and not self.refused else 0

    @property
    def placement(self) -> np.ndarray:
        """int32 [layers, ranks, slots], as it is committed."""
        is_balancing = self._started and not self.refused
        return self._loader.placement if is_balancing else self._engine.placement

    @property
    def has_stopped(self) -> bool:
        """Whether balancing, once begun, has stopped on all ranks."""
        return self._started and not self.refused and bool(self._loader.stopped)

    def settle(self) -> None:
        """A pass is about to run, maybe a dummy one: make up for a step that the last one owes."""
        if self._in_forward and self._started and not self.refused:
            # Its vote is still owed, and what that decides must happen before this pass; then
            # balancing stops, on all ranks.
            self._report_mismatch()
            self._tick(FLAG_DUMMY)
            self._in_forward = False

    def forward(self, tokens: int) -> None:
        """A forward pass of `tokens` tokens is about to run."""
        self.settle()
        self._in_forward = True
        self._tokens = tokens

    def step(self, is_dummy: bool, phase: int = 0) -> None:
        """The forward pass is over.

        Args:
            is_dummy: its tokens and its heat do not count.
            phase: `FLAG_PREFILL`, `FLAG_DECODE`, both, or 0 if it is not known.
        """
        # While weights are written, on some ranks as yet, nobody can say whether they fit together.
        if not self._started and not any(self._group.gather(self._is_writing)):
            self._start()
        if not self._started or self.refused:
            self._in_forward = False
            for load in self._engine.loads:
                load.zero_()
            return
        begin = time.perf_counter_ns()
        if self._in_forward == is_dummy:
            self._report_mismatch()
            if not is_dummy:  # a step of no forward pass: the other ranks do not count it
                return
            self._tick(FLAG_DUMMY)
        self._in_forward = False
        self._tick(FLAG_DUMMY if is_dummy else phase)
        assert self._segment is not None
        self._segment.timings.add(time.perf_counter_ns() - begin, begin - self._last_step_ns)
        self._last_step_ns = begin

    def _tick(self, flags: int) -> None:
        self._step += 1
        self._collector.collect(self._step, self._tokens, flags, self._loader.epoch)
        committed = self._loader.tick()
        assert self._segment is not None
        status = self._segment.status
        status.show(Field.STEP, self._step)
        late = self._collector.merged, self._collector.dropped
        if late != self._late:
            self._late = late
            status[Field.HEAT_MERGED], status[Field.HEAT_DROPPED] = late
        rings = self._rings_next or self._step % self._config.bell_steps == 0
        self._rings_next = committed  # not now: a step with a commit is long enough
        if self._bell is not None and rings and not committed:
            self._bell.ring()
            assert self._watch is not None
            self._watch.look()

    def _report_mismatch(self) -> None:
        if not self._loader.mismatch:
            assert self._segment is not None
            self._segment.status.add(Field.MISMATCHES)
            self._loader.mismatch = True

    def _start(self) -> None:
        """At the first step of all ranks at which none writes weights: agree to balance, or not to;
        equal on all ranks."""
        self._started = True
        try:
            generation = agree_on_settings(self._group, self._config, self._shape)
            agree_on_forms(self._group, self._engine.weights)
            prefix = f"flash_eplb/{generation}"  # a group before us has left keys in the store
            self._group.store = dist.PrefixStore(prefix, self._group.store)
            self._reference = np.zeros((self._shape.layers, self._shape.experts), np.int64)
            self._take_values()
            self._at_exit = Finalize(None, self.close, exitpriority=100)
            self._group.together(self._check_limits)
            self._group.together(lambda: self._open_names(generation))
            self._group.together(lambda: self._find_peers(generation))
            self._group.together(self._build)
        except UnsupportedError as error:
            self.refused = str(error)
            self.close()
            for name in ("_loader", "_collector", "_update"):  # what was built holds staging rows
                vars(self).pop(name, None)
            log.error("flash_eplb does not balance: %s; vLLM serves on, unbalanced", error)

    def _check_limits(self) -> None:
        """Before anything is made, so that the text speaks of the whole group."""
        shape, session = self._shape, self._config.session
        check_files(4 * shape.ranks + 16, "a worker")
        if self._group.rank == 0:
            with session_lock(session):
                remove_dead(session)
            check_memory(
                shape.ranks,
                segment_bytes(shape) - shape.ring_slots * step_bytes(shape),
                step_bytes(shape),
                shape.ring_slots,
            )

    def _open_names(self, generation: int) -> None:
        """This rank's segment and, on rank 0, the doorbell."""
        session, rank = self._config.session, self._group.rank
        self._segment = RankSegment.create(session, self._shape, rank, generation)
        if rank == 0:
            self._bell = Doorbell.create(bell_name(session))

    def _find_peers(self, generation: int) -> None:
        """Attach to all ranks' segments: all vote in EP rank 0's, and each tells its worker's death
        by the lock, also when its name is gone."""
        assert self._segment is not None
        for rank in range(self._group.ranks):
            mine = rank == self._group.rank
            self._peers.append(self._segment if mine else self._find_peer(rank, generation))

    def _find_peer(self, rank: int, generation: int) -> RankSegment:
        name = rank_name(self._config.session, rank)
        try:
            found = RankSegment.open(name, writable=rank == 0, published=False)
        except SegmentAbsentError:
            found = None
        if found is not None and found.generation == generation:
            return found
        raise SegmentError(
            f"it does not share /dev/shm with EP rank {rank} ({name} is not visible), so no "
            "planner can serve both; run the workers of a group in one container or share /dev/shm"
        )

    def _why_silent(self, rank: int) -> str:
        return self._peers[rank].why_silent()

    def _build(self) -> None:
        assert self._segment is not None
        config, group, engine, shape = self._config, self._group, self._engine, self._shape
        reference = self._reference if config.verify else None
        staging = Staging(engine.weights, shape.staging_rows, engine.buffer)
        try:
            kind = transport_for(config.transport, engine, shape.staging_rows, staging.borrowed)
        except ValueError as error:
            raise UnsupportedError(str(error)) from None

        def make_stager() -> Stager:
            # A store of its own: one that hangs in a wait lets nobody else through.
            store = group.store.clone()  # type: ignore[attr-defined]
            transport = make_transport(
                kind, engine, store, group.rank, group.ranks, config.transfer_timeout
            )
            return Stager(
                engine.weights, staging, transport, group.rank, reference, engine.replaced
            )

        self._stagers = StagerPool(make_stager, group.rank, shape.staging_rows)
        self._collector = HeatCollector(
            self._segment.heat, engine.loads, counts_dummies=engine.counts_own_slots
        )
        self._loader = Loader(
            engine,
            self._segment,
            Vote(self._peers[0].ballots, group.rank, self._why_silent, group.patience),
            self._stagers,
            Patrol(shape.layers, shape.slots, config.patrol_steps if config.verify else 0),
            config.vote_steps,
            config.plan_timeout_steps,
        )
        self._update = WeightUpdate(
            group, self._loader, self._redigest, config.vote_steps, config.transfer_timeout
        )
        self._segment.publish()
        if group.rank == 0:
            self._watch = PlannerWatch(config)
            self._announce(staging, kind)

    def _announce(self, staging: Staging, transport: str) -> None:
        shape = self._shape
        borrowed = f" and {staging.borrowed} of the engine's buffer" if staging.borrowed else ""
        own = "the engine's " + communicator_name(self._engine)
        log.info(
            "flash_eplb balances session %r: %d layers, %d experts in %d slots on %d EP ranks; "
            "per rank %.1f MiB shared memory, %d staging rows of %.1f MiB in all%s; transport %s",
            self._config.session,
            shape.layers,
            shape.experts,
            shape.columns,
            shape.ranks,
            segment_bytes(shape) / 2**20,
            shape.staging_rows - staging.borrowed,
            staging.nbytes / 2**20,
            borrowed,
            own if transport == "engine" else transport,
        )

    def _check_supported(self) -> None:
        if reason := self._unsupported():
            raise UnsupportedError(reason)
        for layer in range(self._shape.layers):
            if name := self._engine.replaced(layer):
                raise UnsupportedError(
                    f"layer {layer}: {name} is in other memory than at the start, so what we move "
                    "is no longer what the engine computes with"
                )

    def _redigest(self) -> None:
        """The weights are new: so are the digests that prove them, and what would stay behind."""
        self._group.together(self._check_supported)
        self._take_values()

    def _take_values(self) -> None:
        """What the weights are: alike where ranks share them, and the digests that prove them."""
        agree_on_scales(self._group, self._scales)
        self._reference[:] = take_reference(self._group, self._engine, self._shape.experts)

    def begin_update(self) -> bool:
        """The engine is about to write weights, on all ranks: experts go back to where it writes.

        Returns whether an update was opened: false if there is nothing to do, or one is open.

        Raises:
            RuntimeError: they cannot; the engine must not write.
        """
        if not self._started:
            opened, self._is_writing = not self._is_writing, True
            return opened
        return not self.refused and self._update.begin(self._step)

    @property
    def is_updating(self) -> bool:
        """Whether an update has begun and not ended."""
        if not self._started:
            return self._is_writing
        return not self.refused and self._update.is_open

    def end_update(self, took: float = 0.0) -> None:
        """The engine has written weights, on all ranks: prove them and balance on.

        Args:
            took: seconds that this rank has spent in the call that ends.
        """
        self._is_writing = False
        if self._started and not self.refused:
            self._update.end(self._step, took)

    def give_up_update(self, why: str) -> bool:
        """A call of the engine's that writes weights has failed here, and will not end.

        Args:
            why: for the other ranks, as in "reload_weights has failed".

        Returns:
            whether an update is open.
        """
        if self.is_updating and self._started:
            self._update.give_up(f"{why} on EP rank {self._group.rank}")
        return self.is_updating

    def close(self) -> None:
        """Remove what this rank owns and end what it started."""
        if self._at_exit is not None:
            self._at_exit.cancel()  # it holds us, and we the weights
            self._at_exit = None
        if self._watch is not None:
            self._watch.close()
            self._watch = None
        if self._bell is not None:
            self._bell.close()
            self._bell = None
        if self._stagers is not None:
            self._stagers.close()
            self._stagers = None
        for segment in (*self._peers, *([self._segment] if self._segment else [])):
            segment.close()
        self._segment = None
        self._peers = []
