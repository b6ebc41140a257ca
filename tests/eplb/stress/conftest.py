"""`eplb stress` as a process of its own."""

import os
import subprocess
import sys

import pytest

QUICK = {
    "EPLB_EPISODE_STEPS": "4",
    "EPLB_WINDOW_EPISODES": "16",
    "EPLB_PLAN_INTERVAL": "4",
    "EPLB_MIN_EPISODES": "4",
    "EPLB_RING_STEPS": "128",
}


@pytest.fixture
def start_stress(session, tmp_path):
    """`start_stress(*arguments, python="", **variables)` starts one; `python` runs in each of its
    processes before anything else."""
    started = []

    def start(*arguments, python="", **variables):
        kept = {n: v for n, v in os.environ.items() if not n.upper().startswith("EPLB_")}
        (tmp_path / "sitecustomize.py").write_text(python)
        environment = {
            **kept,
            **QUICK,
            "EPLB_SESSION": session,
            "TMPDIR": str(tmp_path),
            "PYTHONPATH": os.pathsep.join(
                [str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]
            ),
            **variables,
        }
        command = [sys.executable, "-m", "flash_eplb.eplb.cli", "stress", *map(str, arguments)]
        process = subprocess.Popen(
            command,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
        process.wait()
        for stream in (process.stdout, process.stderr):
            stream.close()


@pytest.fixture
def stress(start_stress):
    """Runs one to its end; (exit code, what it printed, what it complained about)."""

    def run(*arguments, timeout=240, **options):
        process = start_stress(*arguments, **options)
        out, complaints = process.communicate(timeout=timeout)
        return process.returncode, out, complaints

    return run
