"""The hook on vLLM's own classes: installed only where it is wanted and can work."""

import functools
import json
import subprocess
import sys
from pathlib import Path

import pytest

from flash_eplb.eplb.demo.server import environment


@pytest.fixture(scope="module")
def hooks(checkpoint):
    """`hooks(**settings)`: (the class made in each mode, the log); run once for each settings."""

    @functools.cache
    def run(**settings):
        done = start(checkpoint, environment(**settings))
        assert done.returncode == 0, done.stderr[-3000:]
        line = next(line for line in done.stdout.splitlines() if line.startswith("MADE "))
        return json.loads(line[5:]), done.stdout + done.stderr

    return run


def start(checkpoint, variables):
    return subprocess.run(
        [sys.executable, str(Path(__file__).parent / "hooks.py"), str(checkpoint)],
        env=variables,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


def test_without_us_vllm_s_own_state_is_made(hooks):
    made, log = hooks()
    assert set(made.values()) == {"EplbState"}
    assert "flash_eplb" not in log


def test_with_us_unsupported_modes_are_refused_by_name(hooks):
    made, log = hooks(enabled=1)
    assert made["tp2"] == "FlashEplbState"
    assert made["pp2"] == made["tp2 dp2"] == "EplbState"
    assert "does not balance: pipeline parallelism (pipeline_parallel_size=2)" in log
    assert "does not balance: tensor parallelism within data parallelism (TP=2, DP=2)" in log
    assert log.count("without --enable-eplb: nothing is balanced") == 1


def test_a_setting_of_vllm_s_that_logs_nothing_any_more_is_named(hooks):
    made, log = hooks(enabled=1)
    assert made["logs"] == "FlashEplbState"
    assert log.count("log_balancedness of --eplb-config logs nothing where flash_eplb") == 1


def test_where_vllm_s_cpu_build_refuses_the_remedy_stands_before_its_error(checkpoint):
    done = start(checkpoint, environment(enabled=1, cpu_patches=0))
    assert done.returncode
    told, theirs, _ = (done.stdout + done.stderr).partition("Traceback")
    assert theirs
    assert "CPU build refuses --enable-eplb without our patches: set EPLB_CPU_PATCHES=1" in told
