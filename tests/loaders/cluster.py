"""A small EP group in threads of one process: real gloo groups, real segments, real loaders."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import numpy as np
import torch
import torch.distributed as dist

from flash_eplb.ipc.ballot_box import BallotBox
from flash_eplb.ipc.placement import MOVE
from flash_eplb.ipc.rank_segment import RankSegment
from flash_eplb.ipc.round import Round, encode_round
from flash_eplb.ipc.shape import GroupShape, ModelShape
from flash_eplb.loaders.digest import digests
from flash_eplb.loaders.loader import Loader
from flash_eplb.loaders.patrol import Patrol
from flash_eplb.loaders.stager import Stager
from flash_eplb.loaders.stager_pool import StagerPool
from flash_eplb.loaders.staging import Staging, row_bytes
from flash_eplb.loaders.transport import PeerToPeer, Transport
from flash_eplb.loaders.vote import Vote

GENERATION = 77


def initial_placement(layers: int, experts: int, ranks: int, slots: int) -> np.ndarray:
    physical = np.arange(ranks * slots, dtype=np.int32) % experts
    return np.tile(physical, (layers, 1)).reshape(layers, ranks, slots)


class FakeEngine:
    """Experts whose weights tell which expert they are; commits are recorded."""

    def __init__(self, layers: int, experts: int, ranks: int, slots: int, rank: int):
        self.placement = initial_placement(layers, experts, ranks, slots)
        self.rank = rank
        self.routed = self.placement.copy()
        self.columns = np.ones_like(self.placement)
        self.buffer: list[torch.Tensor] = []
        self.communicators: list = []
        self.counts_own_slots = self.routes_by_source = False
        self.loads = [torch.zeros((layers, ranks * slots), dtype=torch.int32)]
        self.weights: list[list[torch.Tensor]] = []
        for layer in range(layers):
            ids = torch.from_numpy(self.placement[layer, rank].astype(np.float32))
            wide = (ids * 1000 + layer)[:, None] + torch.arange(37) / 64
            self.weights.append([wide.clone(), (wide[:, :5] * 3).to(torch.bfloat16)])

    def replaced(self, layer: int) -> str:
        return ""

    def tables(self, layers: np.ndarray, placement: np.ndarray, columns=None):  # type: ignore[no-untyped-def]
        kept = [(self.routed, placement[layers])]
        kept += [(self.columns, np.ones_like(placement[layers]) if columns is None else columns)]
        live = [torch.from_numpy(table[layer]) for table, _ in kept for layer in layers]
        values = [torch.tensor(cells) for _, made in kept for cells in made]
        return live, values

    def experts_in_slots(self) -> np.ndarray:
        """int [layers, slots]: which expert's weights really lie in each slot."""
        rows = []
        for layer, (wide, narrow) in enumerate(self.weights):
            ids = (wide[:, 0] - layer) / 1000
            assert torch.equal(wide - wide[:, :1], (torch.arange(37) / 64).expand_as(wide))
            assert torch.equal(narrow, (wide[:, :5] * 3).to(torch.bfloat16))
            rows.append(ids.numpy())
        return np.array(rows)


def gloo(engine, store, rank: int, ranks: int, timeout: float) -> Transport:  # type: ignore[no-untyped-def]
    return PeerToPeer("gloo", store, rank, ranks, timeout)


class Rank:
    """One rank of a `Cluster`."""

    def __init__(self, cluster: Cluster, rank: int, store: dist.Store):
        self.engine = FakeEngine(*cluster.sizes, rank)
        self.segment = RankSegment.create(cluster.session, cluster.shape, rank, 5)
        self.segment.publish()
        ranks = cluster.shape.ranks
        box = cluster.box(self.segment)
        staging = Staging(self.engine.weights, cluster.shape.staging_rows)

        def make_stager() -> Stager:
            transport = cluster.transport(
                self.engine, store.clone(), rank, ranks, cluster.transfer_timeout
            )
            return Stager(
                self.engine.weights,
                staging,
                transport,
                rank,
                cluster.reference,
                lambda layer: self.engine.replaced(layer),
            )

        self.stagers = StagerPool(make_stager, rank, cluster.shape.staging_rows)
        self.loader = Loader(
            self.engine,
            self.segment,
            Vote(box, rank, lambda rank: "", 20.0),
            self.stagers,
            Patrol(cluster.shape.layers, cluster.shape.slots, cluster.patrol_steps),
            cluster.vote_steps,
            cluster.timeout_steps,
        )
        self.commits: list[int] = []
        self.step = 0

    def tick(self) -> None:
        self.step += 1
        if self.loader.tick():
            self.commits.append(self.step)

    def tick_on(self, steps: int) -> None:
        """So many steps without regard to the other ranks, but for their votes."""
        for _ in range(steps):
            self.tick()


