"""SIGKILL at every step of the protocols: the survivor goes on, and a successor takes over."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from crash_points import COMMENT, SOURCES, names, revive
from crash_scenarios import SCENARIOS, scenario_of

PARENT = Path(__file__).with_name("crash_parent.py")


class Parent:
    """A warm process that forks those that die; see `crash_parent.py`."""

    def __init__(self, mode):
        self._mode = mode
        self._process = None

    def faults(self, session, what, times):
        order = {"session": session, "what": what, "times": times, "seed": random.getrandbits(32)}
        print(order)
        if self._process is None:
            self._process = self._start()
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            self.end()
            pytest.fail("the survivor was blocked, or ended: see its standard error")
        return json.loads(answer)

    def _start(self):
        command = [sys.executable, PARENT, self._mode]
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def end(self):
        if self._process is not None:
            process, self._process = self._process, None
            process.communicate(timeout=60)


@pytest.fixture(scope="module")
def armed():
    parent = Parent("points")
    yield parent
    parent.end()


@pytest.fixture(scope="module")
def plain():
    parent = Parent("plain")
    yield parent
    parent.end()


@pytest.mark.soak
@pytest.mark.parametrize("point", names())
def test_whoever_survives_a_death_at_this_point_goes_on(point, session, armed, amount):
    assert armed.faults(session, point, amount(5, 100)) == []


@pytest.mark.soak
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_whoever_survives_a_death_at_any_instant_goes_on(scenario, session, plain, amount):
    assert plain.faults(session, scenario, amount(20, 2000)) == []


def test_every_point_has_a_name_of_its_own_and_a_scenario():
    found = names()
    assert len(set(found)) == len(found)
    assert {scenario_of(name) for name in found} == set(SCENARIOS.values())
    written = sum(file.read_text().count("crash point") for file in SOURCES.glob("*.py"))
    assert written == len(found)


def test_only_an_instrumented_process_knows_of_them():
    for file in SOURCES.glob("*.py"):
        source = file.read_text()
        revived = revive(source)
        assert "_die" not in source
        assert revived.count("_die(") == len(COMMENT.findall(source))
        assert revived.count("\n") == source.count("\n")
        assert "cache=True" not in revived
