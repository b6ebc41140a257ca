"""One of two processes on one GPU that pull experts from each other by CUDA IPC.

Usage: python -m benchmarks.device_ipc FOLDER RANK DEVICE ROW_BYTES ROWS ROUNDS

Prints {"transport": ..., "right": ..., "gb_s": ..., "ms": ...}: what moved the experts, whether
every byte came, and of the pulls the speed and the median time.
"""

from __future__ import annotations

import json
import sys
import time

import numpy as np
import torch
import torch.distributed as dist

from flash_eplb.ipc.placement import MOVE
from flash_eplb.loaders.cuda_ipc import CudaIpc
from flash_eplb.loaders.staging import Staging, slot_views
from flash_eplb.loaders.transport import Parcel, PeerToPeer

RANKS = 2


def main() -> None:
    """Both ranks pull all slots of the other, at the same time."""
    folder, rank, kind = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    row, rows, rounds = map(int, sys.argv[4:7])
    device = torch.device(kind, 0) if kind != "cpu" else torch.device("cpu")
    peer = 1 - rank
    weights = [[_pattern(rank, rows, row, device)]]
    staging = Staging(weights, rows)
    store = dist.FileStore(f"{folder}/store", RANKS)
    fallback = PeerToPeer("gloo", store, rank, RANKS, 60.0)
    transport = CudaIpc(weights, store, rank, RANKS, 60.0, fallback)
    transport.connect(0)
    moves = np.array(
        [(0, n, source, n, 1 - source, n) for source in range(RANKS) for n in range(rows)], MOVE
    )
    leaving = [Parcel(rank * rows + n, 0, n, peer, slot_views(weights[0], n)) for n in range(rows)]
    arriving = [Parcel(peer * rows + n, 0, n, peer, staging.views(n, 0)) for n in range(rows)]
    times = []
    for _ in range(rounds):
        begun = time.perf_counter()
        transport.exchange(moves, leaving, arriving)
        times.append(time.perf_counter() - begun)
    wanted = _pattern(peer, rows, row, device)
    right = all(torch.equal(wanted[n], parcel.views[0]) for n, parcel in enumerate(arriving))
    median = float(np.median(times))
    print(
        json.dumps(
            {
                "transport": transport.name,
                "right": right,
                "gb_s": rows * row / median / 1e9,
                "ms": median * 1e3,
            }
        ),
        flush=True,
    )
    # The other may still read from here.
    store.add("done", 1)
    while store.add("done", 0) < RANKS:
        time.sleep(0.01)


def _pattern(rank: int, rows: int, row: int, device: torch.device) -> torch.Tensor:
    source = torch.Generator().manual_seed(rank + 1)
    return torch.randint(256, (rows, row), generator=source, dtype=torch.uint8).to(device)


if __name__ == "__main__":
    main()
