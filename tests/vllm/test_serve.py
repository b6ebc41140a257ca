"""`vllm serve` over HTTP: planners that come, go, die and lie; the tokens stay the same."""

import os
import re
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "eplb"))
sys.path.insert(0, str(Path(__file__).parent))
from conftest import SETTINGS, assert_nothing_left
from scraped import Metrics

from flash_eplb.eplb.demo.server import VllmServer
from flash_eplb.eplb.demo.traffic import complete, differences
from flash_eplb.ipc.liveness import owner_is_alive
from flash_eplb.ipc.names import planner_name
from flash_eplb.ipc.placement import MOVE
from flash_eplb.ipc.round import Round, encode_round
from flash_eplb.ipc.status import Field
from flash_eplb.planners.group import Group

SESSION = f"t-serve-{os.getpid()}"


class Engine:
    """A running server, its reference tokens, and what its workers show in shared memory."""

    def __init__(self, server, work, reference):
        self.server = server
        self.work = work
        self.reference = reference
        self.served = 0

    def check(self, batches: int = 1) -> None:
        """Generate the next batches; every token is the reference's."""
        for _ in range(batches):
            number = self.served % len(self.work)
            self.served += 1
            answer = complete(self.server.url, self.server.model, self.work[number], 40)
            differing, compared = differences([self.reference[number]], [answer])
            assert compared == 8 * 40
            assert differing == 0

    def check_until(self, done, planner=None, timeout: float = 240) -> None:
        """Generate until `done()`; `planner`, where one is to bring that about, must live."""
        deadline = time.monotonic() + timeout
        while not done():
            assert planner is None or planner.process.poll() is None, planner.text()
            assert time.monotonic() < deadline, self.story(planner)
            self.check()

    def story(self, planner) -> str:
        """What the ranks show, what the server said beside its requests, what the planner said."""
        shown = {field.name: self.counts(field) for field in Field}
        said = [line for line in self.server.text().splitlines() if "HTTP/1.1" not in line]
        told = "no planner"
        if planner:
            told = (
                f"the planner waited {planner.waited():.0f} s for a core\n{planner.text()[-5000:]}"
            )
        return "\n".join([str(shown), *said[-40:], told])

    def committed(self) -> int:
        return min(self.counts(Field.COMMITTED))

    def counts(self, field: Field) -> list[int]:
        group = Group.attach(SESSION)
        counts = [rank.status[field] for rank in group.ranks]
        group.close()
        return counts

    def settled(self) -> int:
        """Serve until the rounds that an ended planner left are through; the epoch after them."""
        before = -1
        while before != self.committed() or any(self.counts(Field.STATE)):
            before = self.committed()
            self.check()
        return before


@pytest.fixture(scope="module")
def engine(folder, checkpoint, work, reference):
    settings = {**SETTINGS, "session": SESSION, "transport": "engine"}
    with VllmServer(checkpoint, folder / "serve.log", **settings) as server:
        pid = server.process.pid
        yield Engine(server, work, reference)
    assert_nothing_left(SESSION)
    with pytest.raises(ProcessLookupError):
        os.killpg(pid, 0)


def test_without_a_planner_the_placement_stays_and_one_warning_says_so(engine):
    warning = f"no planner serves session '{SESSION}'"
    engine.check_until(lambda: warning in engine.server.text())
    time.sleep(3)
    engine.check(3)
    assert engine.server.text().count(warning) == 1
    assert engine.committed() == 0


def test_tokens_are_the_same_while_plans_are_committed(engine, start_planner):
    planner = start_planner(SESSION)
    planner.wait_for("serving an engine")
    before = engine.committed()
    engine.check_until(lambda: engine.committed() >= before + 5, planner)
    engine.check(4)
    # A plan may take two rounds, so that the ranks have committed more of them than plans.
    engine.check_until(lambda: planner.text().count(" committed") >= 5, planner)


