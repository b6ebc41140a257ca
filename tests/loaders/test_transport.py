"""Transports between ranks in threads: torch's own, and an engine's communicators."""

import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist

from flash_eplb.ipc.placement import MOVE
from flash_eplb.loaders import transport
from flash_eplb.loaders.moe_engine import MoeEngine, MoeShape
from flash_eplb.loaders.transport import EngineCommunicator, Parcel, PeerToPeer
from flash_eplb.loaders.transports import (
    choose_transport,
    communicator_name,
    make_transport,
    transport_for,
)

RANKS = 3


def in_ranks(action, ranks=RANKS):
    """What `action(rank)` gives on each rank, or its error."""
    found = [None] * ranks

    def one(rank):
        try:
            found[rank] = action(rank)
        except Exception as error:
            found[rank] = error

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def connected(store, epoch=0, timeout=10.0):
    transports = [PeerToPeer("gloo", store.clone(), rank, RANKS, timeout) for rank in range(RANKS)]
    in_ranks(lambda rank: transports[rank].connect(epoch))
    return transports


def moves_of(*rows):
    return np.array(list(rows), MOVE)


def parcels(moves, rank, layout=(5, 0, 33)):
    """(leaving, arriving) of a rank; what leaves tells the number of its move."""
    leaving, arriving = [], []
    for number, move in enumerate(moves):
        views = [torch.full((size,), number + 1, dtype=torch.uint8) for size in layout]
        empty = [torch.zeros(size, dtype=torch.uint8) for size in layout]
        facts = (number, int(move["layer"]), int(move["expert"]))
        if move["source_rank"] == rank:
            leaving.append(Parcel(*facts, int(move["rank"]), views))
        if move["rank"] == rank:
            arriving.append(Parcel(*facts, int(move["source_rank"]), empty))
    return leaving, arriving


def delivered(moves, exchange):
    """Whether every parcel has arrived where it belongs; `exchange(rank, moves, out, in)`."""

    def one(rank):
        leaving, arriving = parcels(moves, rank)
        exchange(rank, moves, leaving, arriving)
        return all((view == p.number + 1).all() for p in arriving for view in p.views)

    return in_ranks(one)


# layer, expert, source rank, source slot, rank, slot
ROUND = moves_of(
    (0, 5, 1, 0, 0, 2),
    (0, 6, 1, 1, 0, 1),
    (2, 5, 0, 0, 2, 0),
    (2, 7, 2, 1, 0, 0),
    (1, 9, 2, 2, 1, 1),
)


def test_gloo_brings_each_expert_to_its_rank():
    transports = connected(dist.HashStore())
    for _ in range(3):
        found = delivered(ROUND, lambda rank, *args: transports[rank].exchange(*args))
        assert found == [True] * RANKS


def test_a_rank_that_takes_no_part_does_not_wait():
    transports = connected(dist.HashStore())
    transports[1].exchange(ROUND[2:4], [], [])
    done = delivered(
        ROUND[2:4], lambda rank, *args: transports[rank].exchange(*args) if rank != 1 else None
    )
    assert done == [True] * RANKS


def test_what_waits_for_a_rank_that_disconnects_fails_and_a_new_epoch_serves():
    store = dist.HashStore()
    transports = connected(store)

    def one(rank):
        if rank == 0:
            transports[0].disconnect()
            return None
        leaving, arriving = parcels(ROUND, rank)
        return transports[rank].exchange(ROUND, leaving, arriving)

    found = in_ranks(one)
    assert isinstance(found[1], RuntimeError)
    assert isinstance(found[2], RuntimeError)
    in_ranks(lambda rank: transports[rank].connect(1))
    again = delivered(ROUND, lambda rank, *args: transports[rank].exchange(*args))
    assert again == [True] * RANKS


def test_a_rank_that_does_not_come_is_not_waited_for_longer_than_the_timeout():
    transport = PeerToPeer("gloo", dist.HashStore(), 0, 2, timeout=0.3)
    with pytest.raises(RuntimeError):
        transport.connect(0)


