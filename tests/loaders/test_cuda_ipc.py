"""Experts pulled from another rank's memory; shared files or the same process stand for CUDA's."""

import random
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent))
from cluster import Cluster
from test_loader import random_placement
from test_transport import in_ranks

from flash_eplb.ipc.placement import MOVE
from flash_eplb.loaders import cuda_ipc
from flash_eplb.loaders.cuda_ipc import CudaIpc
from flash_eplb.loaders.staging import slot_views
from flash_eplb.loaders.transport import Parcel, PeerToPeer
from flash_eplb.planners.plan import make_plan

RANKS = 3


class OneProcess:
    """Ranks in threads: a handle is the address of a storage, opening it finds it again."""

    def __init__(self):
        self.storages = {}
        self.shared = self.opened = 0
        self.broken = ""

    def share(self, storage):
        self.shared += 1
        if self.broken == "share":
            raise RuntimeError("expandable segments have no handle")
        self.storages[storage.data_ptr()] = storage
        return str(storage.data_ptr()).encode()

    def open(self, handle, device):
        self.opened += 1
        if self.broken == "open":
            raise RuntimeError("peer access is not supported between these two devices")
        return torch.empty(0, dtype=torch.uint8).set_(self.storages[int(handle)])


class Group:
    """Ranks whose slot s in layer l holds bytes of the value 100 * rank + 10 * l + s."""

    def __init__(self, timeout=10.0):
        self.memory = OneProcess()
        self.memories = [self.memory] * RANKS
        self.store = dist.HashStore()
        self.timeout = timeout
        self.weights = [
            [
                [torch.full((2, 5), 0, dtype=torch.uint8), torch.zeros((2, 3), dtype=torch.int16)]
                for _ in range(2)
            ]
            for _ in range(RANKS)
        ]
        for rank, layers in enumerate(self.weights):
            for layer, tensors in enumerate(layers):
                for tensor in tensors:
                    for slot in range(2):
                        tensor[slot] = 100 * rank + 10 * layer + slot
        self.transports = [self.transport(rank) for rank in range(RANKS)]

    def transport(self, rank):
        fallback = PeerToPeer("gloo", self.store.clone(), rank, RANKS, self.timeout)
        return CudaIpc(
            self.weights[rank],
            self.store.clone(),
            rank,
            RANKS,
            self.timeout,
            fallback,
            self.memories[rank],
        )

    def connect(self, epoch=0):
        return in_ranks(lambda rank: self.transports[rank].connect(epoch))

    def parcels(self, moves, rank):
        leaving, arriving = [], []
        for number, move in enumerate(moves):
            layer = int(move["layer"])
            if move["source_rank"] == rank:
                views = slot_views(self.weights[rank][layer], int(move["source_slot"]))
                leaving.append(Parcel(number, layer, 0, int(move["rank"]), views))
            if move["rank"] == rank:
                views = [torch.zeros(5, dtype=torch.uint8), torch.zeros(6, dtype=torch.uint8)]
                arriving.append(Parcel(number, layer, 0, int(move["source_rank"]), views))
        return leaving, arriving

    def exchange(self, rank, moves):
        """The experts that have arrived, by the value that they are made of."""
        leaving, arriving = self.parcels(moves, rank)
        self.transports[rank].exchange(moves, leaving, arriving)
        values = []
        for parcel in arriving:
            narrow, wide = parcel.views[0], parcel.views[1].view(torch.int16)
            assert len({*narrow.tolist(), *wide.tolist()}) == 1
            values.append(int(narrow[0]))
        return values


def moves_of(*rows):
    return np.array([(layer, 0, *source, *target) for layer, source, target in rows], MOVE)


# (layer, (source rank, slot), (rank, slot))
ROUND = moves_of((1, (0, 1), (1, 0)), (0, (2, 0), (1, 1)), (1, (1, 0), (0, 1)))
ARRIVED = [[110], [11, 200], []]


def test_who_takes_the_place_of_one_that_hangs_opens_others_with_the_next_round():
    """It has not counted the exchanges, so it would take an old word of a source for a new one."""
    group = Group(timeout=1.0)
    assert group.connect() == [None] * RANKS
    group.transports[1] = group.transport(1)
    with pytest.raises(RuntimeError, match="the next round opens others"):
        group.transports[1].connect(0)
    assert group.connect(1) == [None] * RANKS


def test_experts_are_pulled_from_the_slots_of_their_sources():
    group = Group()
    assert group.connect() == [None] * RANKS
    assert {transport.name for transport in group.transports} == {"ipc"}
    for _ in range(3):
        assert in_ranks(lambda rank: group.exchange(rank, ROUND)) == ARRIVED


def test_memory_is_shared_and_opened_once_whatever_the_epochs():
    group = Group()
    for epoch in (0, 1, 5):
        assert group.connect(epoch) == [None] * RANKS
        assert in_ranks(lambda rank: group.exchange(rank, ROUND)) == ARRIVED
    tensors = RANKS * 2 * 2
    assert (group.memory.shared, group.memory.opened) == (tensors, (RANKS - 1) * tensors)