def test_prometheus_is_told_what_the_ranks_have_done(engine):
    with Metrics(SESSION) as metrics:
        metrics.get_until(("eplb_engine_up",), 1)
        while not (found := metrics.get())["eplb_episode_par_count", "0"]:
            engine.check()
        assert metrics.end()[0] == 0
    for rank in (0, 1):
        committed = found["eplb_rounds_committed_total", str(rank)]
        assert committed == engine.counts(Field.COMMITTED)[rank]
        assert found["eplb_rank_tokens_total", str(rank)] > 0
    assert 1 < found["eplb_par",] < 2
    assert found["eplb_planner_up",] == 0


def test_a_planner_killed_in_the_middle_is_succeeded_by_another(engine, start_planner):
    first = start_planner(SESSION)
    first.wait_for("serving an engine")
    before = engine.committed()
    engine.check_until(lambda: engine.committed() > before, first)
    first.end(signal.SIGKILL)
    engine.check(3)
    epoch = engine.settled()
    second = start_planner(SESSION)
    second.wait_for("serving an engine")
    engine.check_until(lambda: engine.committed() > epoch, second)
    assert f"resuming from epoch {epoch}" in second.text()
    assert second.end() == 0


def test_flashlb_evens_out_what_random_plans_left(engine, start_planner):
    engine.settled()
    before = engine.committed()
    planner = start_planner(SESSION, policy="flashlb")
    planner.wait_for("serving an engine")
    engine.check_until(lambda: engine.committed() > before, planner)
    engine.check_until(lambda: "no layer is worth a move" in planner.text(), planner)
    found, left = map(float, re.search(r"of these layers (\S+) -> (\S+)", planner.text()).groups())
    assert left < found


def test_a_planner_stopped_cleanly_leaves_the_placement(engine, start_planner):
    planner = start_planner(SESSION)
    planner.wait_for("serving an engine")
    engine.check(2)
    warnings = engine.server.text().count("no planner serves")
    assert planner.end(signal.SIGINT) == 0
    assert "Traceback" not in planner.text()
    assert not owner_is_alive(planner_name(SESSION))
    engine.check_until(lambda: engine.server.text().count("no planner serves") == warnings + 1)
    epoch = engine.settled()
    engine.check(2)
    assert engine.committed() == epoch


def test_a_second_planner_is_refused_by_the_pid_of_the_first(engine, start_planner):
    first = start_planner(SESSION)
    first.wait_for("serving an engine")
    second = start_planner(SESSION)
    assert second.process.wait(timeout=60) == 1
    assert f"belongs to the living process {first.process.pid}" in second.text()
    engine.check()


def test_bad_plans_are_refused_and_inference_goes_on(engine):
    engine.settled()  # a round that the last planner sent may still be on its way
    group = Group.attach(SESSION)
    epoch, placement = group.committed()
    shape = group.shape
    generation = 4711
    for rank in group.ranks:
        rank.plans.take_over(generation)
    layer = placement[0]
    only = next(e for e in range(shape.experts) if (layer == e).sum() == 1)
    rank, slot = np.argwhere(layer == only)[0]
    other = next(s for s in range(shape.slots) if s != slot)
    guest = next(s for s in range(shape.slots) if layer[1 - rank, s] not in layer[rank])
    drops = (0, layer[1 - rank, guest], 1 - rank, guest, rank, slot)
    doubles = (0, layer[rank, slot], rank, slot, rank, other)
    good_shape = (shape.layers, shape.ranks, shape.slots)
    bad = [
        ("has no slot", [drops], good_shape),
        ("stands twice", [doubles], good_shape),
        ("made for", [doubles], (shape.layers + 1, shape.ranks, shape.slots)),
    ]
    refused = engine.counts(Field.REFUSED)
    for number, (_, moves, (layers, ranks, slots)) in enumerate(bad * 2, start=1):
        record = encode_round(
            Round(
                generation,
                number,
                number,
                True,
                epoch,
                layers,
                ranks,
                slots,
                np.array(moves, MOVE).tobytes(),
            )
        )
        for rank in group.ranks:
            rank.plans.put(record)
        engine.check()
    engine.check(2)
    assert engine.counts(Field.REFUSED) == [n + 6 for n in refused]
    assert engine.committed() == epoch
    log = engine.server.text()
    for reason, _, _ in bad:
        complaints = [line for line in log.splitlines() if "refuses" in line and reason in line]
        assert len(complaints) == 2, complaints  # one per rank
    group.close()
