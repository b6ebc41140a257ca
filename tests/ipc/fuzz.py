"""Bytes that no honest process writes, made by seed, for everything that reads shared memory.

    python tests/ipc/fuzz.py MARK TARGET:SEED:BATCHES...   runs batches, their seeds from SEED on
    python tests/ipc/fuzz.py --input TARGET SEED NUMBER    shows one input and runs it

MARK is a file of 16 bytes that tells seed and number of the input that runs, in case of a crash.

An input is a valid one with a few mutations, three in four times with its checksums made to fit
again, so that it comes past them. It may be accepted or refused by an error of ours, in one line.
"""

from __future__ import annotations

import itertools
import mmap
import random
import struct
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from fuzz_targets import NUMBERS, TARGETS, Target

BATCH = 5000
"""Inputs of a seed."""

WORDS = [struct.pack("<q", n)[:size] for n in NUMBERS for size in (1, 2, 4, 8)]
WORDS += [struct.pack(">q", n)[-size:] for n in NUMBERS for size in (2, 4, 8)]  # msgpack's order


def _place(chance: random.Random, content: bytearray) -> int:
    return int(chance.random() * (len(content) + 1))


def _flip(chance: random.Random, content: bytearray, _: list[bytes]) -> None:
    if content:
        content[int(chance.random() * len(content))] ^= 1 << int(chance.random() * 8)


def _set(chance: random.Random, content: bytearray, _: list[bytes]) -> None:
    if content:
        content[int(chance.random() * len(content))] = int(chance.random() * 256)


def _put_word(chance: random.Random, content: bytearray, _: list[bytes]) -> None:
    word = WORDS[int(chance.random() * len(WORDS))]
    place = _place(chance, content)
    if chance.random() < 0.5:
        place = place // len(word) * len(word)
    content[place : place + len(word)] = word


def _cut(chance: random.Random, content: bytearray, _: list[bytes]) -> None:
    place = _place(chance, content)
    length = 1 << int(chance.random() * 9)
    del content[place : place + length]


def _truncate(chance: random.Random, content: bytearray, _: list[bytes]) -> None:
    del content[_place(chance, content) :]


def _insert(chance: random.Random, content: bytearray, _: list[bytes]) -> None:
    place = _place(chance, content)
    content[place:place] = chance.randbytes(1 << int(chance.random() * 6))


def _splice(chance: random.Random, content: bytearray, valid: list[bytes]) -> None:
    other = valid[int(chance.random() * len(valid))]
    content[_place(chance, content) :] = other[int(chance.random() * (len(other) + 1)) :]


def _overwrite(chance: random.Random, content: bytearray, _: list[bytes]) -> None:
    place = _place(chance, content)
    length = min(len(content) - place, 1 << int(chance.random() * 9))
    content[place : place + length] = chance.randbytes(length)


MUTATIONS = [_flip, _flip, _set, _set, _put_word, _put_word, _cut, _truncate]
MUTATIONS += [_insert, _splice, _overwrite]
COUNTS = [0, 1, 1, 1, 1, 2, 2, 3, 4, 16]


def inputs(target: Target, seed: int) -> Iterator[bytes]:
    """The inputs of a batch; the same for the same seed."""
    chance = random.Random(seed)
    valid = target.valid
    for _ in range(BATCH):
        content = bytearray(valid[int(chance.random() * len(valid))])
        for _ in range(COUNTS[int(chance.random() * len(COUNTS))]):
            MUTATIONS[int(chance.random() * len(MUTATIONS))](chance, content, valid)
        if chance.random() < 0.75:
            target.repair(content)
        yield bytes(content)


def outcome(target: Target, content: bytes) -> str:
    """What follows from an input; any exception that is not ours comes through."""
    try:
        return target.run(content)
    except target.refusal as error:
        text = str(error)
        assert text.isprintable(), f"{text!r} is not one line"
        assert len(text) < 500, f"{text!r} is too long"
        return text


def run_batch(name: str, seed: int, mark: mmap.mmap | None = None) -> Counter[str]:
    """Run a batch of target `name`; returns how often each outcome came, without its numbers.

    Args:
        name: of `TARGETS`.
        seed: of the batch.
        mark: gets seed and number of each input before it runs.

    Raises:
        AssertionError: with seed, number and bytes of the input that was not refused as it should.
    """
    target = TARGETS[name]
    found: Counter[str] = Counter()
    for number, content in enumerate(inputs(target, seed)):
        if mark is not None:
            struct.pack_into("<qq", mark, 0, seed, number)
        try:
            found[outcome(target, content).translate(_DIGITS)] += 1
        except Exception as error:
            raise AssertionError(
                f"{name}, seed {seed}, input {number}: {type(error).__name__}: {error}; "
                f"bytes {content.hex()}"
            ) from error
    return found


_DIGITS = str.maketrans("", "", "0123456789")


def main(mark: str, *jobs: str) -> None:
    """Run `jobs`; prints the target before and the inputs run after each."""
    with open(mark, "r+b") as file:
        memory = mmap.mmap(file.fileno(), 16)
    for job in jobs:
        name, seed, batches = job.split(":")
        print(name, flush=True)
        seeds = range(int(seed), int(seed) + int(batches))
        print(sum(run_batch(name, number, memory).total() for number in seeds), flush=True)


def show(name: str, seed: int, number: int) -> None:
    """Print one input and what follows from it."""
    content = next(itertools.islice(inputs(TARGETS[name], seed), number, None))
    print(content.hex(), flush=True)
    print(outcome(TARGETS[name], content))


if __name__ == "__main__":
    if sys.argv[1] == "--input":
        show(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
    else:
        main(*sys.argv[1:])
