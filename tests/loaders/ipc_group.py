"""Ranks in processes of their own that pull experts from one another's memory.

Usage: ipc_group.py FOLDER RANKS ROUNDS SEED

The memory is files in FOLDER that all of them map, in place of a device's. Each round is a random
exchange within one of three layers; rows go into live slots when all ranks have them, as a commit
does. Every rank compares every byte of its slots with what the placement says, after every round.
Prints the experts that moved.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from flash_eplb.ipc.placement import MOVE
from flash_eplb.loaders.copies import Copies
from flash_eplb.loaders.cuda_ipc import CudaIpc
from flash_eplb.loaders.staging import Staging, slot_views
from flash_eplb.loaders.transport import Parcel, PeerToPeer

LAYERS, SLOTS = 3, 4
WIDTHS = ((37, 5), (16,), (64, 1, 9))  # bytes of an expert's tensors, per layer


class Files:
    """Memory of one process that others map: a file per tensor."""

    def __init__(self, folder: Path, rank: int):
        self._folder = folder
        self._rank = rank
        self._paths: dict[int, Path] = {}

    def tensor(self, rows: int, width: int) -> torch.Tensor:
        path = self._folder / f"memory-{self._rank}-{len(self._paths)}"
        tensor = _mapped(path, rows * width)
        self._paths[tensor.untyped_storage().data_ptr()] = path
        return tensor.view(rows, width)

    def share(self, storage: torch.UntypedStorage) -> bytes:
        return f"{storage.nbytes()} {self._paths[storage.data_ptr()]}".encode()

    def open(self, handle: bytes, device: torch.device) -> torch.Tensor:
        size, path = handle.decode().split(" ", 1)
        return _mapped(Path(path), int(size))


def _mapped(path: Path, size: int) -> torch.Tensor:
    return torch.from_file(str(path), shared=True, size=size, dtype=torch.uint8)


def expert_bytes(layer: int, expert: int) -> list[torch.Tensor]:
    source = torch.Generator().manual_seed(layer * 1009 + expert)
    return [
        torch.randint(256, (width,), generator=source).to(torch.uint8) for width in WIDTHS[layer]
    ]


def random_round(dice: random.Random, placement: np.ndarray) -> np.ndarray:
    """Experts of one layer go round in a circle of slots on different ranks."""
    layer = dice.randrange(LAYERS)
    ranks = dice.sample(range(placement.shape[1]), dice.randint(2, placement.shape[1]))
    places = [(rank, dice.randrange(SLOTS)) for rank in ranks]
    return np.array(
        [
            (layer, placement[layer, source[0], source[1]], *source, *target)
            for source, target in zip(places, [*places[1:], places[0]], strict=True)
        ],
        MOVE,
    )


class Rank:
    def __init__(self, folder: Path, rank: int, ranks: int, seed: int):
        torch.set_num_threads(1)
        self.rank, self.ranks = rank, ranks
        self.dice = random.Random(seed)  # the same on all ranks
        self.placement = np.arange(LAYERS * ranks * SLOTS).reshape(LAYERS, ranks, SLOTS)
        memory = Files(folder, rank)
        self.weights = [[memory.tensor(SLOTS, width) for width in row] for row in WIDTHS]
        for layer in range(LAYERS):
            for slot, expert in enumerate(self.placement[layer, rank].tolist()):
                Copies(slot_views(self.weights[layer], slot), expert_bytes(layer, expert)).run()
        self.staging = Staging(self.weights, 1)
        self.store = dist.FileStore(str(folder / "store"), ranks)
        fallback = PeerToPeer("gloo", self.store, rank, ranks, 20.0)
        self.transport = CudaIpc(self.weights, self.store, rank, ranks, 20.0, fallback, memory)

    def run(self, rounds: int) -> int:
        moved = 0
        for number in range(rounds):
            moves = random_round(self.dice, self.placement)
            self.transport.connect(number // 10)
            assert self.transport.name == "ipc"
            self.take_part(moves, number)
            moved += len(moves)
        return moved

    def take_part(self, moves: np.ndarray, number: int) -> None:
        leaving, arriving, live = [], [], []
        for index, move in enumerate(moves):
            facts = index, int(move["layer"]), int(move["expert"])
            if move["source_rank"] == self.rank:
                views = slot_views(self.weights[move["layer"]], int(move["source_slot"]))
                leaving.append(Parcel(*facts, int(move["rank"]), views))
            if move["rank"] == self.rank:
                views = self.staging.views(0, int(move["layer"]))
                arriving.append(Parcel(*facts, int(move["source_rank"]), views))
                live = slot_views(self.weights[move["layer"]], int(move["slot"]))
        self.transport.exchange(moves, leaving, arriving)
        self.meet(f"staged{number}")
        Copies(live, [view for parcel in arriving for view in parcel.views]).run()
        for move in moves:
            self.placement[move["layer"], move["rank"], move["slot"]] = move["expert"]
        self.check()

    def meet(self, name: str) -> None:
        self.store.add(name, 1)
        while self.store.add(name, 0) < self.ranks:
            time.sleep(0.0005)

    def check(self) -> None:
        for layer in range(LAYERS):
            for slot, expert in enumerate(self.placement[layer, self.rank].tolist()):
                found = slot_views(self.weights[layer], slot)
                for view, wanted in zip(found, expert_bytes(layer, expert), strict=True):
                    assert torch.equal(view, wanted), (layer, slot, expert)


def main() -> None:
    folder, (ranks, rounds, seed) = Path(sys.argv[1]), map(int, sys.argv[2:5])
    moved = []
    children = []
    for rank in range(ranks):
        read, write = os.pipe()
        if (child := os.fork()) == 0:
            os.close(read)
            os.write(write, str(Rank(folder, rank, ranks, seed).run(rounds)).encode())
            os._exit(0)
        os.close(write)
        children.append((child, read))
    for child, read in children:
        moved.append(os.read(read, 100).decode())
        assert os.waitpid(child, 0)[1] == 0
    assert len(set(moved)) == 1
    print(json.dumps(int(moved[0])))


if __name__ == "__main__":
    main()
