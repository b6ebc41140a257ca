"""What is done otherwise on an Ascend NPU, with stand-ins for torch_npu: no NPU was at hand."""

import functools
import sys
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist

from flash_eplb import device as device_module
from flash_eplb.ipc.placement import MOVE
from flash_eplb.loaders import stager as stager_module
from flash_eplb.loaders import transport as transport_module
from flash_eplb.loaders.errand import Errand
from flash_eplb.loaders.patrol import Beat
from flash_eplb.loaders.stager import Stager
from flash_eplb.loaders.transport import Parcel, PeerToPeer

ND, NZ = 2, 29


class Group:
    """As torch_npu's ProcessGroupHCCL: named operations, their tensors, the ranks at the end."""

    def __init__(self, *_):
        self.batches = []

    def barrier(self):
        return SimpleNamespace(wait=lambda: None)

    def batch_isend_irecv(self, kinds, tensors, ranks):
        self.batches.append(list(zip(kinds, map(id, tensors), ranks, strict=True)))
        return SimpleNamespace(wait=lambda: None)


@pytest.fixture
def connected(monkeypatch):
    """`connected(store, ranks, timeout)`: their transports by HCCL, whose connections are open."""
    monkeypatch.setitem(transport_module._GROUPS, "hccl", Group)

    def make(store, ranks, timeout):
        made = [PeerToPeer("hccl", store, rank, ranks, timeout) for rank in range(ranks)]
        in_threads([functools.partial(one.connect, 0) for one in made])
        return made

    return make


def in_threads(actions):
    threads = [threading.Thread(target=action) for action in actions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_hccl_moves_each_layer_in_one_batch_of_both_directions(connected):
    moves = np.zeros(4, MOVE)
    moves["layer"] = [7, 2, 7, 2]
    views = [[torch.zeros(3), torch.zeros(1)] for _ in range(4)]
    first, second, third = (
        Parcel(number, int(moves["layer"][number]), 5, peer, views[number])
        for number, peer in ((0, 1), (1, 3), (2, 2))
    )
    moves["source_rank"], moves["rank"] = [0, 0, 2, 3], [1, 3, 0, 1]
    store = dist.HashStore()
    transport = connected(store, 4, 0.2)[0]
    group = transport._group
    with pytest.raises(RuntimeError, match=r"EP rank 1 did not come within 0\.2 seconds"):
        transport.exchange(moves, [first, second], [third])
    assert not group.batches
    for rank in (1, 2, 3):
        store.set(f"transport/0/exchange/2/{rank}", "")
    transport.exchange(moves, [first, second], [third])  # the last move is between others

    def named(kind, parcel):
        return [(kind, id(view), parcel.peer) for view in parcel.views]

    assert group.batches == [
        named("isend", second),
        named("isend", first) + named("irecv", third),
    ]


def test_who_waits_for_a_rank_that_closes_its_connections_does_so_no_longer(connected):
    moves = np.zeros(2, MOVE)
    moves["source_rank"], moves["rank"] = [0, 1], [1, 0]
    first, second = connected(dist.HashStore(), 2, 30.0)
    threading.Timer(0.1, second.disconnect).start()
    begun = time.monotonic()
    with pytest.raises(RuntimeError, match="EP rank 1 has closed its connections"):
        first.exchange(moves, [Parcel(0, 0, 5, 1, [torch.zeros(1)])], [])
    assert time.monotonic() - begun < 15


def test_what_ranks_have_met_by_does_not_pile_up_in_the_store(connected):
    moves = np.zeros(2, MOVE)
    moves["source_rank"], moves["rank"] = [0, 1], [1, 0]
    store = dist.HashStore()
    transports = connected(store, 2, 5.0)
    keys = store.num_keys()
    parcels = [Parcel(number, 0, 5, 1, [torch.zeros(1)]) for number in range(2)]
    for _ in range(3):
        in_threads(
            functools.partial(one.exchange, moves, parcels[:1], parcels[1:]) for one in transports
        )
    assert [len(transport._group.batches) for transport in transports] == [3, 3]
    assert store.num_keys() == keys + 2


@pytest.fixture
def npu(monkeypatch):
    """torch_npu, whose tensors are those of the host with a number for their layout."""
    layouts = {}

    def empty_with_format(size, dtype, layout, device, acl_format):
        made = torch.empty(size, dtype=dtype, layout=layout, device=device)
        layouts[id(made)] = acl_format
        return made

    def npu_format_cast(tensor, acl_format):
        assert acl_format == ND
        return tensor.flip(0)  # what is plain is in another order

    module = SimpleNamespace(
        empty_with_format=empty_with_format,
        get_npu_format=lambda tensor: layouts.get(id(tensor), ND),
        npu_format_cast=npu_format_cast,
        layouts=layouts,
    )
    monkeypatch.setitem(sys.modules, "torch_npu", module)
    monkeypatch.setattr(torch, "npu", SimpleNamespace(), raising=False)
    return module


def test_memory_for_an_expert_has_the_layout_of_the_expert(npu):
    device = device_module.Npu()
    expert = torch.arange(6)
    npu.layouts[id(expert)] = NZ
    like = device.empty_like(expert)
    assert (like.shape, like.dtype, npu.layouts[id(like)]) == (expert.shape, expert.dtype, NZ)
    assert device.plain(expert).tolist() == [5, 4, 3, 2, 1, 0]
    flat = torch.arange(3)
    assert device.plain(flat) is flat


def test_a_tensor_on_an_npu_gets_the_npu_s_shim(npu):
    on_npu = SimpleNamespace(device=SimpleNamespace(type="npu", index=3))
    assert isinstance(device_module.device_of(on_npu), device_module.Npu)


def test_connections_of_a_look_that_hangs_are_closed_in_a_thread_of_the_rank_s_device(monkeypatch):
    """A thread begins with device 0, where closing would make a context, or fail."""
    chosen, closed, hangs = set(), [], threading.Event()

    class Device(device_module.Host):
        def side_stream(self):
            chosen.add(threading.get_ident())
            return super().side_stream()

    class Transport:
        def disconnect(self):
            closed.append(threading.get_ident() in chosen)
            hangs.set()

    monkeypatch.setattr(stager_module, "device_of", lambda tensor: Device())
    monkeypatch.setattr(Stager, "_look", lambda self, beat: hangs.wait(20))
    stager = Stager([[torch.zeros(1, 1)]], None, Transport(), 0, None)
    stager.begin(Errand(0, np.zeros(0, MOVE), 0, beat=Beat(0, 0, 0)))
    stager.leave()
    assert hangs.wait(10)
    stager.close()
    assert closed == [True]
