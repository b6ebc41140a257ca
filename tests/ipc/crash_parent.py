"""The warm parent of those that die, and their survivor.

    python tests/ipc/crash_parent.py points|plain

Reads orders from standard input, one a line, and answers each with what was amiss, in JSON. With
`points` the crash points are alive; with `plain` the sources run as they are.
"""

from __future__ import annotations

import faulthandler
import json
import os
import random
import signal
import sys
import time
import traceback

import crash_points

os.environ["OPENBLAS_NUM_THREADS"] = "1"  # who forks has no other threads
if sys.argv[1] == "points":
    crash_points.bring_to_life()

from crash_scenarios import SCENARIOS, Scenario, scenario_of
from forks import adopt_grandchildren, fork, holdings, kill, reap, work_as_successor

MOST_SECONDS = 30
MOST_PASSES = 12


def die(scenario: Scenario, point: str | None, passes: int, life: float) -> None:
    """Run `scenario` in a child until it dies, at `point` or after `life` seconds, and check."""
    scenario.prepare()
    ready, go = os.pipe(), os.pipe()

    def act() -> None:
        scenario.begin()
        os.write(ready[1], b"r")
        os.read(go[0], 1)
        if point is not None:
            crash_points.arm(point, passes)
        scenario.act()

    pid = fork(act)
    os.close(ready[1])
    try:
        assert os.read(ready[0], 1) == b"r", "the child did not begin"
        scenario.attach()
        os.write(go[1], b"g")
        status = _watch(scenario, pid, time.monotonic() + life if point is None else None)
    except BaseException:
        kill(pid)
        raise
    finally:
        for end in (ready[0], *go):
            os.close(end)
    assert os.WIFSIGNALED(status), f"the child ended with {os.waitstatus_to_exitcode(status)}"
    assert os.WTERMSIG(status) == signal.SIGKILL, "the point was not reached"
    reap()
    scenario.check(point, passes)


def _watch(scenario: Scenario, pid: int, deadline: float | None) -> int:
    """Watch until the child has died, or has been killed at `deadline`; its status."""
    while not os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
        scenario.watch()
        if deadline is not None and time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0)
    return os.waitpid(pid, 0)[1]


def serve(session: str, what: str, times: int, seed: int) -> list[str]:
    """`times` deaths at point `what`, or at any instant of scenario `what`; returns the faults."""
    rng = random.Random(seed)
    signal.alarm(MOST_SECONDS)
    work_as_successor(session)  # compiles what children and survivor use, the first time
    faults = []
    for number in range(times):
        point = None if what in SCENARIOS else what
        kind = SCENARIOS[what] if point is None else scenario_of(what)
        passes, life = rng.randint(1, MOST_PASSES), rng.uniform(0, kind.longest_life)
        signal.alarm(MOST_SECONDS)
        before = holdings()
        try:
            die(kind(session), point, passes, life)
            assert holdings() == before, f"{before} has become {holdings()}"
        except Exception:
            faults.append(f"death {number}, pass {passes}: {traceback.format_exc()}")
    signal.alarm(0)
    return faults


def main() -> None:
    faulthandler.register(signal.SIGALRM, chain=True)  # says where it was blocked, and ends
    adopt_grandchildren()
    for line in sys.stdin:
        print(json.dumps(serve(**json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
