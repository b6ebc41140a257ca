"""How long an asyncio loop in another process takes to wake: our doorbell, a pipe, a socket."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from flash_eplb.ipc.doorbell import Doorbell
from flash_eplb.ipc.names import bell_name

from .ipc_run import CONTEXT, PeerError, Run, ignore_interrupts

BELL, PIPE, DATAGRAM = "doorbell (ours)", "pipe", "Unix datagram socket"
WAYS = (BELL, PIPE, DATAGRAM)
RUNG, WOKEN = 2, 3  # words: when it was rung, and how often the loop has woken
GAP = 0.001  # seconds from one ring to the next
PATIENCE = 5.0


@dataclass
class Wakes:
    """One way's latencies in microseconds, by rounds."""

    way: str
    rounds: list[np.ndarray] = field(default_factory=list)

    def time(self, quantile: float) -> float:
        """The median of the rounds' p50 or p99; of p99.9, that of all wake-ups together."""
        if quantile > 99:
            return float(np.percentile(np.concatenate(self.rounds), quantile))
        return float(np.median([np.percentile(times, quantile) for times in self.rounds]))


def measure(run: Run, rounds: int, rings: int) -> list[Wakes]:
    """The three ways in turn, one pair of processes, the descriptors in one loop."""
    session = f"bench-{os.getpid()}"
    path = f"{run.folder}/datagram"
    with ExitStack() as stack:
        bell = Doorbell.create(bell_name(session))
        stack.callback(bell.close)
        read_end, write_end = CONTEXT.Pipe(duplex=False)
        control, theirs = CONTEXT.Pipe()
        arguments = (theirs, run.words, bell_name(session), read_end, path)
        process = CONTEXT.Process(target=_serve, args=arguments, daemon=True)
        process.start()
        stack.callback(_end, process)
        theirs.close()
        _answer(control)
        sender = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
        sender.connect(path)
        pipe = write_end.fileno()
        ways: dict[str, Callable[[], Any]] = {
            BELL: bell.ring,
            PIPE: lambda: os.write(pipe, b"\x01"),
            DATAGRAM: lambda: sender.send(b"\x01"),
        }
        found = {way: Wakes(way) for way in WAYS}
        for way, ring in ways.items():
            _round(run.words, control, way, ring, 100)
        for _ in range(rounds):
            for way, ring in ways.items():
                found[way].rounds.append(_round(run.words, control, way, ring, rings))
        control.send(None)
    return list(found.values())


def _round(words: Any, control: Any, way: str, ring: Callable[[], Any], rings: int) -> np.ndarray:
    words[WOKEN] = 0
    clock, sleep = time.monotonic_ns, time.sleep
    for count in range(1, rings + 1):
        words[RUNG] = begin = clock()
        ring()
        sleep(GAP)
        while words[WOKEN] < count:
            if clock() - begin > PATIENCE * 1e9:
                raise PeerError(f"{way}: the loop did not wake")
            sleep(GAP)
    control.send(way)
    return np.array(_answer(control)) / 1e3


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


def _serve(control: Any, words: Any, bell: str, pipe: Any, path: str) -> None:
    """The woken process: takes the time first, then what woke it."""
    import uvloop

    ignore_interrupts()
    loop = uvloop.new_event_loop()
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

    def command() -> None:
        way = None
        with suppress(EOFError, OSError):
            way = control.recv()
        if way is None:
            loop.stop()
            return
        control.send(taken[way])
        taken[way].clear()

    watch(BELL, doorbell.descriptor, doorbell.drain)
    watch(PIPE, pipe.fileno(), lambda: os.read(pipe.fileno(), 64))
    watch(DATAGRAM, receiver.fileno(), lambda: receiver.recv(64))
    loop.add_reader(control.fileno(), command)
    control.send("ready")
    loop.run_forever()
    doorbell.close()