class Cluster:
    """`ranks` loaders in threads; `tick` runs one step of all of them."""

    def __init__(
        self,
        session: str,
        layers: int = 3,
        experts: int = 6,
        ranks: int = 3,
        slots: int = 3,
        rows: int = 2,
        vote_steps: int = 2,
        timeout_steps: int = 50_000,
        transfer_timeout: float = 20.0,
        patrol_steps: int = 0,
        transport: Callable[..., Transport] = gloo,
    ):
        self.session = session
        self.transport = transport
        self.sizes = (layers, experts, ranks, slots)
        self.vote_steps = vote_steps
        self.timeout_steps = timeout_steps
        self.transfer_timeout = transfer_timeout
        self.patrol_steps = patrol_steps
        engines = [FakeEngine(*self.sizes, rank) for rank in range(ranks)]
        self.shape = GroupShape(
            models=(ModelShape("fake", layers),),
            experts=experts,
            ranks=ranks,
            slots=slots,
            counting=(0,),
            row_bytes=row_bytes(engines[0].weights),
            staging_rows=rows,
            ring_slots=16,
        )
        self.reference = np.zeros((layers, experts), np.int64)
        for rank, engine in enumerate(engines):
            for layer, row in enumerate(digests(engine.weights)):
                self.reference[layer, engine.placement[layer, rank]] = row
        store = dist.HashStore()
        self._meeting = threading.Barrier(ranks)
        self.ranks: list[Rank] = [None] * ranks  # type: ignore[list-item]
        self._each(lambda rank: self.ranks.__setitem__(rank, Rank(self, rank, store)))
        for rank in self.ranks:
            rank.segment.plans.take_over(GENERATION)
        deadline = time.monotonic() + 20
        while any(rank.stagers.busy for rank in self.ranks):  # they open their connections
            assert time.monotonic() < deadline, "no connections"
            time.sleep(0.001)

    def box(self, segment: RankSegment) -> BallotBox:
        """Rank 0's ballot box, once rank 0 has come; all ranks call it."""
        if segment.header.rank == 0:
            self._first = segment
        self._meeting.wait(20)
        return BallotBox(self._first.ballots._box.view(np.uint8), self.shape.ranks)

    def _each(self, action) -> None:  # type: ignore[no-untyped-def]
        errors: list[BaseException] = []

        def guarded(rank: int) -> None:
            try:
                action(rank)
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=guarded, args=(rank,)) for rank in range(self.sizes[2])]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]

    def tick(self, steps: int = 1) -> None:
        for _ in range(steps):
            self._each(lambda rank: self.ranks[rank].tick())

    def tick_until(self, done, most: int = 5000) -> None:  # type: ignore[no-untyped-def]
        for _ in range(most):
            if done():
                return
            self.tick()
            time.sleep(0.0005)
        raise AssertionError(f"not reached in {most} steps")

    def record(self, moves: np.ndarray, **changes: object) -> bytes:
        layers, _, ranks, slots = self.sizes
        fields = {
            "generation": GENERATION,
            "plan": 1,
            "sequence": 1,
            "last": True,
            "epoch": self.ranks[0].loader.epoch,
            "layers": layers,
            "ranks": ranks,
            "slots": slots,
            "moves": moves.astype(MOVE).tobytes(),
            **changes,
        }
        return encode_round(Round(**fields))  # type: ignore[arg-type]

    def send(self, record: bytes, ranks: list[int] | None = None) -> None:
        for rank in range(self.sizes[2]) if ranks is None else ranks:
            self.ranks[rank].segment.plans.put(record)

    def check_consistent(self) -> None:
        """Every slot holds the weights of the expert that every rank's tables and board name."""
        first = self.ranks[0].loader
        for rank in self.ranks:
            assert rank.loader.epoch == first.epoch
            assert np.array_equal(rank.loader.placement, first.placement)
            assert np.array_equal(rank.engine.routed, first.placement)
            board = rank.segment.board.read()
            assert board is not None
            assert board[0] == first.epoch
            assert np.array_equal(board[1], first.placement)
            held = rank.engine.experts_in_slots()
            assert np.array_equal(held, first.placement[:, rank.engine.rank])

    def close(self) -> None:
        for rank in self.ranks:
            rank.loader.close()
            rank.segment.close()


def swap(layer: int, first: tuple[int, int, int], second: tuple[int, int, int]) -> np.ndarray:
    """Two experts (expert, rank, slot) change places."""
    moves = [
        (layer, first[0], first[1], first[2], second[1], second[2]),
        (layer, second[0], second[1], second[2], first[1], first[2]),
    ]
    return np.array(moves, MOVE)


# 6 experts, 3 ranks x 3 slots: rank 0 holds 0 1 2, rank 1 holds 3 4 5, rank 2 holds 0 1 2
SWAP = swap(1, (0, 0, 0), (3, 1, 0))