def test_who_takes_the_place_of_one_that_hangs_does_not_wait_for_connections_it_cannot_get():
    """The others hold theirs to the one before; gloo would take five times the timeout."""
    store = dist.HashStore()
    before = connected(store, timeout=1.0)
    follower = PeerToPeer("gloo", store.clone(), 1, RANKS, 1.0)
    begun = time.monotonic()
    with pytest.raises(RuntimeError, match="the next round opens others"):
        follower.connect(0)
    assert time.monotonic() - begun < 0.9
    found = in_ranks(lambda rank: [before[0], follower, before[2]][rank].connect(1))
    assert found == [None] * RANKS


def test_nobody_waits_for_connections_to_a_rank_that_has_failed_before_it_came(monkeypatch):
    store, come = dist.HashStore(), transport.come_once

    def fail(store, rank):
        if rank == 1:
            raise MemoryError("no room")
        come(store, rank)

    monkeypatch.setattr(transport, "come_once", fail)
    transports = [PeerToPeer("gloo", store.clone(), rank, RANKS, 20.0) for rank in range(RANKS)]

    def one(rank):
        try:
            transports[rank].connect(0)
        finally:
            transports[rank].disconnect()

    begun = time.monotonic()
    first, failed, last = in_ranks(one)
    assert time.monotonic() - begun < 10
    assert isinstance(failed, MemoryError)
    assert "has closed its connections" in str(first)
    assert "has closed its connections" in str(last)


class Communicator:
    """Like vLLM's nixl: a layer's context first, everything of that layer, then execute."""

    def __init__(self, rank, table, meeting):
        self.rank = rank
        self.table = table
        self.meeting = meeting
        self.layer = None
        self.contexts = []
        self.received = []
        self.executed_first = False

    def set_transfer_context(self, old_indices, layer_idx):
        assert self.layer is None, "the last layer was not executed"
        self.layer = layer_idx
        self.contexts.append((layer_idx, old_indices.reshape(RANKS, -1).tolist()))
        self.received = []

    def add_send(self, tensors, dst_rank, expert_id):
        self.table[self.layer, expert_id, self.rank, dst_rank] = tensors

    def add_recv(self, tensors, src_rank, expert_id):
        self.received.append((tensors, (self.layer, expert_id, src_rank, self.rank)))

    def execute(self):
        self.executed_first |= not self.contexts
        self.meeting.wait(10)  # every rank executes every layer
        for tensors, key in self.received:
            for target, source in zip(tensors, self.table[key], strict=True):
                target.copy_(source)
        self.layer = None
        self.received = []


def with_communicators(store):
    table, meeting = {}, threading.Barrier(RANKS)
    made = [Communicator(rank, table, meeting) for rank in range(RANKS)]
    layers = [[(one, number + 10) for number in range(3)] for one in made]
    transports = [
        EngineCommunicator(
            "Communicator",
            layers[rank],
            RANKS,
            3,
            PeerToPeer("gloo", store.clone(), rank, RANKS, 10),
        )
        for rank in range(RANKS)
    ]
    return made, transports


def test_the_engines_communicator_moves_one_layer_after_the_other():
    made, transports = with_communicators(dist.HashStore())
    in_ranks(lambda rank: transports[rank].connect(0))
    found = delivered(ROUND, lambda rank, *args: transports[rank].exchange(*args))
    assert found == [True] * RANKS
    assert {one.name for one in transports} == {"Communicator"}
    for one in made:
        assert [layer for layer, _ in one.contexts] == [10, 11, 12]
    assert made[0].contexts[0][1] == [[-1, -1, -1], [5, 6, -1], [-1, -1, -1]]


def test_before_an_expert_moves_all_devices_have_come_past_the_last_commit(monkeypatch):
    finished = []
    monkeypatch.setattr(transport, "finish_stream", lambda device: finished.append(str(device)))
    made, transports = with_communicators(dist.HashStore())
    in_ranks(lambda rank: transports[rank].connect(0))

    def one(rank):
        leaving, arriving = parcels(ROUND, rank)
        transports[rank].exchange(ROUND, leaving, arriving)
        return len(finished)

    assert in_ranks(one) == [RANKS] * RANKS
    assert all(one.executed_first for one in made)
    transports[0].exchange(ROUND[:0], [], [])  # of nothing, it waits for nobody


