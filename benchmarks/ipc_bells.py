"""How long an asyncio loop in another process takes to wake: our doorbell, pipes, a socket."""

from __future__ import annotations

import asyncio
import os
import random
import socket
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np

from flash_eplb.ipc.doorbell import Doorbell
from flash_eplb.ipc.names import bell_name

from .ipc_run import CONTEXT, PeerError, Run, ignore_interrupts

BELL, PIPE, DATAGRAM = "doorbell (ours)", "asyncio pipe", "Unix datagram socket"
BARE = "pipe, add_reader"
WAYS = (BELL, PIPE, BARE, DATAGRAM)
RUNG, WOKEN = 2, 3  # words: when it was rung, and how often the loop has woken
GAP = 0.001  # seconds from one ring to the next
PATIENCE = 5.0


@dataclass
class Wakes:
    """One way's latencies in microseconds, by rounds."""

    way: str
    rounds: list[np.ndarray]

    def time(self, quantile: float) -> float:
        """The median of the rounds' p50 or p99; of p99.9, that of all wake-ups together."""
        if quantile > 99:
            return float(np.percentile(np.concatenate(self.rounds), quantile))
        return float(np.median([np.percentile(times, quantile) for times in self.rounds]))


def measure(run: Run, rounds: int, rings: int) -> list[Wakes]:
    """The ways in an order drawn anew for each ring, one pair of processes, in one loop.

    The asyncio pipe is the loop's own transport, whose protocol is called with what was read.
    """
    session = f"bench-{os.getpid()}"
    path = f"{run.folder}/datagram"
    with ExitStack() as stack:
        bell = Doorbell.create(bell_name(session))
        stack.callback(bell.close)
        pipes = [CONTEXT.Pipe(duplex=False) for _ in range(2)]
        control, theirs = CONTEXT.Pipe()
        arguments = (theirs, run.words, bell_name(session), [end for end, _ in pipes], path)
        process = CONTEXT.Process(target=_serve, args=arguments, daemon=True)
        process.start()
        stack.callback(_end, process)
        theirs.close()
        _answer(control)
        sender = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
        sender.connect(path)
        pipe, bare = (end.fileno() for _, end in pipes)
        ways: dict[str, Callable[[], Any]] = {
            BELL: bell.ring,
            PIPE: lambda: os.write(pipe, b"\x01"),
            BARE: lambda: os.write(bare, b"\x01"),
            DATAGRAM: lambda: sender.send(b"\x01"),
        }
        draw = random.Random(0)
        _round(run.words, control, ways, draw, 100)
        taken = [_round(run.words, control, ways, draw, rings) for _ in range(rounds)]
        control.send(None)
    return [Wakes(way, [times[way] for times in taken]) for way in WAYS]


def _round(
    words: Any,
    control: Any,
    ways: dict[str, Callable[[], Any]],
    draw: random.Random,
    rings: int,
) -> dict[str, np.ndarray]:
    """`rings` of each way; one that always followed another would bear what that leaves to do."""
    words[WOKEN] = count = 0
    clock, sleep = time.monotonic_ns, time.sleep
    for _ in range(rings):
        for way in draw.sample(WAYS, len(WAYS)):
            ring = ways[way]
            count += 1
            words[RUNG] = begin = clock()
            ring()
            sleep(GAP)
            while words[WOKEN] < count:
                if clock() - begin > PATIENCE * 1e9:
                    raise PeerError(f"{way}: the loop did not wake")
                sleep(GAP)
    control.send("times")
    return {way: np.array(times) / 1e3 for way, times in _answer(control).items()}


def _answer(control: Any) -> Any:
    if not control.poll(60):
        raise PeerError("the woken process does not answer")
    try:
        return control.recv()
    except EOFError:
        raise PeerError("the woken process is gone") from None


def _end(process: Any) -> None:
    process.join(2)
    if process.is_alive():
        process.kill()
        process.join()


def _serve(control: Any, words: Any, bell: str, pipes: list[Any], path: str) -> None:
    """The woken process: takes the time first, then what woke it."""
    import uvloop

    ignore_interrupts()
    loop = uvloop.new_event_loop()
    pipe, bare = pipes
    doorbell = Doorbell.open(bell)
    receiver = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    receiver.bind(path)
    taken: dict[str, list[int]] = {way: [] for way in WAYS}

    def watch(way: str, descriptor: int, take: Callable[[], Any]) -> None:
        times, clock = taken[way], time.monotonic_ns

        def woken() -> None:
            times.append(clock() - words[RUNG])
            take()
            words[WOKEN] += 1

        loop.add_reader(descriptor, woken)

    class Protocol(asyncio.Protocol):
        def data_received(self, data: bytes) -> None:
            taken[PIPE].append(time.monotonic_ns() - words[RUNG])
            words[WOKEN] += 1

    def command() -> None:
        wanted = None
        with suppress(EOFError, OSError):
            wanted = control.recv()
        if wanted is None:
            loop.stop()
            return
        control.send(taken)
        for times in taken.values():
            times.clear()

    watch(BELL, doorbell.descriptor, doorbell.drain)
    loop.run_until_complete(loop.connect_read_pipe(Protocol, pipe))
    watch(BARE, bare.fileno(), lambda: os.read(bare.fileno(), 64))
    watch(DATAGRAM, receiver.fileno(), lambda: receiver.recv(64))
    loop.add_reader(control.fileno(), command)
    control.send("ready")
    loop.run_forever()
    doorbell.close()
