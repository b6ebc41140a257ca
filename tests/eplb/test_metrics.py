"""`eplb metrics`: figures for Prometheus, beside an engine without torch."""

import contextlib
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "planners"))
from fake_engine import FakeEngine
from scraped import Metrics

from flash_eplb.eplb.metrics import COUNTERS, GAUGES
from flash_eplb.ipc.names import planner_name
from flash_eplb.ipc.segment import take_name
from flash_eplb.ipc.status import Field, State

pytestmark = pytest.mark.usefixtures("environment")

DEMAND = np.array([[80, 40, 20, 10, 2, 2, 2, 2], [10, 10, 10, 10, 10, 10, 10, 30]])


@pytest.fixture
def metrics(session):
    """`metrics(*options)` starts one for the session."""
    with contextlib.ExitStack() as running:
        yield lambda *options: running.enter_context(Metrics(session, *options))


@pytest.fixture
def engine(session):
    made = FakeEngine(session, ring=4096)
    yield made
    made.close()


def test_the_figures_are_those_of_the_engine(session, engine, metrics):
    for number, field in enumerate(Field):
        for rank in engine.ranks:
            rank.status[field] = 100 * number + rank.header.rank
    for rank in engine.ranks:
        rank.status[Field.STATE] = State.HELD
    seen = metrics()
    seen.get_until(("eplb_engine_up",), 1)
    demands = DEMAND, DEMAND[::-1]
    for number in range(32):
        engine.step(demands[number // 16])
    found = seen.get_until(("eplb_episode_par_count", "0"), 2)
    for name, (field, _) in [*COUNTERS.items(), *GAUGES.items()]:
        suffix = "_total" if name in COUNTERS else ""
        for rank in (0, 1):
            wanted = 32 if field is Field.STEP else 100 * field + rank
            assert found[name + suffix, str(rank)] == wanted
    shown = {state: found["eplb_state", "1", state.name.lower()] for state in State}
    assert shown == {State.IDLE: 0, State.STAGING: 0, State.HELD: 1, State.STOPPED: 0}
    loads = [_load(engine, demand) for demand in demands]
    for rank in (0, 1):
        wanted = 16 * sum(load[:, rank].sum() for load in loads)
        assert found["eplb_rank_tokens_total", str(rank)] == wanted
    pars = np.array([load.max(axis=1) / load.mean(axis=1) for load in loads])
    assert pars.max() > 1.05
    for layer in (0, 1):
        assert found["eplb_episode_par_sum", str(layer)] == pytest.approx(pars[:, layer].sum())
    assert found["eplb_par",] == pytest.approx(pars.mean())
    assert found["eplb_balancedness",] == pytest.approx(1 / pars.mean())
    assert found["eplb_heat_lost_total",] == 0
    code, said, errors = seen.end()
    assert (code, said) == (0, "")
    assert re.fullmatch(rf".* following the 2 ranks of session {session!r}\n", errors)


def _load(engine, demand):
    """int[layers, ranks], what one step of `demand` brings to each rank."""
    flat = engine.placement.reshape(2, -1)
    shares = [demand[i][flat[i]] // np.bincount(flat[i])[flat[i]] for i in (0, 1)]
    return np.reshape(shares, (2, 2, -1)).sum(axis=2)


def test_it_waits_for_an_engine_and_for_the_next_one(session, metrics):
    seen = metrics()
    assert seen.first == f"figures of session {session!r} at {seen.url}; end it with Ctrl-C"
    assert seen.get() == {("eplb_engine_up",): 0, ("eplb_planner_up",): 0}
    for ranks in (2, 3):
        engine = FakeEngine(session, ranks=ranks, ring=4096)
        engine.step(DEMAND)
        found = seen.get_until(("eplb_engine_up",), 1)
        assert found["eplb_steps_total", str(ranks - 1)] == 1
        assert found["eplb_par",] != found["eplb_par",]  # no episode yet
        engine.close()
        seen.get_until(("eplb_engine_up",), 0)
    code, _, errors = seen.end(signal.SIGINT)
    assert code == 0
    assert errors.count("following the") == errors.count("is gone, waiting for the next") == 2


def test_a_planner_is_up_as_long_as_it_shows_life(session, metrics):
    seen = metrics()
    lock = take_name(session, planner_name(session), b"", 0, 1)
    lock.publish()
    assert seen.get()["eplb_planner_up",] == 1
    path = Path("/dev/shm" + planner_name(session))
    os.utime(path, (1, 1))
    assert seen.get()["eplb_planner_up",] == 0
    lock.close()
    assert seen.get()["eplb_planner_up",] == 0


def test_it_touches_nothing_of_the_engine(session, engine, metrics):
    seen = metrics()
    seen.get_until(("eplb_engine_up",), 1)
    maps = Path(f"/proc/{seen.process.pid}/maps").read_text().splitlines()
    assert [line.split()[1] for line in maps if f"eplb.{session}.rank" in line] == ["r--s"] * 2
    seen.process.kill()
    seen.process.communicate()
    engine.step(DEMAND)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["--port", "65536"], "--port is 65536; it must be from 0 to 65535"),
        (["--port", "-1"], "--port is -1; it must be from 0 to 65535"),
        (["--host", "203.0.113.1"], "Cannot assign requested address; give another port, or an"),
    ],
)
def test_an_address_that_cannot_be_had(session, options, why):
    command = [sys.executable, "-m", "flash_eplb.eplb.cli", "metrics", "--session", session]
    ended = subprocess.run([*command, *options], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 2
    assert why in ended.stderr
    assert ended.stdout == ""


def test_a_port_that_is_taken(session, metrics):
    port = metrics().url.split(":")[2].split("/")[0]
    command = [sys.executable, "-m", "flash_eplb.eplb.cli", "metrics", "--session", session]
    ended = subprocess.run([*command, "--port", port], capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stderr) == (
        2,
        f"eplb: --host 127.0.0.1 --port {port} cannot be listened on: Address already in use; "
        "give another port, or an address of this machine\n",
    )