def test_after_a_round_that_failed_the_fallback_moves_experts(caplog):
    made, transports = with_communicators(dist.HashStore())
    in_ranks(lambda rank: transports[rank].connect(0))
    transports[1].disconnect()  # it has failed here; the others hear of it by the vote
    in_ranks(lambda rank: transports[rank].connect(1))
    assert {one.name for one in transports} == {"gloo"}
    assert caplog.text.count("Communicator cannot be opened anew; experts travel by gloo") == RANKS
    found = delivered(ROUND, lambda rank, *args: transports[rank].exchange(*args))
    assert found == [True] * RANKS
    assert all(not one.contexts for one in made)


@pytest.mark.parametrize(
    ("wanted", "device", "communicator", "reached", "chosen"),
    [
        ("auto", "cpu", "", False, "gloo"),
        ("auto", "cpu", "TorchDistNcclEplbCommunicator", True, "gloo"),
        ("auto", "npu", "", False, "hccl"),
        ("auto", "cuda", "NixlEplbCommunicator", True, "engine"),
        ("auto", "cuda", "NixlEplbCommunicator", False, "ipc"),
        ("auto", "cuda", "TorchDistNcclEplbCommunicator", True, "ipc"),
        ("auto", "cuda", "", False, "ipc"),
        ("ipc", "cuda", "NixlEplbCommunicator", True, "ipc"),
        ("gloo", "cuda", "NixlEplbCommunicator", True, "gloo"),
        ("nccl", "cuda", "", False, "nccl"),
        ("engine", "cpu", "TorchDistNcclEplbCommunicator", False, "engine"),
    ],
)
def test_the_choice(wanted, device, communicator, reached, chosen):
    assert choose_transport(wanted, device, communicator, reached) == chosen


def test_a_transport_that_cannot_serve_here_is_refused():
    with pytest.raises(ValueError, match=r"EPLB_TRANSPORT=nccl: .* cuda .* lie on cpu; use auto"):
        choose_transport("nccl", "cpu", "", False)
    with pytest.raises(ValueError, match=r"EPLB_TRANSPORT=ipc: .* cuda .* lie on cpu; use auto"):
        choose_transport("ipc", "cpu", "", False)
    with pytest.raises(ValueError, match=r"EPLB_TRANSPORT=hccl: .* npu .* lie on cuda"):
        choose_transport("hccl", "cuda", "", False)
    with pytest.raises(ValueError, match="EPLB_TRANSPORT=engine: this engine has no communicator"):
        choose_transport("engine", "cpu", "", False)
    staged = "TorchDistGlooStagedEplbCommunicator"
    with pytest.raises(ValueError, match=f"{staged} .* needs an accelerator; use auto, or .*nccl"):
        choose_transport("engine", "cpu", staged, False)
    assert choose_transport("engine", "cuda", staged, False) == "engine"
    with pytest.raises(ValueError, match=r"NixlEplbCommunicator writes only .* use auto, or"):
        choose_transport("engine", "cuda", "NixlEplbCommunicator", False)


def test_nixl_knows_the_buffer_of_its_own_model_only():
    """A drafter and the main model have a buffer each, and our rows lie in one of them."""

    class NixlEplbCommunicator:
        """By this name it is known."""

    main, drafter = NixlEplbCommunicator(), NixlEplbCommunicator()
    on_cuda = SimpleNamespace(device=torch.device("cuda"))
    engine = SimpleNamespace(weights=[[[on_cuda]]], communicators=[(main, 0), (main, 1)])
    assert transport_for("auto", engine, 8, 8) == "engine"
    assert transport_for("auto", engine, 8, 7) == "ipc"
    engine.communicators = [(drafter, 0), (main, 0)]
    assert transport_for("auto", engine, 8, 8) == "ipc"
    engine.communicators = []
    assert transport_for("auto", engine, 8, 8) == "ipc"


def test_transports_are_made_by_name():
    engine = MoeEngine(MoeShape(layers=1, experts=4, ranks=2, slots=3), 0)
    store = dist.HashStore()
    assert communicator_name(engine) == ""
    assert make_transport("gloo", engine, store, 0, 2, 1.0).name == "gloo"
    assert make_transport("ipc", engine, store, 0, 2, 1.0).name == "ipc"
    engine.communicators = [(Communicator(0, {}, None), 0)]
    assert communicator_name(engine) == "Communicator"
    assert make_transport("engine", engine, store, 0, 2, 1.0).name == "Communicator"
