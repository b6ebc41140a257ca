import itertools
import os
import signal
import subprocess
import sys

import pytest
from hypothesis import settings

# Compiling a kernel at its first call takes a second, so no example has a deadline.
settings.register_profile("flash_eplb", deadline=None)
settings.load_profile("flash_eplb")


def pytest_addoption(parser):
    parser.addoption("--soak", action="store_true", help="run tests marked soak in their long form")


@pytest.fixture
def amount(request):
    """`amount(short, long)` is `short`, or `long` under --soak (`make soak`)."""
    return lambda short, long: long if request.config.getoption("--soak") else short


OURS = f"t-{os.getpid()}-"
_numbers = itertools.count()


def _segments(prefix):
    return sorted(entry for entry in os.listdir("/dev/shm") if entry.startswith(f"eplb.{prefix}"))


@pytest.fixture
def session():
    """A session of the test's own; nothing of it may be left afterwards."""
    name = f"{OURS}{next(_numbers)}"
    yield name
    left = _segments(f"{name}.")
    for entry in left:
        os.unlink(f"/dev/shm/{entry}")
    assert not left


@pytest.fixture(scope="session", autouse=True)
def nothing_is_left_at_the_end():
    yield
    assert not _segments(OURS)


class Script:
    """A Python process that runs `code` and tells us lines.

    Scripts end by themselves when their standard input does.
    """

    def __init__(self, code, *arguments):
        self._process = subprocess.Popen(
            [sys.executable, "-c", code, *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.pid = self._process.pid

    def line(self):
        line = self._process.stdout.readline()
        assert line, "the script has ended"
        return line.strip()

    def say(self, line):
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()

    def kill(self):
        os.kill(self.pid, signal.SIGKILL)
        self._process.wait()

    def is_running(self):
        return self._process.poll() is None

    def end(self):
        """End its standard input; returns the exit code."""
        self._process.stdin.close()
        try:
            code = self._process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self.kill()
            raise
        self._process.stdout.close()
        return code


@pytest.fixture
def start(session):
    """`start(code, *arguments)` runs a Script that ends with the test, before `session`."""
    scripts = []

    def start_one(code, *arguments):
        scripts.append(Script(code, *arguments))
        return scripts[-1]

    yield start_one
    for script in scripts:
        script.end()


@pytest.fixture
def environment(monkeypatch):
    """`monkeypatch` in an environment without any EPLB_ variable."""
    for name in list(os.environ):
        if name.upper().startswith("EPLB_"):
            monkeypatch.delenv(name)
    return monkeypatch