def test_tensors_of_one_storage_are_shared_as_one():
    group = Group()
    whole = torch.arange(60, dtype=torch.uint8)
    group.weights[2] = [[whole[3:13].view(2, 5), whole[20:32].view(2, 6)]] * 2
    group.transports[2] = group.transport(2)
    group.connect()
    views = [torch.zeros(5, dtype=torch.uint8), torch.zeros(6, dtype=torch.uint8)]
    moves = moves_of((0, (2, 1), (0, 0)))

    def one(rank):
        mine = [Parcel(0, 0, 0, 2, views)] if rank == 0 else []
        theirs = [Parcel(0, 0, 0, 0, [])] if rank == 2 else []
        group.transports[rank].exchange(moves, theirs, mine)

    assert in_ranks(one) == [None] * RANKS
    assert views[0].tolist() == [*range(8, 13)]
    assert views[1].tolist() == [*range(26, 32)]
    assert len(group.memory.storages) == 2 * 4 + 1


def test_nothing_is_pulled_before_the_source_has_come_past_its_last_commit(monkeypatch):
    """The source's device is late: its slot changes while it is waited for."""
    group = Group()
    group.connect()
    late = threading.Event()

    def finish_stream(device):
        if threading.current_thread().name == "late" and not late.is_set():
            time.sleep(0.2)
            for tensor in group.weights[2][0]:
                tensor[0] = 77
            late.set()

    monkeypatch.setattr(cuda_ipc, "finish_stream", finish_stream)

    def one(rank):
        if rank == 2:
            threading.current_thread().name = "late"
        return group.exchange(rank, ROUND)

    assert in_ranks(one) == [[110], [11, 77], []]


def test_a_rank_that_is_not_ready_is_not_waited_for_longer_than_the_timeout():
    group = Group(timeout=0.3)
    group.connect()
    found = in_ranks(lambda rank: group.exchange(rank, ROUND) if rank != 2 else None)
    assert found[0] == [110]
    text = "EP rank 2 did not say that its experts may be read within 0.3 seconds"
    assert isinstance(found[1], RuntimeError)
    assert str(found[1]) == text


def test_what_waits_for_a_rank_that_disconnects_fails_at_once_and_a_new_epoch_serves():
    group = Group(timeout=30.0)
    group.connect()
    begun = time.monotonic()

    def one(rank):
        if rank == 2:
            time.sleep(0.1)
            return group.transports[2].disconnect()
        return group.exchange(rank, ROUND)

    found = in_ranks(one)
    assert str(found[1]).startswith("EP rank 2 has closed its connections; the next round opens")
    assert time.monotonic() - begun < 10
    with pytest.raises(RuntimeError, match="EP rank 2 has closed its connections"):
        group.transports[2].connect(0)
    assert group.connect(1) == [None] * RANKS
    assert in_ranks(lambda rank: group.exchange(rank, ROUND)) == ARRIVED


def test_a_rank_that_does_not_come_is_named():
    group = Group(timeout=0.3)
    found = in_ranks(lambda rank: group.transports[rank].connect(0) if rank != 1 else None)
    assert str(found[0]) == str(found[2]) == "EP rank 1 did not come within 0.3 seconds"


@pytest.mark.parametrize("broken", ["share", "open"])
def test_where_one_rank_cannot_all_fall_back_and_say_so_once(broken, caplog):
    group = Group()
    group.memories[2] = OneProcess()
    group.memories[2].storages = group.memory.storages
    group.memories[2].broken = broken
    group.transports = [group.transport(rank) for rank in range(RANKS)]
    assert group.connect() == [None] * RANKS
    assert {transport.name for transport in group.transports} == {"gloo"}
    assert in_ranks(lambda rank: group.exchange(rank, ROUND)) == ARRIVED
    (line,) = [r.getMessage() for r in caplog.records if "CUDA IPC" in r.getMessage()]
    assert line.startswith("no CUDA IPC in this group (EP rank ")
    assert line.endswith("; experts travel by gloo")
    reason = {"share": "expandable segments have no handle", "open": "peer access is not supported"}
    assert reason[broken] in line
    # the next epochs too, and a stager that has not seen why
    group.transports[0] = group.transport(0)
    assert group.connect(1) == [None] * RANKS
    assert group.transports[0].name == "gloo"
    assert in_ranks(lambda rank: group.exchange(rank, ROUND)) == ARRIVED
    group.transports[1].disconnect()


def test_a_round_of_nothing_waits_for_nobody():
    group = Group()
    group.connect()
    group.transports[0].exchange(ROUND[:0], [], [])
    group.transports[0].disconnect()
    group.transports[0].disconnect()


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_in_processes_of_their_own_hold_every_byte_after_every_round(ranks, tmp_path, amount):
    script = Path(__file__).with_name("ipc_group.py")
    rounds = amount(60, 3000)
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path), str(ranks), str(rounds), "5"],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout) >= 2 * rounds


def test_the_loaders_commit_plans_whose_experts_were_pulled(session):
    memory = OneProcess()

    def pulling(engine, store, rank, ranks, timeout):
        fallback = PeerToPeer("gloo", store, rank, ranks, timeout)
        return CudaIpc(engine.weights, store, rank, ranks, timeout, fallback, memory)

    dice = random.Random(3)
    group = Cluster(session, transport=pulling)
    try:
        sequence = 0
        for plan in range(1, 6):
            before = group.ranks[0].loader.placement
            wanted = random_placement(dice, *group.sizes)
            parts = make_plan(before, wanted).rounds(2)
            for number, part in enumerate(parts):
                sequence += 1
                last = number == len(parts) - 1
                group.send(group.record(part.moves, plan=plan, sequence=sequence, last=last))
                epoch = group.ranks[0].loader.epoch
                group.tick_until(lambda epoch=epoch: group.ranks[0].loader.epoch == epoch + 1)
            group.check_consistent()
        assert memory.opened
    finally:
        group.close()
