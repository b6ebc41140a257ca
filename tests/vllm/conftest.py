"""A checkpoint, prompts, and what vLLM answers without us; helpers to run vLLM and the planner."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flash_eplb.eplb.demo.checkpoint import TinyMoE, write_checkpoint
from flash_eplb.eplb.demo.server import environment, remove_vllm_segments, vllm_segments
from flash_eplb.eplb.demo.traffic import batches

SETTINGS = {
    "enabled": 1,
    "policy": "random",  # moves experts all the time; FlashLB soon has nothing left to win here
    "episode_steps": 4,
    "min_episodes": 4,
    "plan_interval": 4,
    "window_episodes": 10,
    "vote_steps": 2,
    "staging_rows": 16,
    "plan_timeout_steps": 300,  # a plan that hangs is given up, and says so, within a test
}


def pytest_collection_modifyitems(items):
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.vllm)
            item.add_marker(pytest.mark.timeout(600))


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("vllm")


@pytest.fixture(scope="session")
def checkpoint(folder):
    made = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys, pathlib; from flash_eplb.eplb.demo.checkpoint import write_checkpoint; "
            "write_checkpoint(pathlib.Path(sys.argv[1]))",
            str(folder / "tiny-moe"),
        ],
        check=False,
    )
    assert made.returncode == 0
    subprocess.run([sys.executable, "-m", "flash_eplb.eplb.cli", "warmup"], check=True)
    return write_checkpoint(folder / "tiny-moe")


@pytest.fixture(scope="session")
def work():
    return batches(TinyMoE(), per_topic=2)


class Generated:
    """What one run of generate.py gave; see there."""

    def __init__(self, result: dict, log: str):
        self.passes = result["passes"]
        self.commits = result["commits"]
        self.reloaded = result["reloaded"]
        self.flags = result["flags"]
        self.checksums = result["checksums"]
        self.log = log


@pytest.fixture(scope="session")
def generate(folder, checkpoint, work):
    (folder / "work.json").write_text(json.dumps(work))

    def run(name, least_commits=0, reload=0, engine=None, path="", **settings):
        result, log = folder / f"{name}.json", folder / f"{name}.log"
        command = [sys.executable, str(Path(__file__).parent / "generate.py"), str(checkpoint)]
        command += [str(folder / "work.json"), str(result), str(least_commits), str(reload)]
        env = environment(**settings)
        if path:
            env["PYTHONPATH"] = path
        others = vllm_segments()
        with log.open("wb") as output:
            process = subprocess.Popen(
                [*command, json.dumps(engine or {})],
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            code = process.wait(timeout=500)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            remove_vllm_segments(others)
        text = log.read_text(errors="replace")
        assert code == 0, text[-5000:]
        return Generated(json.loads(result.read_text()), text)

    return run


@pytest.fixture(scope="session")
def reference(reloaded_reference):
    """The tokens of the same engine, patches included, with EPLB_ENABLED=0."""
    return reloaded_reference[0]


@pytest.fixture(scope="session")
def reloaded_reference(generate):
    """The same before and after `reload_weights`: vLLM's CPU build itself loses the rotary
    embedding in it, so that the tokens change."""
    return generate("reference", reload=1, enabled=0).passes


class PlannerProcess:
    """`eplb planner` as a user starts it."""

    def __init__(self, session: str, log: Path, **settings):
        self.log = log
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                [str(Path(sys.executable).parent / "eplb"), "planner"],
                env=environment(session=session, **{**SETTINGS, **settings}),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a scheduling group of its own, as in a user's other shell
            )

    def waited(self) -> float:
        """Seconds for which it was ready to run and had no core."""
        return int(Path(f"/proc/{self.process.pid}/schedstat").read_text().split()[1]) / 1e9

    def text(self) -> str:
        return self.log.read_text()

    def wait_for(self, text: str, timeout: float = 60) -> None:
        deadline = time.monotonic() + timeout
        while text not in self.text():
            assert self.process.poll() is None, self.text()
            assert time.monotonic() < deadline, f"no {text!r} in:\n{self.text()}"
            time.sleep(0.1)

    def end(self, number: int = signal.SIGTERM) -> int:
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(timeout=30)


@pytest.fixture
def start_planner(tmp_path):
    started = []

    def start(session: str, **settings) -> PlannerProcess:
        log = tmp_path / f"planner-{len(started)}.log"
        started.append(PlannerProcess(session, log, **settings))
        return started[-1]

    yield start
    for planner in started:
        planner.end()


def assert_nothing_left(session: str) -> None:
    """No name of `session`."""
    assert [entry for entry in os.listdir("/dev/shm") if entry.startswith(f"eplb.{session}.")] == []
