"""An engine starts and stops, or is killed, again and again; a planner's side attaches each time.

    python tests/ipc/engine_cycles.py SESSION CYCLES stop|kill

Prints what the planner's side holds before and after, and what is left in the end, in JSON.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time

os.environ["OPENBLAS_NUM_THREADS"] = "1"  # who forks has no other threads
from forks import Engine, fork, holdings, kill, left_over

from flash_eplb.ipc.doorbell import Doorbell
from flash_eplb.ipc.liveness import SegmentError
from flash_eplb.ipc.names import bell_name
from flash_eplb.planners.group import Group

LONGEST_LIFE = 0.02


def serve(session: str, generation: int) -> None:
    """An engine that ends when it gets SIGTERM."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    engine = Engine(session, generation)
    signal.sigwait({signal.SIGTERM})
    engine.close()


def attach(session: str, generation: int) -> bool:
    """Look at the engine once, as a planner does; False if there is none to be served."""
    try:
        group = Group.attach(session)
    except SegmentError:
        return False
    found = group.generation
    group.committed()
    list(group.read_heat())
    bell = Doorbell.open(bell_name(session))  # it is there as long as the group is
    bell.drain()
    bell.close()
    group.close()
    return found == generation


def stop(session: str, number: int) -> None:
    """One start and stop."""
    pid = fork(lambda: serve(session, number))
    while not attach(session, number):
        time.sleep(0.0005)
    os.kill(pid, signal.SIGTERM)
    assert os.waitpid(pid, 0)[1] == 0
    assert left_over(session) == []


def die(session: str, number: int) -> None:
    """One start over what the one before has left, and a death at any moment."""
    pid = fork(lambda: serve(session, number))
    time.sleep(random.uniform(0, LONGEST_LIFE))
    attach(session, number)
    kill(pid)


def main(session: str, cycles: int, how: str) -> None:
    cycle = {"stop": stop, "kill": die}[how]
    for number in range(3):
        cycle(session, number + 1)
    before = holdings()
    for number in range(cycles):
        cycle(session, number + 4)
    after = holdings()
    stop(session, cycles + 4)
    print(json.dumps({"before": before, "after": after, "left": left_over(session)}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
